"""Whether the outcome was right, by SQL and by the sandboxes' own count; and what the controller says about itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import psycopg

from devcluster.errors import DevclusterError
from devcluster.stack import Controller
from devcluster.trial.numbers import counters

WRONG = {
    "runs that did not succeed": "SELECT intent_id, status, reason FROM app.runs WHERE status <> 'succeeded'",
    "runs not closed exactly once": "SELECT intent_id, closed, execution_no FROM app.runs WHERE closed <> 1 OR execution_no <> 1",
    "tasks without exactly one outcome": "SELECT task_key, status, outcomes FROM app.sbx_runs WHERE outcomes <> 1 OR status <> 'succeeded'",
    "runs without tasks": "SELECT intent_id FROM app.runs r WHERE NOT EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = r.id)",
    "receipts seen twice": "SELECT receipt_key, seen_count FROM app.mock_receipts WHERE seen_count <> 1",
    "attempts that never ended": "SELECT task_key, attempt FROM app.sbx_attempts WHERE state = 'created'",
}
ATTEMPTS = """SELECT a.fence, a.task_key, a.state, a.fence = t.fence FROM app.sbx_attempts a JOIN app.sbx_runs t USING (run_id, task_key)"""


def exactly_once(database: str, start_log: Path, *, runs: int) -> int:
    """Raises DevclusterError unless every run succeeded and every task counts once; how many starts did not count.

    Every line of the start log must be a journaled attempt, and the accepted attempt of every task must have been started once.
    """
    with psycopg.connect(database, autocommit=True) as c:
        row = c.execute("SELECT count(*) FROM app.runs").fetchone()
        if row is None or row[0] != runs:
            raise DevclusterError(f"{row} runs instead of {runs}")
        for what, query in WRONG.items():
            if found := c.execute(query.encode()).fetchmany(5):
                raise DevclusterError(f"{what}: {found}")
        attempts = c.execute(ATTEMPTS).fetchall()
    started = Counter((int(line.split()[2]), line.split()[0]) for line in start_log.read_text().splitlines())
    unknown = started.keys() - {(fence, key) for fence, key, _, _ in attempts}
    twice = {one: n for one, n in started.items() if n > 1}
    accepted = {(fence, key) for fence, key, state, live in attempts if live and state == "done"}
    if unknown or twice or not accepted <= started.keys():
        raise DevclusterError(
            f"the start log does not fit the journal: unknown {unknown}, twice {twice}, missing {accepted - started.keys()}"
        )
    return started.total() - len(accepted)


def log_events(log: Path, *levels: str) -> Counter[str]:
    """How often each event was logged at these levels; the controller must log JSON."""
    found: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            if entry["level"] in levels:
                found[f"{entry['level']} {entry['event'][:80]}"] += 1
        elif line.startswith("Traceback"):
            found["Traceback"] += 1
    return found


def metric(controller: Controller, name: str) -> float:
    """The sum of a metric's samples now. Raises DevclusterError where there is none."""
    values = [value for _, value in counters(controller.get("/metrics")[1], name)]
    if not values:
        raise DevclusterError(f"the controller shows no metric {name}")
    return sum(values)


def bucket(controller: Controller, name: str, percent: float) -> float:
    """The upper bound of the histogram bucket that holds this percentile."""
    found = sorted(
        (float(labels["le"]), value) for labels, value in counters(controller.get("/metrics")[1], f"{name}_bucket")
    )
    if not found or found[-1][1] == 0:
        raise DevclusterError(f"the controller's histogram {name} is empty")
    wanted = percent / 100 * found[-1][1]
    return next(bound for bound, count in found if count >= wanted)


def peak_mib(controller: Controller) -> float:
    """The largest resident memory that the process ever had."""
    status = Path(f"/proc/{controller.child.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
