"""The life of a run as data: statuses, the events that move it, and from where each may do so.

Every transition is one `UPDATE app.runs … WHERE status IN (from)`, so whatever races, the first commit wins (law 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """`app.runs.status`. `phase` in the Intent's status is the same word in CamelCase."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_INPUT = "waiting_input"
    CANCELING = "canceling"
    REPAIRING = "repairing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIES_EXCEEDED = "retries_exceeded"
    CANCELED = "canceled"
    REJECTED = "rejected"
    EXPIRED = "expired"

    @property
    def phase(self) -> str:
        """The word that people see."""
        return "".join(part.capitalize() for part in self.value.split("_"))

    @property
    def terminal(self) -> bool:
        """Nothing runs any more. A retry may reopen some of these, a cancel none."""
        return self in TERMINAL


class Stage(StrEnum):
    """What a running run is busy with; where it stopped, once it is terminal."""

    PLAN = "plan"
    APPROVE = "approve"
    EXECUTE = "execute"
    FINISH = "finish"


TERMINAL = frozenset(
    {
        Status.SUCCEEDED,
        Status.FAILED,
        Status.RETRIES_EXCEEDED,
        Status.CANCELED,
        Status.REJECTED,
        Status.EXPIRED,
    }
)


class Event(StrEnum):
    """What can happen to a run."""

    START_PLAN = "start_plan"
    PLANNED = "planned"
    PLAN_FAILED = "plan_failed"
    APPROVE = "approve"
    REJECT = "reject"
    EXPIRE = "expire"
    CANCEL_IDLE = "cancel_idle"
    CANCEL_BUSY = "cancel_busy"
    CLOSE_CANCELED = "close_canceled"
    EXECUTE_REFUSED = "execute_refused"
    SUCCEED = "succeed"
    FAIL = "fail"
    EXCEED = "exceed"
    RETRY = "retry"
    RESUME = "resume"


@dataclass(frozen=True)
class Transition:
    """From any of these statuses to that one, and the stage that the run is in afterwards (None leaves it)."""

    sources: frozenset[Status]
    target: Status
    stage: Stage | None = None


def _from(*sources: Status) -> frozenset[Status]:
    return frozenset(sources)


TRANSITIONS: dict[Event, Transition] = {
    Event.START_PLAN: Transition(_from(Status.QUEUED, Status.REPAIRING), Status.RUNNING, Stage.PLAN),
    Event.PLANNED: Transition(_from(Status.RUNNING), Status.WAITING_INPUT, Stage.APPROVE),
    Event.PLAN_FAILED: Transition(_from(Status.QUEUED, Status.RUNNING, Status.REPAIRING), Status.FAILED),
    Event.APPROVE: Transition(_from(Status.WAITING_INPUT), Status.RUNNING, Stage.EXECUTE),
    Event.REJECT: Transition(_from(Status.WAITING_INPUT), Status.REJECTED),
    Event.EXPIRE: Transition(_from(Status.WAITING_INPUT), Status.EXPIRED),
    Event.CANCEL_IDLE: Transition(_from(Status.QUEUED, Status.WAITING_INPUT), Status.CANCELED),
    Event.CANCEL_BUSY: Transition(_from(Status.RUNNING, Status.REPAIRING), Status.CANCELING),
    Event.CLOSE_CANCELED: Transition(_from(Status.CANCELING), Status.CANCELED),
    Event.EXECUTE_REFUSED: Transition(_from(Status.RUNNING), Status.FAILED),
    Event.SUCCEED: Transition(_from(Status.RUNNING), Status.SUCCEEDED),
    Event.FAIL: Transition(_from(Status.RUNNING), Status.FAILED),
    Event.EXCEED: Transition(_from(Status.RUNNING), Status.RETRIES_EXCEEDED),
    Event.RETRY: Transition(
        _from(Status.FAILED, Status.RETRIES_EXCEEDED, Status.REJECTED, Status.EXPIRED), Status.REPAIRING, Stage.PLAN
    ),
    Event.RESUME: Transition(_from(Status.RETRIES_EXCEEDED), Status.RUNNING, Stage.EXECUTE),
}


def retry_event(status: Status, stage: Stage) -> Event | None:
    """What `spec.retry + 1` does to a run that ended so (DESIGN 3.3); None when it does nothing."""
    if status is Status.RETRIES_EXCEEDED and stage in (Stage.EXECUTE, Stage.FINISH):
        return Event.RESUME
    return Event.RETRY if status in TRANSITIONS[Event.RETRY].sources else None
