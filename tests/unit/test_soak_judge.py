"""The judge of the soaks finds what it is there to find: each test plants one wrong row into an execution that was right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from controller.core.model import Owner
from devcluster.soak import judge, plan
from devcluster.soak.report import Part, verdict
from devcluster.soak.rows import (
    Attempt,
    Causes,
    Check,
    Evidence,
    Failure,
    Interruption,
    Kept,
    Run,
    Start,
    Stream,
    Task,
    Window,
)

PLAN = plan.mixed(8, seed=1)
LOST = 2  # this task's first attempt was its worker's, who was killed at 10.5
KILL = Causes(interruptions=(Interruption(worker="worker-1", what="killed", at=10.5),))


def good() -> Evidence:
    """Eight tasks of a mixed plan; task LOST took two attempts."""
    tasks, attempts, kept, streams = [], [], [], []
    for n, one in enumerate(PLAN):
        key, fence, number = f"key-{n}", 100 + n, 2 if n == LOST else 1
        if n == LOST:
            attempts.append(attempt(key, fence=50, number=1, state="unknown", executor="worker-1-ab", ended=15.0))
        attempts.append(attempt(key, fence=fence, number=number, executor="worker-2-cd"))
        status = "succeeded" if one.err_code == "NONE" else "failed"
        tasks.append(
            Task(
                task_id=one.task_id,
                task_key=key,
                status=status,
                err_code=one.err_code,
                exit=one.exit,
                outcomes=1,
                fence=fence,
                receipts=1,
                junit=one.junit,
            )
        )
        said = {"stdout.txt": one.stdout} if one.stdout else {}
        for name, content in {**one.files, **said}.items():
            sha = hashlib.sha256(content or b"").hexdigest()
            kept.append(
                Kept(task_id=one.task_id, name=name, kind="file", attempt=number, sha256=sha, content_sha256=sha)
            )
        size = len(one.stdout or b"")
        streams.append(Stream(task_key=key, attempt=number, stdout_bytes=size, marks=1, last="stream_closed"))
    run = Run(
        status="failed",
        reason="TaskFailed",
        closed=1,
        executions=1,
        endings=("failed",),
        finishers=('"closed"',),
        steps=1,
        result=tuple((one.task_id, one.status) for one in tasks),
    )
    return Evidence(
        run=run,
        tasks=tuple(tasks),
        attempts=tuple(attempts),
        starts=tuple(Start(task_key=a.task_key, attempt=a.attempt, fence=a.fence) for a in attempts),
        shown={"total": 8, "succeeded": 6, "failed": 2, "queued": 0, "running": 0, "unknown": 0},
        largest=5000,
        kept=tuple(kept),
        streams=tuple(streams),
    )


def attempt(
    key: str, *, fence: int, number: int, executor: str, state: str = "done", ended: float | None = 20.0
) -> Attempt:
    return Attempt(fence=fence, task_key=key, attempt=number, state=state, executor=executor, created=10.0, ended=ended)


def verdicts(it: Evidence, causes: Causes = KILL, *, canceled: bool = False) -> list[Check]:
    """All checks of one Intent."""
    return [
        *judge.common(PLAN, it, causes, canceled=canceled),
        judge.check("outcomes", len(it.tasks), judge.outcomes(PLAN, it, causes)),
        judge.check("kept", len(it.kept), judge.kept(PLAN, it)),
        judge.check("streamed", len(it.streams), judge.streamed(PLAN, it)),
        judge.check("ordered", len(it.run.result), judge.ordered(PLAN, it)),
    ]


def wrong(it: Evidence, causes: Causes = KILL, *, canceled: bool = False) -> str:
    """Every violation, a line each."""
    return "\n".join(f"{c.name}: {v}" for c in verdicts(it, causes, canceled=canceled) for v in c.violations)


def test_an_execution_that_was_right_is_right() -> None:
    assert wrong(good()) == ""


def changed(n: int, **fields: Any) -> Callable[[Evidence], Evidence]:
    """One task's row."""
    return lambda it: replace(it, tasks=tuple(replace(t, **fields) if i == n else t for i, t in enumerate(it.tasks)))


