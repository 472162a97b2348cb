"""Events: one per thing worth telling, the same transition under the same keys, nothing when nothing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.core import status as projection
from controller.core.events import between
from controller.core.phases import Stage, Status
from controller.core.run import Run, TaskFailure, Tasks
from controller.kube import objects
from tests.support.builders import NOW, STORE, approval, intent, planned_run, run, vote

FAILURES = tuple(TaskFailure(task=f"t{n}", err_code="OOM", message="gone") for n in range(2))


def of(started: Run, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"approval": None, "store_id": STORE, "identity": None, "now": NOW, **changes}
    return projection.of_run(intent(), started, **given)


WAITING = of(planned_run())
RUNNING = of(planned_run(Status.RUNNING, Stage.EXECUTE))


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("stage", [Stage.PLAN, Stage.EXECUTE])
def test_nothing_is_told_when_nothing_changed(status: Status, stage: Stage) -> None:
    same = of(planned_run(status, stage))
    assert between(same, same, approval(planned_run(status, stage), vote())) == []


def test_progress_within_a_phase_is_not_told() -> None:
    more = of(planned_run(Status.RUNNING, Stage.EXECUTE, tasks=Tasks(total=9, succeeded=5)))
    assert between(RUNNING, more, None) == []


def reasons(old: dict[str, Any], new: dict[str, Any], *votes: Any) -> list[tuple[str, bool]]:
    return [(e.reason, e.warning) for e in between(old, new, approval(planned_run(), *votes))]


def test_a_plan_that_is_ready_names_its_approval_and_digest() -> None:
    (told,) = between(of(run(Status.RUNNING)), WAITING, None)
    assert told.reason == "PlanReady" and not told.warning
    assert WAITING["plan"]["approvalName"] in told.message and WAITING["plan"]["digest"] in told.message


def test_an_approval_tells_who_approved() -> None:
    told = between(WAITING, RUNNING, approval(planned_run(), vote(), vote("bob@corp")))
    assert [e.reason for e in told] == ["ApprovedBy", "ApprovedBy"]
    assert ["alice@corp" in told[0].message, "bob@corp" in told[1].message] == [True, True]
    assert len({e.key for e in told}) == 2


def test_who_rejected_too_late_is_not_said_to_have_approved() -> None:
    (told,) = between(WAITING, RUNNING, approval(planned_run(), vote(), vote("bob@corp", "Reject")))
    assert "alice@corp" in told.message


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (planned_run(Status.SUCCEEDED, Stage.FINISH), [("Succeeded", False)]),
        (planned_run(Status.REJECTED), [("Rejected", True)]),
        (planned_run(Status.EXPIRED), [("Expired", True)]),
        (planned_run(Status.CANCELED, Stage.EXECUTE), [("Canceled", False)]),
        (
            planned_run(
                Status.FAILED, Stage.FINISH, reason="TaskFailed", tasks=Tasks(total=2, failed=2, failures=FAILURES)
            ),
            [("TaskFailed", True), ("TaskFailed", True), ("Failed", True)],
        ),
        (planned_run(Status.RETRIES_EXCEEDED, Stage.FINISH, reason="InfrastructureFailed"), [("Failed", True)]),
        (planned_run(Status.RUNNING, Stage.FINISH), []),
    ],
)
def test_what_an_end_tells(started: Run, expected: list[tuple[str, bool]]) -> None:
    assert reasons(RUNNING, of(started)) == expected


@pytest.mark.parametrize(
    ("new", "alarm"),
    [
        (of(planned_run(), identity="a policy is missing"), "IdentityNotEnforced"),
        (of(planned_run(), approval=approval(planned_run(), vote(), problem="changed")), "ApprovalTampered"),
        (projection.refused(intent(), problem="spec.recipe: no", now=NOW), "InvalidSpec"),
        (projection.stalled(intent(status=RUNNING), store_id="s", now=NOW), "StoreBehind"),
    ],
)
def test_alarms_are_warnings(new: dict[str, Any], alarm: str) -> None:
    assert reasons(WAITING, new) == [(alarm, True)]


def test_the_same_transition_has_the_same_keys_and_names_whenever_it_is_told() -> None:
    def names(now: Any) -> list[str]:
        told = between(WAITING, RUNNING, approval(planned_run(), vote()))
        return [
            objects.event(
                intent(), reason=e.reason, message=e.message, kind="Normal", key=e.key, now=now, reporter="r"
            )["metadata"]["name"]
            for e in told
        ]

    assert names(NOW) == names(NOW.replace(hour=9)) and names(NOW)


def test_a_retry_that_fails_alike_is_told_again() -> None:
    failed = planned_run(Status.FAILED, Stage.FINISH, reason="TaskFailed")
    first = between(RUNNING, of(failed), None)
    second = between(RUNNING, of(replace(failed, retry_count=1)), None)
    assert {e.key for e in first}.isdisjoint(e.key for e in second)


@pytest.mark.parametrize("letter", ["m", "\u0436", "\u6f22"])
def test_long_names_and_messages_still_make_an_event(letter: str) -> None:
    """The API server counts the note's bytes."""
    body = objects.event(
        intent(name="n" * 200), reason="R", message=letter * 5000, kind="Warning", key="k", now=NOW, reporter="p" * 500
    )
    assert len(body["metadata"]["name"]) <= 253 and len(body["reportingInstance"]) <= 128
    assert 1020 <= len(body["note"].encode()) <= 1024
