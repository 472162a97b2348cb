"""What follows from how an attempt ended: another one, alone or not, or an outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from controller.core.contract import ErrCode
from controller.core.model import Artifact, Chunk
from controller.core.phases import Status
from controller.core.work import Attempt, Outcome
from controller.workflows.parts import Parts
from controller.workflows.room import Room
from controller.workflows.task import try_once
from tests.support.builders import request, response

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ATTEMPT = Attempt(run_id="r", run_status=Status.RUNNING, task_key="k", attempt=1, fence=7, request=request(files_in=()))
NEXT = replace(ATTEMPT, attempt=2, fence=8)


@dataclass
class World:
    """All parts in one; the sandbox ends with `code`. `said` is what was done, in order."""

    code: ErrCode = ErrCode.NONE
    said: list[Any] = field(default_factory=list)
    left: tuple[Artifact, ...] = ()
    kept: list[Artifact] = field(default_factory=list)
    junit: Mapping[str, int] | None = None
    room: Room = field(default_factory=Room)
    canceled: frozenset[str] = frozenset()
    store_id: str = "s"
    name: str = "mock"

    def __getattr__(self, name: str) -> Any:
        if name in ("store", "sandboxes", "admission", "clock"):
            return self
        raise AttributeError(name)

    def begin_attempt(self, run_id: str, workflow: str, *, failed: int | None = None) -> Attempt:
        self.said.append(("begin", failed))
        return NEXT

    def note_alone(self, attempt: Attempt) -> None:
        self.said.append(("alone", attempt.fence))

    def record_outcome(self, attempt: Attempt, outcome: Outcome, *, workflow_id: str, carry: bool) -> Attempt:
        self.said.append(("outcome", outcome.response.err_code, outcome.response.stderr))
        self.kept += outcome.artifacts
        self.junit = outcome.junit
        return replace(attempt, fence=None)

    def run(self, asked: Any, *, emit: Any, **_: Any) -> Any:
        self.said.append("run")
        if self.left:
            emit(Chunk(kind="stdout", data=b"said"))
        return response(self.code), self.left

    def wait(self, fence: int) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.said.append(("sleep", seconds))
        self.room.leave(99)

    def jitter(self) -> float:
        return 0.5

    def canceled_runs(self) -> frozenset[str]:
        return self.canceled

    def now(self) -> datetime:
        return NOW

    def observe(self, what: str, outcome: str, seconds: float) -> None: ...


def after(code: ErrCode, *, room: Room | None = None, **before: int) -> list[Any]:
    world = World(code, room=room or Room())
    try_once(cast("Parts", world), replace(ATTEMPT, **cast("Any", before)), "w", 1.0)
    return world.said


@pytest.mark.parametrize(("failures", "pause"), [(0, 1.0), (1, 3.0)])
def test_a_failure_is_tried_again_after_a_pause(failures: int, pause: float) -> None:
    said = after(ErrCode.NET_FAIL, failures=failures, interruptions=2)
    assert said == ["run", ("sleep", pause), ("begin", 7)]


def test_the_third_failure_is_the_outcome() -> None:
    assert after(ErrCode.NET_FAIL, failures=2) == ["run", ("outcome", ErrCode.NET_FAIL, "")]


def test_a_red_test_is_never_tried_again() -> None:
    assert after(ErrCode.CMD_NONZERO) == ["run", ("outcome", ErrCode.CMD_NONZERO, "")]


def test_after_three_interruptions_it_waits_until_it_is_alone_and_notes_that_before_it_runs() -> None:
    room = Room()
    assert room.enter(99, alone=False)  # until the first pause
    said = after(ErrCode.NONE, room=room, interruptions=3)
    assert said == [("sleep", 0.2), ("alone", 7), "run", ("outcome", ErrCode.NONE, "")]


def test_before_that_it_runs_beside_others() -> None:
    room = Room()
    assert room.enter(99, alone=False)
    assert after(ErrCode.NONE, room=room, interruptions=2)[0] == "run"


def test_after_three_interruptions_alone_it_is_lost_and_not_run() -> None:
    said = after(ErrCode.NONE, interruptions=3, interruptions_alone=3)
    why = "its worker died 3 times while no other task ran on it, and 3 times before that beside others"
    assert said == [("outcome", ErrCode.LOST, why)]
    assert after(ErrCode.NONE, interruptions=3, interruptions_alone=2)[1] == "run"


def test_law_13_no_file_of_a_task_takes_the_place_of_what_it_printed() -> None:
    """The store keeps the first artifact of a name."""
    files = tuple(Artifact(name=name, kind="file", content=b"forged") for name in ("stdout.txt", "stderr.txt", "a.txt"))
    world = World(left=files)
    try_once(cast("Parts", world), ATTEMPT, "w", 1.0)
    first = {a.name: a.content for a in reversed(world.kept)}
    assert first["stdout.txt"] == b"said" and first["a.txt"] == b"forged"


def test_what_begins_after_the_runs_time_is_not_run() -> None:
    world = World()
    try_once(cast("Parts", world), replace(ATTEMPT, deadline=NOW), "w", 1.0)
    assert [one[:2] for one in world.said] == [("outcome", ErrCode.TIMEOUT)]
    world = World()
    try_once(cast("Parts", world), replace(ATTEMPT, deadline=NOW + timedelta(seconds=1)), "w", 1.0)
    assert world.said[0] == "run"


def test_what_begins_in_a_run_that_is_being_canceled_is_not_run() -> None:
    world = World(canceled=frozenset({"r"}))
    try_once(cast("Parts", world), ATTEMPT, "w", 1.0)
    assert world.said == [("begin", None)]


def test_all_reports_of_a_task_are_counted_and_a_broken_one_hides_none() -> None:
    reports = (b"no report", b"<testsuite tests='3' failures='1'/>", b"<testsuite tests='2' errors='1'/>")
    left = tuple(Artifact(name=f"{n}/junit.xml", kind="junit", content=report) for n, report in enumerate(reports))
    world = World(left=left)
    try_once(cast("Parts", world), ATTEMPT, "w", 1.0)
    assert world.junit == {"tests": 5, "failures": 2}