def ran(**fields: Any) -> Callable[[Evidence], Evidence]:
    """The run's row."""
    return lambda it: replace(it, run=replace(it.run, **fields))


def noted(n: int, **fields: Any) -> Callable[[Evidence], Evidence]:
    """One attempt's row."""
    return lambda it: replace(
        it, attempts=tuple(replace(a, **fields) if i == n else a for i, a in enumerate(it.attempts))
    )


def started(key: str, number: int, fence: int) -> Callable[[Evidence], Evidence]:
    """One more line in the start log."""
    return lambda it: replace(it, starts=(*it.starts, Start(task_key=key, attempt=number, fence=fence)))


def swapped(it: Evidence) -> Evidence:
    first, second, *rest = it.run.result
    return replace(it, run=replace(it.run, result=(second, first, *rest)))


PLANTED: dict[str, tuple[Callable[[Evidence], Evidence], str]] = {
    "a double outcome": (changed(0, outcomes=2, receipts=2), "task-0001 has 2 accepted outcomes"),
    "a receipt that was seen twice": (changed(0, receipts=2), "2 receipts for 1 outcomes"),
    "no outcome": (changed(0, outcomes=0, receipts=0), "task-0001 has 0 accepted outcomes"),
    "a missing task": (lambda it: replace(it, tasks=it.tasks[1:]), "task task-0001 is missing"),
    "a task twice": (lambda it: replace(it, tasks=(*it.tasks, it.tasks[0])), "task key key-0 has 2 rows"),
    "a task of nobody": (changed(0, task_id="task-9999"), "task-9999 is not in the plan"),
    "a task that still runs": (changed(0, status="running"), "task-0001 is running"),
    "a second closing": (ran(closed=2), "closed 2 times in 1 executions"),
    "a second ending": (ran(endings=("failed", "succeeded")), "it ended 2 times"),
    "a second FinishWF that closed": (ran(finishers=('"closed"', '"closed"')), "FinishWF ended with"),
    "no FinishWF": (ran(finishers=()), "FinishWF ended with"),
    "ExecuteST twice": (ran(steps=2), "ExecuteST was written 2 times"),
    "results out of order": (swapped, "they differ at 0"),
    "a result that is not SQL's": (changed(0, status="failed"), "SQL has task-0001 failed"),
    "a start of no attempt": (started("key-0", 7, 999), "a start that the journal does not know"),
    "one fence started twice": (started("key-0", 1, 100), "fence 100 was started 2 times"),
    "accepted and never started": (lambda it: replace(it, starts=it.starts[1:]), "fence 100, which was never started"),
    "a gap in the attempts": (noted(LOST, attempt=5), "attempts [(2, 102), (5, 50)]"),
    "the old attempt was accepted": (changed(LOST, fence=50), "accepted is fence 50, the journal's last is [102]"),
    "two attempts are done": (noted(LOST, state="done"), "and its done are [50, 102]"),
    "an attempt without an end": (noted(LOST, state="created", ended=None), "attempt 1 has no end"),
    "an attempt of a worker that lives": (noted(LOST, executor="worker-2-cd"), "started and unexplained"),
    "an attempt that ended before the kill": (noted(LOST, ended=10.2), "started and unexplained"),
    "an attempt that began after the kill": (noted(LOST, created=14.0), "started and unexplained"),
    "an Intent of 64 KiB": (lambda it: replace(it, largest=65_536), "65536 bytes"),
    "a status that miscounts": (lambda it: replace(it, shown={**it.shown, "running": 1}), "running is 1, SQL counts 0"),
    "another exit": (changed(1, exit=4), "instead of ('CMD_NONZERO', 3, None)"),
    "another errCode": (changed(7, err_code="LOST"), "instead of ('TIMEOUT', None, None)"),
    "a lost report": (changed(2, junit=None), "instead of ('NONE', 0, {'tests': 3, 'failures': 1})"),
    "a file less": (
        lambda it: replace(it, kept=tuple(k for k in it.kept if k.name != "junit.xml")),
        "(junit): files {} instead of",
    ),
    "a blob of other bytes": (
        lambda it: replace(it, kept=(replace(it.kept[0], content_sha256="0" * 64), *it.kept[1:])),
        "the blob of stdout.txt is not what its name says",
    ),
    "an artifact of the attempt that did not count": (
        lambda it: replace(it, kept=(*it.kept, replace(it.kept[1], attempt=1, name="extra"))),
        "an artifact of an attempt that did not count",
    ),
    "output that is cut": (
        lambda it: replace(it, streams=tuple(replace(s, stdout_bytes=s.stdout_bytes // 2) for s in it.streams)),
        f"due are {plan.MIB} bytes",
    ),
    "a stream that goes on after its end": (
        lambda it: replace(it, streams=tuple(replace(s, last="stdout") for s in it.streams)),
        "last='stdout'",
    ),
    "no stream": (lambda it: replace(it, streams=it.streams[1:]), "task-0001: no stream"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_row_is_found(name: str) -> None:
    planted, says = PLANTED[name]
    assert says in wrong(planted(good()))


def test_what_looked_at_nothing_has_shown_nothing() -> None:
    empty = replace(good(), tasks=(), attempts=(), starts=(), kept=(), streams=(), shown={}, largest=0)
    assert wrong(empty).count("there was nothing to look at") == 10


# --------------------------------------------------------------------------- explanations


def failing(*windows: Window, code: str = "BOOT_FAIL") -> Causes:
    return Causes(failures=(Failure(task_key="key-2", attempt=1, err_code=code),), windows=windows)


DOWN = Window(what="E2B was restarted", began=12.0, ended=13.0)


@pytest.mark.parametrize(
    ("causes", "explained"),
    [
        (KILL, True),
        (Causes(), False),
        (Causes(interruptions=(Interruption(worker="worker-1", what="stopped", at=10.5),)), True),
        (Causes(interruptions=(Interruption(worker="worker-1", what="ended", at=16.0),)), True),
        (Causes(interruptions=(Interruption(worker="worker-1", what="killed", at=16.0),)), False),
        (Causes(interruptions=(Interruption(worker="worker-11", what="killed", at=10.5),)), False),
        (failing(DOWN), True),
        (failing(), False),
        (failing(replace(DOWN, began=16.0, ended=17.0)), False),
        (failing(DOWN, code="CMD_NONZERO"), False),
        (Causes(windows=(DOWN,)), False),
    ],
)
def test_an_attempt_is_explained_by_what_was_done_while_it_ran(causes: Causes, *, explained: bool) -> None:
    assert ("unexplained" in wrong(good(), causes)) is not explained


def three(code: str) -> Evidence:
    """Task LOST with three attempts of worker-1, the last of which wrote an infrastructure failure."""
    it = changed(LOST, err_code=code, status="failed", exit=None, junit=None)(good())
    mine = [attempt("key-2", fence=n, number=n, state="unknown", executor="worker-1-ab") for n in (1, 2)]
    others = [a for a in it.attempts if a.task_key != "key-2"]
    last = attempt("key-2", fence=102, number=3, executor="worker-2-cd")
    return replace(it, attempts=(*others, *mine, last))


@pytest.mark.parametrize(
    ("causes", "fine"),
    [
        (replace(KILL, windows=(DOWN,)), True),
        (KILL, False),  # the third was nobody's fault of ours
        (Causes(windows=(DOWN,)), False),  # the first two were
    ],
)
def test_an_infrastructure_failure_is_fine_only_after_three_attempts_that_we_spoiled(
    causes: Causes, *, fine: bool
) -> None:
    says = list(judge.outcomes(PLAN, three("NET_FAIL"), causes))
    assert (says == []) is fine


@pytest.mark.parametrize(("times", "fine"), [(2, False), (5, False), (6, True)])
def test_a_task_is_lost_to_dead_workers_only_after_six_that_we_killed(times: int, *, fine: bool) -> None:
    it = three("LOST")
    mine = [attempt("key-2", fence=n, number=n, state="unknown", executor="worker-1-ab") for n in range(1, times + 1)]
    last = attempt("key-2", fence=102, number=times + 1, executor="worker-2-cd")
    others = [a for a in it.attempts if a.task_key != "key-2"]
    says = list(judge.outcomes(PLAN, replace(it, attempts=(*others, *mine, last)), KILL))
    assert (says == []) is fine


def test_a_canceled_task_has_no_outcome_and_its_last_attempt_needs_no_explanation() -> None:
    it = changed(0, err_code="CANCELED", status="failed", outcomes=0, receipts=0, exit=None)(good())
    it = noted(0, state="unknown")(it)
    it = replace(
        it,
        run=replace(it.run, finishers=(), steps=0, result=()),
        kept=tuple(k for k in it.kept if k.task_id != "task-0001"),
        shown={**it.shown, "succeeded": 5, "failed": 3},
    )
    found = [c for c in verdicts(it, canceled=True) if c.name != "ordered"]
    assert [v for c in found for v in c.violations] == []
    assert "instead of 0" in wrong(changed(0, outcomes=1)(it), canceled=True)
    assert "instead of 1" in wrong(it)


def test_workers_end_by_our_kill_or_by_their_own_fence() -> None:
    cuts = [
        Interruption(worker="a", what="killed", at=1.0),
        Interruption(worker="b", what="stopped", at=1.0),
        Interruption(worker="b", what="ended", at=9.0),
        Interruption(worker="c", what="ended", at=9.0),
    ]
    assert list(judge.ended({"a": -9, "b": 75}, cuts)) == []
    assert list(judge.ended({"b": -9, "c": 1}, cuts)) == [
        "b (ended) ended with -9 instead of 75",
        "c (ended) ended with 1 instead of 75",
    ]


def test_what_did_not_happen_has_shown_nothing() -> None:
    assert list(judge.happened(["kill", "kill", "stop"], ["kill", "stop"])) == ["1 × kill did not happen"]


@pytest.mark.parametrize(("fence", "found"), [(50, True), (102, False), (51, False)])
def test_an_older_command_that_lives_on_beside_a_newer_one_is_found(fence: int, *, found: bool) -> None:
    """Fence 51 is a box in which nothing was started."""
    alive = Owner(store_id="s", run_id="r", task_key="key-2", attempt=1, fence=fence)
    assert (list(judge.doubled(good().starts, [alive])) == [alive]) is found


def test_one_violation_is_a_wrong_verdict() -> None:
    right, bad = Check(name="c", looked_at=1), Check(name="c", looked_at=1, violations=("row",))
    assert verdict([Part(name="p", checks=[right])]) == "verdict: every effect counted once"
    assert verdict([Part(name="p", checks=[right, bad])]) == "verdict: WRONG, 1 violations"


# --------------------------------------------------------------------------- plans


def test_plans_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    assert plan.waits(50, seed=3) == plan.waits(50, seed=3) != plan.waits(50, seed=4)
    assert {one.kind for one in plan.mixed(8, seed=1)} == {
        *("quick", "red", "junit", "1 MiB", "file", "sleep", "daemon", "stubborn")
    }
    waits = [float(one.command.split()[1]) for one in plan.waits(1000, seed=1)]
    assert min(waits) < 0.01 and 0.24 < max(waits) <= 0.25
