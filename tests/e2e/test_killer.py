"""A task that takes its worker down each time it runs: it ends LOST after six workers, and what runs beside it succeeds (ADR 0015)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.e2e.product import Product
from tests.support.killer_main import KILLS

GOAL = "work beside a killer"
ENDED = ("Succeeded", "Failed", "RetriesExceeded")


def plan() -> dict[str, Any]:
    """The killer is over before its neighbours are, so it always takes them along."""
    commands = {"killer": f"sleep 9; echo {KILLS}"} | {f"neighbour-{n}": "sleep 1.5; echo done" for n in range(3)}
    tasks = [{"id": i, "title": i, "command": c, "timeoutSeconds": 60} for i, c in commands.items()]
    rest: dict[str, Any] = {"edits": [], "design": [], "files": [], "risks": [], "tests": []}
    return {"kind": "plan", "plan": {"goal": GOAL, "summary": "s", "tasks": tasks, **rest}}


@pytest.mark.timeout(300)
def test_a_task_that_kills_its_workers_is_lost_and_takes_no_neighbour_along(product: Product) -> None:
    script = product.stack.state / f"{product.namespace}.answers.json"
    script.write_text(json.dumps({GOAL: [plan()]}))

    def start() -> None:
        product.start(program=("-m", "tests.support.killer_main", str(script)))

    def dead() -> bool:
        return not product.controllers[-1].child.alive()

    start()
    product.apply("k", GOAL, limits={"parallelism": 4})
    product.wait_phase("k", "WaitingInput")
    product.vote("k")
    died = 0
    while True:
        product.wait(lambda: dead() or product.status("k").get("phase") in ENDED, "a death or the end", seconds=40)
        if not dead():
            break
        died += 1
        assert died <= 6, "a killer is stopped after a bounded number of workers"
        start()

    tasks = dict(product.sql("SELECT task_id, coalesce(err_code, status) FROM app.sbx_runs"))
    assert tasks == {"killer": "LOST"} | dict.fromkeys((f"neighbour-{n}" for n in range(3)), "NONE")
    status = product.status("k")
    assert (status["phase"], status["reason"]) == ("RetriesExceeded", "InfrastructureFailed")
    says = "its worker died 3 times while no other task ran on it, and 3 times before that beside others"
    assert [(f["task"], f["errCode"], f["message"]) for f in status["failures"]] == [("killer", "LOST", says)]

    ids = dict(product.sql("SELECT task_key, task_id FROM app.sbx_runs"))
    starts = Counter({ids[key]: n for key, n in product.starts().items()})
    assert (died, starts.pop("killer")) == (6, 6)
    assert max(starts.values()) <= 4, "three times beside the killer, and then alone to the end"
    outcomes = product.sql("SELECT DISTINCT outcomes FROM app.sbx_runs")
    assert outcomes == [(1,)] and product.sql("SELECT closed FROM app.runs") == [(1,)]
    product.assert_once()
