"""Intents whose model behaves badly: the whole program, the real daemon under its supervisor, and a scripted model.

What each failure is at the port is in tests/integration/test_agent_misbehaves.py; here is what people see, what the ledger holds,
what the model was asked, and that nothing is left in the daemon.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from devcluster import ocdaemon
from devcluster.stack import scratch
from opencode.scenarios import Answer, Scenario, load
from opencode.scripted_model import ScriptedModel
from tests.e2e.product import Product

pytestmark = pytest.mark.timeout(300)
HELLO = next(s.turns[0] for s in load() if s.name == "hello")
NEED = Answer(structured={"kind": "need", "need": {"reads": ["README.md"], "searches": []}})
SILENT = Answer(silent=60.0)
SCRIPTS: dict[str, tuple[Answer, ...]] = {
    "silent-once": (replace(HELLO, first=(SILENT,)),),
    "silent-for-ever": (SILENT,),
    "refused-key": (Answer(status=401),),
    "foreign-tool": (Answer(tool={"name": "bash", "arguments": {"command": "id"}}),),
    "prose-for-ever": (Answer(text="Here is my plan."),),
    "endless-needs": (NEED,),
    "killed": (NEED, replace(HELLO, first=(SILENT,))),
    "wedged": (NEED, replace(HELLO, first=(SILENT,))),
    "canceled": (replace(HELLO, piece=1, pause=0.5),),
}


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    scripts = [
        Scenario(name=name, goal=name, repository=None, after=None, feedback=None, turns=turns)
        for name, turns in SCRIPTS.items()
    ]
    with ScriptedModel([*load(), *scripts]) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(model: ScriptedModel, opencode_binary: Path) -> Iterator[ocdaemon.OcDaemon]:
    with scratch() as state:
        started = ocdaemon.start(state, behind={**model.environ(), "OC_STALL_MS": "2500"}, detach=False)
        yield started
        started.stop()


class Live:
    """The product in OC_MODE=live, the model's calls and the daemon at hand."""

    def __init__(self, product: Product, model: ScriptedModel, daemon: ocdaemon.OcDaemon) -> None:
        self.product, self.model, self.daemon = product, model, daemon
        product.start(OC_MODE="live", OC_TURN_SECONDS="15", **daemon.settings)

    def calls(self, goal: str) -> int:
        """How often the model was asked for this goal."""
        return sum(f'"goal":"{goal}"' in str(request["messages"]) for request in self.model.requests)

    def ledger(self, name: str) -> list[tuple[Any, ...]]:
        """(seq, err_code) of every logical call."""
        query = (
            "SELECT o.seq, o.err_code FROM app.opencode_calls o JOIN app.runs r ON r.id = o.run_id"
            " JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s ORDER BY o.created_at"
        )
        return self.product.sql(query, name)

    def process(self) -> psutil.Process:
        """The daemon itself, below its supervisor."""
        found: psutil.Process = psutil.Process(self.daemon.child.pid).children()[0]
        return found

    def nothing_left(self) -> None:
        """No turn and no session, as soon as the daemon is there."""
        auth = ("opencode", self.daemon.settings["OPENCODE_SERVER_PASSWORD"])
        with httpx.Client(base_url=self.daemon.settings["OC_BASE_URL"], auth=auth, timeout=5) as http:
            self.product.wait(lambda: http.get("/session/status").json() == {}, "no turn is left", seconds=5)
            assert http.get("/session").json() == []

    def until_called(self, goal: str, count: int) -> None:
        """The model has been asked so often."""
        self.product.wait(lambda: self.calls(goal) >= count, f"{goal} has reached the model", seconds=60)


@pytest.fixture
def live(product: Product, model: ScriptedModel, daemon: ocdaemon.OcDaemon) -> Live:
    return Live(product, model, daemon)


@pytest.mark.parametrize(
    ("name", "phase", "says", "rows"),
    [
        ("silent-once", "WaitingInput", "", ["TurnStalled", None]),
        ("silent-for-ever", "Failed", "oc_timeout_terminal: no answer to 3 prompts", ["TurnStalled"] * 3),
        ("refused-key", "Failed", "the provider refused the key (OC_MODEL_API_KEY)", ["Permanent"]),
        ("foreign-tool", "Failed", "called the tool 'bash', but its agent has none", ["Permanent"]),
        ("prose-for-ever", "Failed", "after 2 corrections: there was no structured answer", [None] * 3),
        ("endless-needs", "Failed", "asked to see more after 6 answers", [None] * 7),
    ],
)
def test_a_bad_model_ends_in_the_right_phase_with_a_row_per_call(
    live: Live, name: str, phase: str, says: str, rows: list[str | None]
) -> None:
    live.product.apply(name, name)
    status = live.product.wait_phase(name, "WaitingInput", "Failed", seconds=90)
    assert status["phase"] == phase
    if phase == "Failed":
        assert status["reason"] == "PlanFailed" and says in live.product.condition(name, "Finished")["message"]
    assert [code for _, code in live.ledger(name)] == rows
    live.nothing_left()
    assert live.product.starts() == {}


def test_a_daemon_that_dies_in_a_turn_is_replaced_and_no_answer_is_asked_for_again(live: Live) -> None:
    live.product.apply("killed", "killed")
    live.until_called("killed", 2)
    live.process().kill()
    live.product.wait_phase("killed", "WaitingInput", seconds=120)
    assert live.ledger("killed") == [(0, None), (1, None)], "a row per logical call, however often it was tried"
    assert live.calls("killed") == 3, "the first turn came from the ledger"
    live.nothing_left()


@pytest.mark.slow
def test_a_daemon_that_is_wedged_in_a_turn_is_replaced(live: Live) -> None:
    live.product.apply("wedged", "wedged")
    live.until_called("wedged", 2)
    pid = live.process().pid
    os.kill(pid, signal.SIGSTOP)
    live.product.wait_phase("wedged", "WaitingInput", seconds=150)
    assert not psutil.pid_exists(pid)
    assert live.ledger("wedged") == [(0, None), (1, None)] and live.calls("wedged") == 3
    live.nothing_left()


def test_canceling_ends_the_turn_at_once(live: Live) -> None:
    live.product.apply("canceled", "canceled")
    live.until_called("canceled", 1)
    began = time.monotonic()
    live.product.patch_intent("canceled", {"cancel": True})
    live.product.wait_phase("canceled", "Canceled", seconds=30)
    assert time.monotonic() - began < 25, "the turn itself would have taken minutes"
    live.nothing_left()
