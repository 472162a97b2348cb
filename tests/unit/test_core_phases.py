"""The life of a run: which event moves which status where, and what a retry means (DESIGN 3.3)."""

from __future__ import annotations

import pytest

from controller.core.phases import TERMINAL, TRANSITIONS, Event, Stage, Status, retry_event

EXPECTED: dict[Event, tuple[str, str, str | None]] = {
    Event.START_PLAN: ("queued repairing", "running", "plan"),
    Event.PLANNED: ("running", "waiting_input", "approve"),
    Event.PLAN_FAILED: ("queued running repairing", "failed", None),
    Event.APPROVE: ("waiting_input", "running", "execute"),
    Event.REJECT: ("waiting_input", "rejected", None),
    Event.EXPIRE: ("waiting_input", "expired", None),
    Event.CANCEL_IDLE: ("queued waiting_input", "canceled", None),
    Event.CANCEL_BUSY: ("running repairing", "canceling", None),
    Event.CLOSE_CANCELED: ("canceling", "canceled", None),
    Event.EXECUTE_REFUSED: ("running", "failed", None),
    Event.SUCCEED: ("running", "succeeded", None),
    Event.FAIL: ("running", "failed", None),
    Event.EXCEED: ("running", "retries_exceeded", None),
    Event.RETRY: ("failed retries_exceeded rejected expired", "repairing", "plan"),
    Event.RESUME: ("retries_exceeded", "running", "execute"),
}


@pytest.mark.parametrize("event", list(Event))
def test_every_event_moves_exactly_these_statuses(event: Event) -> None:
    sources, target, stage = EXPECTED[event]
    moved = TRANSITIONS[event]
    assert moved.sources == {Status(s) for s in sources.split()}
    assert (moved.target, moved.stage) == (Status(target), Stage(stage) if stage else None)


def test_only_a_retry_reopens_what_has_ended() -> None:
    reopening = {event for event, moved in TRANSITIONS.items() if moved.sources & TERMINAL}
    assert reopening == {Event.RETRY, Event.RESUME}


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.CANCELED])
def test_success_and_cancel_are_final(status: Status) -> None:
    assert all(status not in moved.sources for moved in TRANSITIONS.values())


def test_every_open_status_can_be_canceled() -> None:
    canceling = TRANSITIONS[Event.CANCEL_IDLE].sources | TRANSITIONS[Event.CANCEL_BUSY].sources
    assert canceling | {Status.CANCELING} == set(Status) - TERMINAL
    assert not TRANSITIONS[Event.CANCEL_IDLE].sources & TRANSITIONS[Event.CANCEL_BUSY].sources


def test_every_status_is_reached_and_every_open_one_is_left() -> None:
    assert {moved.target for moved in TRANSITIONS.values()} | {Status.QUEUED} == set(Status)
    left = frozenset[Status]().union(*(moved.sources for moved in TRANSITIONS.values()))
    assert left >= set(Status) - TERMINAL


def test_phases_are_the_statuses_in_camel_case() -> None:
    assert Status.WAITING_INPUT.phase == "WaitingInput"
    assert [s.phase for s in Status] == [
        "Queued",
        "Running",
        "WaitingInput",
        "Canceling",
        "Repairing",
        "Succeeded",
        "Failed",
        "RetriesExceeded",
        "Canceled",
        "Rejected",
        "Expired",
    ]


@pytest.mark.parametrize(
    ("status", "stage", "event"),
    [
        (Status.FAILED, Stage.PLAN, Event.RETRY),  # before a plan was made
        (Status.RETRIES_EXCEEDED, Stage.EXECUTE, Event.RESUME),  # after approval, infrastructure
        (Status.RETRIES_EXCEEDED, Stage.FINISH, Event.RESUME),
        (Status.RETRIES_EXCEEDED, Stage.PLAN, Event.RETRY),
        (Status.FAILED, Stage.FINISH, Event.RETRY),  # a red test
        (Status.FAILED, Stage.EXECUTE, Event.RETRY),  # the stored bytes were refused
        (Status.REJECTED, Stage.APPROVE, Event.RETRY),
        (Status.EXPIRED, Stage.APPROVE, Event.RETRY),
        (Status.SUCCEEDED, Stage.FINISH, None),
        (Status.CANCELED, Stage.EXECUTE, None),
        (Status.CANCELED, Stage.APPROVE, None),
    ],
)
def test_what_a_retry_does(status: Status, stage: Stage, event: Event | None) -> None:
    assert retry_event(status, stage) is event


@pytest.mark.parametrize("status", sorted(set(Status) - TERMINAL))
@pytest.mark.parametrize("stage", list(Stage))
def test_a_retry_does_nothing_to_an_open_run(status: Status, stage: Stage) -> None:
    assert retry_event(status, stage) is None


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("stage", list(Stage))
def test_a_retry_is_always_a_legal_transition(status: Status, stage: Stage) -> None:
    event = retry_event(status, stage)
    assert event is None or status in TRANSITIONS[event].sources
