"""The reconcile decision: a pure function of what is, to what to do next. Applying its actions leads to an empty plan.

Order matters in one place only: the Intent's status carries the store id before the first enqueue (law 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from controller.core import status as projection
from controller.core.phases import TERMINAL, Stage, Status, retry_event
from controller.core.run import Approval, Intent, Run, Vote
from controller.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class AddFinalizer:
    """Keep the Intent until its run has ended."""


@dataclass(frozen=True, kw_only=True)
class RemoveFinalizer:
    """Nothing runs: let the Intent go whenever somebody deletes it."""


@dataclass(frozen=True, kw_only=True)
class WriteStatus:
    """PATCH Intent.status to this."""

    status: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StartRun:
    """Rows and the first workflow, in one transaction."""

    settings: Settings


@dataclass(frozen=True, kw_only=True)
class CreateApproval:
    """Create the PlanApproval and record its UID. `replaces` is the recorded one that is gone, if any."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Consume:
    """A quorum stands: start the execution, once."""

    votes: tuple[Vote, ...]


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One Reject ends the run."""

    votes: tuple[Vote, ...]


@dataclass(frozen=True, kw_only=True)
class Expire:
    """The approval's deadline has passed; the database's clock has the last word."""


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Stop: `spec.cancel`, or the Intent is being deleted."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Retry:
    """`spec.retry` went up."""

    count: int


@dataclass(frozen=True, kw_only=True)
class Adjust:
    """Priority or partition changed: both may, after the start (DESIGN 3.1)."""

    partition: str
    priority: int


@dataclass(frozen=True, kw_only=True)
class WriteApprovalStatus:
    """PATCH PlanApproval.status to this."""

    name: str
    status: Mapping[str, Any]


Action = (
    AddFinalizer
    | RemoveFinalizer
    | WriteStatus
    | StartRun
    | CreateApproval
    | Consume
    | Reject
    | Expire
    | Cancel
    | Retry
    | Adjust
    | WriteApprovalStatus
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that the decision may look at. `settings` is None when `problem` says why the spec is refused."""

    intent: Intent
    run: Run | None
    approval: Approval | None
    settings: Settings | None
    problem: str | None
    store_id: str
    identity_problem: str | None
    now: datetime


def decide(world: World) -> tuple[Action, ...]:
    """What to do now, in order. At most one action changes the database."""
    if world.intent.deleting:
        return _deleting(world)
    consumed = _consumed_before(world)
    if consumed or _store_behind(world):
        return _write(
            world, projection.stalled(world.intent, store_id=world.store_id, now=world.now, consumed=consumed)
        )
    if world.run is None:
        return _new(world)
    return _started(world, world.run)


def _store_behind(world: World) -> bool:
    """A status without its row, or from another store, is somebody else's past: nothing starts until a person says so."""
    known = world.intent.status.get("storeId")
    if not known or world.intent.acknowledged_store == world.store_id:
        return False
    started = bool(world.intent.status.get("runId"))
    return known != world.store_id or (world.run is None and started)


def _consumed_before(world: World) -> bool:
    """This plan waits, and its approval was used already: the database is an older copy. Never consumed again (law 10)."""
    run, approval = world.run, world.approval
    if run is None or approval is None or run.status is not Status.WAITING_INPUT or world.intent.spec.get("cancel"):
        return False
    return approval.uid == run.approval_uid and "consumedBy" in approval.status


def _deleting(world: World) -> tuple[Action, ...]:
    run = world.run
    if run is not None and not run.status.terminal:
        idle = run.status is Status.CANCELING
        return (() if idle else (Cancel(reason="Deleted"),)) + _project(world, run)
    return (RemoveFinalizer(),) if world.intent.has_finalizer else ()


def _new(world: World) -> tuple[Action, ...]:
    intent = world.intent
    if _history(intent):
        kept = _write(world, projection.history(intent, store_id=world.store_id))
        return (*kept, RemoveFinalizer()) if intent.has_finalizer else kept
    if world.settings is None:
        return _write(world, projection.refused(intent, problem=world.problem or "refused", now=world.now))
    if intent.spec.get("cancel"):
        return _write(world, projection.held(intent, reason="Canceled", store_id=world.store_id, now=world.now))
    if intent.spec.get("suspend"):
        return _write(world, projection.held(intent, reason="Suspended", store_id=world.store_id, now=world.now))
    first: tuple[Action, ...] = () if intent.has_finalizer else (AddFinalizer(),)
    queued = projection.held(intent, reason="Queued", store_id=world.store_id, now=world.now)
    return (*first, *_write(world, queued), StartRun(settings=world.settings))


def _history(intent: Intent) -> bool:
    """It ended in another store, whose rows are gone: only a retry that would have reopened it there begins it here (law 10)."""
    ended = next((s for s in TERMINAL if s.phase == intent.status.get("phase")), None)
    if ended is None:
        return False
    again = int(intent.spec.get("retry", 0)) > int(intent.status.get("observedRetry", 0))
    return intent.spec.get("cancel", False) or not again or retry_event(ended, Stage.PLAN) is None


def _started(world: World, run: Run) -> tuple[Action, ...]:
    step = _next_step(world, run)
    actions: list[Action] = [step] if step is not None else []
    if isinstance(step, AddFinalizer | CreateApproval | Retry) or step is None:
        actions += _project(world, run)
    if run.status.terminal and step is None and world.intent.has_finalizer:
        actions.append(RemoveFinalizer())
    return tuple(actions)


def _next_step(world: World, run: Run) -> Action | None:
    intent = world.intent
    if intent.spec.get("cancel") and not run.status.terminal:
        return None if run.status is Status.CANCELING else Cancel(reason="Canceled")
    wanted = int(intent.spec.get("retry", 0))
    if run.status.terminal and wanted > run.retry_count and not intent.spec.get("cancel"):
        return None if retry_event(run.status, run.stage) is None else _reopen(intent, wanted)
    if (adjust := _adjust(world, run)) is not None:
        return adjust
    if run.status is Status.WAITING_INPUT:
        return _waiting(world, run)
    if not run.status.terminal and not intent.has_finalizer:
        return AddFinalizer()
    return None


def _adjust(world: World, run: Run) -> Action | None:
    """The partition holds from the first task on; the priority counts for whatever is enqueued from now on."""
    wanted, now = world.settings, run.settings
    if wanted is None or run.status.terminal:
        return None
    partition = wanted.partition if run.stage in (Stage.PLAN, Stage.APPROVE) else now.partition
    if (partition, wanted.priority) == (now.partition, now.priority):
        return None
    return Adjust(partition=partition, priority=wanted.priority)


def _reopen(intent: Intent, wanted: int) -> Action:
    return Retry(count=wanted) if intent.has_finalizer else AddFinalizer()


def _waiting(world: World, run: Run) -> Action | None:
    if run.approval_deadline is not None and world.now >= run.approval_deadline:
        return Expire()
    approval = world.approval
    if run.approval_uid is None or approval is None or approval.uid != run.approval_uid:
        return CreateApproval(name=run.approval_name or "")
    if approval.problem is not None:
        return None
    rejections = tuple(v for v in approval.votes if v.verdict == "Reject")
    if rejections:
        return Reject(votes=rejections)
    counted = countable(approval.votes, run)
    if len(counted) >= run.settings.required and world.identity_problem is None:
        return Consume(votes=counted)
    return None


def countable(votes: tuple[Vote, ...], run: Run) -> tuple[Vote, ...]:
    """Approvals that count towards the quorum: one per person, the requester's only where the policy lets them."""
    if not run.settings.allow_requester and not run.requested_by:
        return ()  # nobody knows whom to exclude
    seen: dict[str, Vote] = {}
    for vote in votes:
        if vote.verdict == "Approve" and (run.settings.allow_requester or vote.approver != run.requested_by):
            seen.setdefault(vote.approver, vote)
    return tuple(seen.values())


def _project(world: World, run: Run) -> tuple[Action, ...]:
    wanted = projection.of_run(
        world.intent,
        run,
        approval=world.approval,
        store_id=world.store_id,
        identity=world.identity_problem,
        now=world.now,
    )
    actions = list(_write(world, wanted))
    if world.approval is not None and world.approval.uid == run.approval_uid:
        seen = projection.of_approval(world.approval, run, identity=world.identity_problem, now=world.now)
        if seen != world.approval.status:
            actions.append(WriteApprovalStatus(name=world.approval.name, status=seen))
    return tuple(actions)


def _write(world: World, wanted: Mapping[str, Any]) -> tuple[Action, ...]:
    return () if wanted == world.intent.status else (WriteStatus(status=wanted),)


def busy(run: Run) -> bool:
    """True while tasks may be ending without the run's row changing: progress is then looked up, not notified."""
    return run.status in (Status.RUNNING, Status.CANCELING) and run.stage is Stage.EXECUTE
