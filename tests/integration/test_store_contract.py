"""One contract for RunStore, kept by the real PostgreSQL and by the twin in memory; then what only PostgreSQL has: WorkStore.

Every test has Intents of its own, so the database is never emptied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import psycopg
import pytest

from controller.core import digest as digests
from controller.core.contract import ErrCode
from controller.core.errors import DigestMismatch, Drift, SisuError
from controller.core.model import Artifact, Chunk, TurnReply, TurnRequest
from controller.core.phases import Event, Stage, Status
from controller.core.run import Intent, Run, Vote
from controller.core.settings import Settings
from controller.core.work import Attempt, Context, Execution
from controller.db.lease import PgLeaseStore
from controller.db.ledger import PgTurnLedger
from controller.db.pool import Pool, open_pool
from controller.db.runs import PgRunStore
from controller.db.work import PgWorkStore
from controller.ports import RunStore
from controller.workflows.compile import TurnLedger
from tests.support.builders import DIFF, execution, intent, outcome, plan, settings, tasks, vote
from tests.support.memory_store import MemoryRunStore
from tests.support.scripted_agent import MemoryLedger

EXECUTOR = "executor-1"
ROUNDS = 12  # of each race


class Stage_(Protocol):
    """A RunStore, and hands to move runs as the workflows and the clock do."""

    @property
    def store(self) -> RunStore: ...
    def plan_ready(self, uid: str) -> None: ...
    def begin_plan(self, uid: str) -> None: ...
    def plan_failed(self, uid: str) -> None: ...
    def begin_tasks(self, uid: str, count: int, *, running: int) -> None: ...
    def end_task(self, uid: str, code: ErrCode) -> None: ...
    def finish(self, uid: str, event: Event, reason: str) -> None: ...
    def pass_deadline(self, uid: str) -> None: ...
    def workflows(self, uid: str) -> dict[str, str]:
        """Enqueued workflows of this Intent: id without the uid → name."""
        ...

    def decisions(self, uid: str) -> list[tuple[str, str, str]]:
        """(approver, verdict, consumed_by) as recorded."""
        ...


class InMemory:
    """The twin, on a clock that the test moves."""

    def __init__(self) -> None:
        self.late = timedelta(0)
        self.memory = MemoryRunStore(clock=lambda: datetime.now(UTC) + self.late)

    @property
    def store(self) -> RunStore:
        return self.memory

    def plan_ready(self, uid: str) -> None:
        self.memory.plan_ready(uid, diff=DIFF)

    def begin_plan(self, uid: str) -> None:
        assert self.memory.begin_plan(uid)

    def plan_failed(self, uid: str) -> None:
        self.memory.plan_failed(uid)

    def begin_tasks(self, uid: str, count: int, *, running: int) -> None:
        self.memory.begin_tasks(uid, count, running=running)

    def end_task(self, uid: str, code: ErrCode) -> None:
        self.memory.end_task(uid, code)

    def finish(self, uid: str, event: Event, reason: str) -> None:
        self.memory.finish(uid, event, reason=reason)

    def pass_deadline(self, uid: str) -> None:
        row = self.memory.runs[uid]
        self.memory.runs[uid] = replace(row, approval_deadline=self.memory.clock() - timedelta(seconds=1))

    def workflows(self, uid: str) -> dict[str, str]:
        found = self.memory.enqueued.items()
        return {id_.removeprefix(uid): name for id_, (name, _) in found if id_.startswith(uid)}

    def decisions(self, uid: str) -> list[tuple[str, str, str]]:
        run_id = digests.run_id(uid)
        return [(d.approver, d.verdict, d.consumed_by) for d in self.memory.decided if d.run_id == run_id]


class InPostgres:
    """The real thing, with the worker's half and a lease."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.runs = PgRunStore(pool, app_version="v1")
        self.work = PgWorkStore(pool, app_version="v1", executor=EXECUTOR)
        self.leases = PgLeaseStore(pool, app_version="v1")
        self.leases.take(EXECUTOR, ttl=600)
        self.attempts: dict[str, list[tuple[str, Attempt]]] = {}

    @property
    def store(self) -> RunStore:
        return self.runs

    def ctx(self, uid: str) -> Context:
        found = self.work.context(uid)
        assert found is not None
        return found

    def begin_plan(self, uid: str) -> None:
        assert self.work.start_plan(self.ctx(uid))

    def plan_ready(self, uid: str) -> None:
        if self.ctx(uid).status is not Status.RUNNING:
            self.begin_plan(uid)
        ctx, shown = self.ctx(uid), plan()
        sha = self.work.put_blob(DIFF)
        record = digests.execution_record(
            goal=ctx.goal, tasks=shown["tasks"], patch_sha256=sha, execution=execution(generation=ctx.plan_no)
        )
        digest = digests.plan_digest(record)
        name = digests.approval_name(ctx.intent_name, digest)
        assert self.work.planned(ctx, plan=shown, record=record, digest=digest, patch_sha256=sha, approval_name=name)

    def plan_failed(self, uid: str) -> None:
        assert self.work.fail_plan(self.ctx(uid), reason="PlanFailed", error="no plan")

    def execution(self, uid: str, count: int, depends: Mapping[int, Sequence[int]] | None = None) -> Execution:
        ctx = self.ctx(uid)
        made = tasks(ctx.run_id, count, generation=ctx.plan_no, depends=depends)
        return Execution(run_id=ctx.run_id, execution_no=ctx.execution_no, generation=ctx.plan_no, tasks=made)

    def begin_tasks(self, uid: str, count: int, *, running: int) -> None:
        assert self.work.begin_execution(self.execution(uid, count))
        waiting = self.rows(
            "SELECT workflow_id FROM app.sbx_runs WHERE run_id = %s AND status = 'queued' AND workflow_id IS NOT NULL"
            " ORDER BY idx LIMIT %s",
            digests.run_id(uid),
            running,
        )
        for (workflow,) in waiting:
            attempt = self.work.begin_attempt(digests.run_id(uid), workflow)
            assert attempt.fence is not None
            self.attempts.setdefault(uid, []).append((workflow, attempt))

    def end_task(self, uid: str, code: ErrCode) -> None:
        workflow, attempt = self.attempts[uid].pop(0)
        done = outcome(code, key=attempt.task_key)
        assert self.work.record_outcome(attempt, done, workflow_id=workflow, carry=False) is not None

    def finish(self, uid: str, event: Event, reason: str) -> None:
        ctx = self.ctx(uid)
        assert self.work.finish(
            ctx, execution_no=ctx.execution_no, event=event.value, reason=reason, error=None, result={"patchRef": "p"}
        )

    def pass_deadline(self, uid: str) -> None:
        self.rows("UPDATE app.runs SET approval_deadline = clock_timestamp() WHERE intent_id = %s RETURNING 1", uid)

    def workflows(self, uid: str) -> dict[str, str]:
        found = self.rows(
            "SELECT workflow_uuid, name FROM dbos.workflow_status WHERE starts_with(workflow_uuid, %s)", uid
        )
        return {id_.removeprefix(uid): name for id_, name in found}

    def decisions(self, uid: str) -> list[tuple[str, str, str]]:
        return self.rows(
            "SELECT approver, verdict, consumed_by FROM app.plan_approvals WHERE run_id = %s ORDER BY recorded_at",
            digests.run_id(uid),
        )

    def rows(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        with self.pool.connection() as c:
            return [tuple(r.values()) for r in c.execute(statement.encode(), params).fetchall()]

    def one(self, statement: str, *params: Any) -> Any:
        return self.rows(statement, *params)[0][0]


@pytest.fixture(scope="module")
def pool(database: str) -> Iterator[Pool]:
    opened = open_pool(database, size=12, name="test")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pg(pool: Pool) -> InPostgres:
    return InPostgres(pool)


@pytest.fixture(params=["memory", "postgres"])
def world(request: pytest.FixtureRequest) -> Stage_:
    return InMemory() if request.param == "memory" else request.getfixturevalue("pg")


# ------------------------------------------------------------------ getting a run somewhere


def fresh(spec: dict[str, Any] | None = None, **changes: Any) -> Intent:
    return intent(spec, uid=str(uuid4()), **changes)


def now(world: Stage_, of: Intent | str) -> Run:
    found = world.store.run(of if isinstance(of, str) else of.uid)
    assert found is not None
    return found


def started(world: Stage_, *, with_: Settings | None = None, spec: dict[str, Any] | None = None) -> Run:
    asked = fresh(spec)
    world.store.start(asked, with_ or settings(), requested_by="carol@corp")
    return now(world, asked)


def waiting(world: Stage_, *, with_: Settings | None = None) -> Run:
    uid = started(world, with_=with_).intent_id
    world.plan_ready(uid)
    run = now(world, uid)
    assert world.store.record_approval_object(run, name=str(run.approval_name), uid=f"object-{uid}")
    return now(world, uid)


def executing(world: Stage_, *, count: int = 1, running: int = 1, with_: Settings | None = None) -> Run:
    run = waiting(world, with_=with_)
    assert world.store.approve(run, [vote()])
    if count:
        world.begin_tasks(run.intent_id, count, running=running)
    return now(world, run.intent_id)


def finished(world: Stage_, event: Event, code: ErrCode, reason: str, *, with_: Settings | None = None) -> Run:
    run = executing(world, with_=with_)
    world.end_task(run.intent_id, code)
    world.finish(run.intent_id, event, reason)
    return now(world, run.intent_id)


def infrastructure_failed(world: Stage_, *, with_: Settings | None = None) -> Run:
    return finished(world, Event.EXCEED, ErrCode.LOST, "InfrastructureFailed", with_=with_)


def plan_failed(world: Stage_) -> Run:
    uid = started(world).intent_id
    world.begin_plan(uid)
    world.plan_failed(uid)
    return now(world, uid)


def rejected(world: Stage_) -> Run:
    run = waiting(world)
    assert world.store.reject(run, [vote(verdict="Reject", reason="not like this")])
    return now(world, run.intent_id)


def expired(world: Stage_) -> Run:
    run = waiting(world)
    world.pass_deadline(run.intent_id)
    assert world.store.expire(run)
    return now(world, run.intent_id)


def canceled(world: Stage_) -> Run:
    run = waiting(world)
    assert world.store.cancel(run, reason="Canceled")
    return now(world, run.intent_id)


def at(run: Run) -> tuple[Status, Stage]:
    return run.status, run.stage


def race(*calls: Callable[[], Any]) -> list[bool]:
    """All at once, each in a thread of its own; who won."""
    barrier = threading.Barrier(len(calls))
    won: list[Any] = [False] * len(calls)

    def run(index: int) -> None:
        barrier.wait(10)
        try:
            won[index] = calls[index]()
        except Exception as e:  # noqa: BLE001 - raised again below, in the test's own thread
            won[index] = e

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for one in won:
        if isinstance(one, Exception):
            raise one
    return [bool(one) for one in won]


# ------------------------------------------------------------------ the contract


def test_the_store_has_an_id_that_stays(world: Stage_) -> None:
    assert world.store.store_id() == world.store.store_id() != ""


def test_an_intent_that_never_started_has_no_run(world: Stage_) -> None:
    assert world.store.run(str(uuid4())) is None


def test_starting_twice_makes_one_run_and_one_workflow(world: Stage_) -> None:
    asked = fresh({"retry": 3})
    world.store.start(asked, settings(), requested_by="carol@corp")
    first = now(world, asked)
    world.store.start(asked, settings(priority=-5), requested_by="mallory@corp")
    assert now(world, asked) == first
    assert at(first) == (Status.QUEUED, Stage.PLAN)
    assert (first.retry_count, first.requested_by, first.settings) == (3, "carol@corp", settings())
    assert first.run_id == digests.run_id(asked.uid)
    assert world.workflows(asked.uid) == {"": "RunIntentWF"}


def test_a_waiting_run_holds_its_plan_and_its_patch(world: Stage_) -> None:
    run = waiting(world)
    assert at(run) == (Status.WAITING_INPUT, Stage.APPROVE)
    assert run.record is not None and digests.plan_digest(run.record) == run.digest
    assert world.store.patch(run) == DIFF
    assert run.approval_deadline is not None and run.approval_deadline > datetime.now(UTC)


def test_the_deadline_is_the_second_that_people_are_shown(pg: InPostgres) -> None:
    run = waiting(pg)
    assert run.approval_deadline is not None and run.approval_deadline.microsecond == 0


def test_an_altered_or_missing_patch_is_refused(world: Stage_) -> None:
    run = replace(waiting(world), patch_sha256="0" * 64)
    with pytest.raises(DigestMismatch):
        world.store.patch(run)


def test_approving_starts_one_execution_and_records_the_votes(world: Stage_) -> None:
    run = waiting(world)
    assert world.store.approve(run, [vote(), vote("bob@corp")])
    after = now(world, run.intent_id)
    assert at(after) == (Status.RUNNING, Stage.EXECUTE) and after.execution_no == 1
    assert world.workflows(run.intent_id)[":execute:1"] == "ExecutePlanWF"
    consumed = f"{run.intent_id}:execute:1"
    assert world.decisions(run.intent_id) == [("alice@corp", "Approve", consumed), ("bob@corp", "Approve", consumed)]


def test_approving_twice_starts_nothing_more(world: Stage_) -> None:
    run = waiting(world)
    assert world.store.approve(run, [vote()])
    assert not world.store.approve(run, [vote("bob@corp")])
    assert now(world, run.intent_id).execution_no == 1
    assert [d[0] for d in world.decisions(run.intent_id)] == ["alice@corp"]


@pytest.mark.parametrize(
    "change", [{"approval_uid": "another"}, {"approval_uid": None}, {"digest": "sha256:" + "0" * 64}]
)
def test_votes_on_another_object_or_plan_start_nothing(world: Stage_, change: dict[str, Any]) -> None:
    run = waiting(world)
    assert not world.store.approve(replace(run, **change), [vote()])
    assert now(world, run.intent_id) == run and world.decisions(run.intent_id) == []
    assert set(world.workflows(run.intent_id)) == {""}


def test_without_a_recorded_object_nothing_can_be_approved(world: Stage_) -> None:
    uid = started(world).intent_id
    world.plan_ready(uid)
    assert not world.store.approve(now(world, uid), [vote()])


def test_the_object_of_another_plan_is_not_recorded(world: Stage_) -> None:
    run = waiting(world)
    assert not world.store.record_approval_object(replace(run, digest="sha256:0"), name="n", uid="u")
    assert world.store.approve(run, [vote()])
    assert not world.store.record_approval_object(run, name="n", uid="u")


def test_after_the_deadline_on_the_databases_clock_nothing_can_be_approved(world: Stage_) -> None:
    run = waiting(world)
    world.pass_deadline(run.intent_id)
    assert run.intent_id in world.store.overdue()
    assert not world.store.approve(run, [vote()])
    assert world.store.expire(run) and not world.store.expire(run)
    assert now(world, run.intent_id).status is Status.EXPIRED
    assert run.intent_id not in world.store.overdue()


def test_before_the_deadline_nothing_expires(world: Stage_) -> None:
    run = waiting(world)
    assert not world.store.expire(run) and now(world, run.intent_id) == run
    assert run.intent_id not in world.store.overdue()


def test_a_rejection_says_by_whom_and_why(world: Stage_) -> None:
    run = rejected(world)
    assert run.status is Status.REJECTED and run.reason == "Rejected"
    assert run.error == "rejected by alice@corp: not like this"
    assert world.decisions(run.intent_id) == [("alice@corp", "Reject", "reject")]
    assert not world.store.approve(run, [vote()])


def test_a_rejection_of_a_plan_that_was_replaced_does_not_end_its_successor(world: Stage_) -> None:
    """As when a controller stands still between reading the votes and writing them down."""
    old = waiting(world)
    assert world.store.reject(old, [vote(verdict="Reject")])
    assert world.store.retry(now(world, old.intent_id), count=1)
    world.plan_ready(old.intent_id)
    new = now(world, old.intent_id)
    assert world.store.record_approval_object(new, name=str(new.approval_name), uid=f"object-2-{old.intent_id}")
    assert not world.store.reject(old, [vote("dave@corp", verdict="Reject")])
    assert now(world, old.intent_id).status is Status.WAITING_INPUT
    assert [who for who, _, _ in world.decisions(old.intent_id)] == [vote().approver], (
        "nobody said anything about the new plan"
    )


def test_two_controllers_that_approve_at_once_start_one_execution(world: Stage_) -> None:
    for _ in range(ROUNDS):
        run = waiting(world)
        approve = partial(world.store.approve, run, [vote()])
        won = race(approve, approve)
        assert sorted(won) == [False, True]
        assert now(world, run.intent_id).execution_no == 1
        assert set(world.workflows(run.intent_id)) == {"", ":execute:1"}


def test_of_approve_reject_and_cancel_at_once_the_first_commit_wins(world: Stage_) -> None:
    for _ in range(ROUNDS):
        run = waiting(world)
        approved, denied, stopped = race(
            partial(world.store.approve, run, [vote()]),
            partial(world.store.reject, run, [vote("bob@corp", "Reject")]),
            partial(world.store.cancel, run, reason="Canceled"),
        )
        after = now(world, run.intent_id)
        assert not (approved and denied)
        assert (":execute:1" in world.workflows(run.intent_id)) == approved
        # A cancel may come after an approval, as it may come after anything that is open.
        expected = Status.CANCELED if stopped else Status.REJECTED if denied else Status.RUNNING
        assert after.status is expected
        consumed = {d[2].rpartition(":")[0] or d[2] for d in world.decisions(run.intent_id)}
        assert consumed <= ({f"{run.intent_id}:execute"} if approved else {"reject"} if denied else set())


def test_of_reject_expire_and_cancel_at_once_exactly_one_wins(world: Stage_) -> None:
    for _ in range(ROUNDS):
        run = waiting(world)
        world.pass_deadline(run.intent_id)
        calls: Sequence[Callable[[], Any]] = [
            partial(world.store.reject, run, [vote(verdict="Reject")]),
            partial(world.store.expire, run),
            partial(world.store.cancel, run, reason="Canceled"),
            partial(world.store.approve, run, [vote()]),
        ]
        won = race(*calls)
        assert sum(won) == 1 and not won[3]
        expected = dict(zip(range(3), (Status.REJECTED, Status.EXPIRED, Status.CANCELED), strict=True))
        assert now(world, run.intent_id).status is expected[won.index(True)]


# ------------------------------------------------------------------ cancel


def test_a_cancel_ends_an_idle_run_at_once(world: Stage_) -> None:
    for run in (started(world), waiting(world)):
        assert world.store.cancel(run, reason="Deleted")
        after = now(world, run.intent_id)
        assert (after.status, after.reason) == (Status.CANCELED, "Deleted")
        assert not world.store.cancel(after, reason="Canceled")


def test_a_cancel_while_planning_waits_for_the_workflow(world: Stage_) -> None:
    uid = started(world).intent_id
    world.begin_plan(uid)
    assert world.store.cancel(now(world, uid), reason="Canceled")
    assert now(world, uid).status is Status.CANCELING


def test_a_cancel_waits_for_running_tasks_and_takes_the_queued_ones_off(world: Stage_) -> None:
    run = executing(world, count=3, running=1)
    assert world.store.cancel(run, reason="Canceled")
    after = now(world, run.intent_id)
    assert after.status is Status.CANCELING
    assert (after.tasks.running, after.tasks.queued, after.tasks.failed) == (1, 0, 2)
    assert {f.err_code for f in after.tasks.failures} == {"CANCELED"}


@pytest.mark.parametrize("count", [0, 2], ids=["before its tasks are there", "before one of them runs"])
def test_a_cancel_of_an_execution_that_runs_nothing_ends_it_at_once(world: Stage_, count: int) -> None:
    run = executing(world, count=count, running=0)
    assert world.store.cancel(run, reason="Canceled")
    after = now(world, run.intent_id)
    assert (after.status, after.reason) == (Status.CANCELED, "Canceled")


def test_a_cancel_decides_on_the_run_as_it_is_and_not_as_it_was_read(world: Stage_) -> None:
    uid = started(world).intent_id
    world.begin_plan(uid)
    stale = now(world, uid)
    world.plan_ready(uid)
    run = now(world, uid)
    assert world.store.record_approval_object(run, name=str(run.approval_name), uid="object")
    assert world.store.approve(now(world, uid), [vote()])
    world.begin_tasks(uid, 2, running=0)
    assert world.store.cancel(stale, reason="Canceled")
    assert now(world, uid).status is Status.CANCELED


@pytest.mark.parametrize("make", [plan_failed, rejected, expired, canceled, infrastructure_failed])
def test_what_has_ended_is_not_decided_again(world: Stage_, make: Callable[[Stage_], Run]) -> None:
    run = make(world)
    assert not world.store.cancel(run, reason="Canceled")
    assert not world.store.approve(run, [vote()])
    assert not world.store.reject(run, [vote(verdict="Reject")])
    assert not world.store.expire(run)
    assert now(world, run.intent_id) == run
    assert run.finished_at is not None
    assert run.intent_id not in {r["intent_id"] for r in world.store.open_runs()}


# ------------------------------------------------------------------ retry (DESIGN 3.3)


def red(world: Stage_) -> Run:
    return finished(world, Event.FAIL, ErrCode.CMD_NONZERO, "TaskFailed")


@pytest.mark.parametrize("make", [plan_failed, red, rejected, expired])
def test_a_retry_after_no_plan_a_red_test_a_rejection_or_expiry_makes_a_new_plan(
    world: Stage_, make: Callable[[Stage_], Run]
) -> None:
    run = make(world)
    assert world.store.retry(run, count=1)
    after = now(world, run.intent_id)
    assert at(after) == (Status.REPAIRING, Stage.PLAN)
    assert (after.plan_no, after.retry_count, after.finished_at) == (2, 1, None)
    assert (after.digest, after.plan, after.approval_uid, after.tasks.total) == (None, None, None, 0)
    assert world.workflows(run.intent_id)[":plan:2"] == "RunIntentWF"
    assert not world.store.retry(run, count=1), "the same count is the same retry"
    world.plan_ready(run.intent_id)
    again = now(world, run.intent_id)
    assert again.status is Status.WAITING_INPUT and again.digest not in (None, run.digest)


def test_a_retry_after_infrastructure_failed_runs_again_what_failed_under_the_same_approval(world: Stage_) -> None:
    run = executing(world, count=2, running=2)
    world.end_task(run.intent_id, ErrCode.NONE)
    world.end_task(run.intent_id, ErrCode.LOST)
    world.finish(run.intent_id, Event.EXCEED, "InfrastructureFailed")
    run = now(world, run.intent_id)
    assert world.store.retry(run, count=1)
    after = now(world, run.intent_id)
    assert at(after) == (Status.RUNNING, Stage.EXECUTE)
    assert (after.execution_no, after.plan_no, after.digest) == (2, 1, run.digest)
    assert world.workflows(run.intent_id)[":execute:2"] == "ExecutePlanWF"
    world.begin_tasks(run.intent_id, 2, running=1)
    again = now(world, run.intent_id).tasks
    assert (again.succeeded, again.running, again.failed) == (1, 1, 0), "what succeeded is kept"
    world.end_task(run.intent_id, ErrCode.NONE)
    world.finish(run.intent_id, Event.SUCCEED, "Succeeded")
    done = now(world, run.intent_id)
    assert done.status is Status.SUCCEEDED and done.tasks.succeeded == 2


def test_when_the_executions_are_used_up_a_retry_is_noted_and_does_nothing(world: Stage_) -> None:
    run = infrastructure_failed(world, with_=settings(max_executions=1))
    assert not world.store.retry(run, count=1)
    after = now(world, run.intent_id)
    assert (after.status, after.execution_no, after.retry_count) == (Status.RETRIES_EXCEEDED, 1, 1)
    assert after.next_action is not None and "used up" in after.next_action
    assert ":execute:2" not in world.workflows(run.intent_id)


def test_executions_of_a_former_plan_do_not_use_up_those_of_the_next(world: Stage_) -> None:
    uid = finished(world, Event.FAIL, ErrCode.CMD_NONZERO, "TaskFailed", with_=settings(max_executions=2)).intent_id
    assert world.store.retry(now(world, uid), count=1)
    world.plan_ready(uid)
    run = now(world, uid)
    assert world.store.record_approval_object(run, name=str(run.approval_name), uid=f"object-2-{uid}")
    assert world.store.approve(now(world, uid), [vote(), vote("bob@corp")])
    for count in (2, 3):
        world.begin_tasks(uid, 1, running=1)
        world.end_task(uid, ErrCode.LOST)
        world.finish(uid, Event.EXCEED, "InfrastructureFailed")
        assert world.store.retry(now(world, uid), count=count) is (count == 2), "two of this plan"
    after = now(world, uid)
    assert (after.execution_no, after.next_action is not None and "used up" in after.next_action) == (3, True)


@pytest.mark.parametrize("make", [canceled, started, waiting])
def test_there_is_no_retry_of_what_is_open_or_canceled(world: Stage_, make: Callable[[Stage_], Run]) -> None:
    run = make(world)
    assert not world.store.retry(run, count=1)
    assert now(world, run.intent_id) == run


def test_two_retries_at_once_are_one(world: Stage_) -> None:
    for make in (plan_failed, infrastructure_failed):
        for _ in range(ROUNDS // 3):
            run = make(world)
            retry = partial(world.store.retry, run, count=1)
            won = race(retry, retry)
            assert sorted(won) == [False, True]
            after = now(world, run.intent_id)
            assert (after.plan_no, after.execution_no) in ((2, 0), (1, 2)) and after.next_action is None


# ------------------------------------------------------------------ looking


def test_open_runs_are_listed_with_their_names(world: Stage_) -> None:
    run = started(world)
    found = {r["intent_id"]: (r["namespace"], r["name"]) for r in world.store.open_runs()}
    assert found[run.intent_id] == ("team", "fix-median")


def test_progress_changes_when_a_task_begins_and_when_one_ends(world: Stage_) -> None:
    run = executing(world, count=2, running=0)
    marks = [world.store.progress()[run.intent_id]]
    world.begin_tasks(run.intent_id, 2, running=2)
    marks.append(world.store.progress()[run.intent_id])
    world.end_task(run.intent_id, ErrCode.NONE)
    marks.append(world.store.progress()[run.intent_id])
    assert len(set(marks)) == 3


def test_failed_tasks_are_counted_and_at_most_ten_are_listed(world: Stage_) -> None:
    run = executing(world, count=12, running=10)
    for _ in range(10):
        world.end_task(run.intent_id, ErrCode.OOM)
    world.begin_tasks(run.intent_id, 12, running=2)
    world.end_task(run.intent_id, ErrCode.LOST)
    after = now(world, run.intent_id).tasks
    assert (after.total, after.failed, after.unknown, len(after.failures)) == (12, 11, 1, 10)


# ------------------------------------------------------------------ PostgreSQL only: enqueue


def test_the_same_workflow_id_with_other_input_is_refused(pg: InPostgres) -> None:
    uid = str(uuid4())
    enqueue = "SELECT app.enqueue(%s::app.workflow_name, %s, %s, 'v1')"
    assert pg.one(enqueue, "FinishWF", uid, "a") == pg.one(enqueue, "FinishWF", uid, "a") == uid
    for name, arg in (("FinishWF", "b"), ("TaskWF", "a")):
        with pytest.raises(psycopg.errors.UniqueViolation):
            pg.one(enqueue, name, uid, arg)
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        pg.one(enqueue, "AnyWF", uid + "x", "a")


def test_a_higher_priority_has_the_lower_number(pg: InPostgres) -> None:
    low, high = started(pg), started(pg, with_=settings(priority=7))
    numbers = [
        pg.one("SELECT priority FROM dbos.workflow_status WHERE workflow_uuid = %s", r.intent_id) for r in (low, high)
    ]
    assert numbers[0] - numbers[1] == 7


def test_a_changed_status_notifies_and_progress_does_not(pg: InPostgres, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as c:
        c.execute("LISTEN sisukodo_runs")
        run = started(pg)
        pg.work.save_step(run.run_id, "CompileST", 1, output={}, artifacts=[], commit=None)
        assert [n.payload for n in c.notifies(timeout=0.2)] == []
        pg.begin_plan(run.intent_id)
        assert [n.payload for n in c.notifies(timeout=5, stop_after=1)] == [run.intent_id]


def test_progress_changes_with_a_step(pg: InPostgres) -> None:
    run = started(pg)
    assert run.intent_id not in pg.store.progress()
    pg.begin_plan(run.intent_id)
    before = pg.store.progress()[run.intent_id]
    pg.work.save_step(run.run_id, "CompileST", 1, output={}, artifacts=[], commit=None)
    assert pg.store.progress()[run.intent_id] != before


# ------------------------------------------------------------------ PostgreSQL only: steps, blobs, ledger


def test_a_step_is_saved_once_and_another_output_is_drift(pg: InPostgres) -> None:
    run = started(pg)
    card = Artifact(name="plan.json", kind="plan_card", content=b"{}")
    assert pg.work.steps(run.run_id, 1) == {}

    def save(output: dict[str, Any]) -> Any:
        return pg.work.save_step(run.run_id, "CompileST", 1, output=output, artifacts=[card], commit="c" * 40)

    assert save({"a": 1}) == save({"a": 1}) == pg.work.steps(run.run_id, 1)["CompileST"] == {"a": 1}
    with pytest.raises(Drift, match="CompileST"):
        save({"a": 2})
    assert pg.work.steps(run.run_id, 1)["CompileST"] == {"a": 1}
    after = now(pg, run.intent_id)
    assert (after.last_step, after.commit_id) == ("CompileST", "c" * 40)
    assert pg.one("SELECT count(*) FROM app.artifacts WHERE run_id = %s", run.run_id) == 1


def test_blobs_are_verified(pg: InPostgres) -> None:
    sha = pg.work.put_blob(b"content")
    assert pg.work.put_blob(b"content") == sha and pg.work.blob(sha) == b"content"
    with pytest.raises(DigestMismatch, match="missing"):
        pg.work.blob("0" * 64)
    other = pg.work.put_blob(b"more")
    pg.work.check_blobs([sha, other, sha])
    with pytest.raises(DigestMismatch, match="missing"):
        pg.work.check_blobs([sha, "0" * 64])
    pg.rows("UPDATE app.blobs SET content = 'other' WHERE sha256 = %s RETURNING 1", sha)
    with pytest.raises(DigestMismatch, match="altered"):
        pg.work.blob(sha)
    with pytest.raises(DigestMismatch, match="altered"):
        pg.work.check_blobs([other, sha])


def turn(prompt: str = "p", **changes: Any) -> TurnRequest:
    plain = TurnRequest(session="s", agent="compile", schema={"type": "object"}, prompt=prompt, commit="c" * 40)
    return replace(plain, **changes)


def reply(structured: Any = None, tokens: int = 5) -> TurnReply:
    return TurnReply(
        session="s",
        structured={"kind": "plan"} if structured is None else structured,
        raw_text="text",
        tool_calls=({"tool": "StructuredOutput"},),
        tokens_in=tokens,
        tokens_out=1,
        timings={"total": 3},
    )


def test_the_ledger_serves_what_succeeded_and_counts_tokens(pg: InPostgres) -> None:
    run = started(pg)
    ledger = PgTurnLedger(pg.pool, pg.ctx(run.intent_id))
    assert ledger.look(turn()).reply is None
    ledger.put(turn(), reply())
    ledger.put(turn(), reply({"kind": "other"}))
    assert ledger.look(turn()).reply == reply(), "the first success stays"
    assert ledger.look(turn(session="another")).reply == reply(), "the session is no part of what was asked"
    for other in (turn("q"), turn(history=("before",)), turn(agent="x"), turn(schema={})):
        assert ledger.look(other).reply is None
    ledger.put(turn("q"), reply(tokens=10))
    assert now(pg, run.intent_id).tokens == 6 + 11


def test_a_failed_turn_is_kept_and_never_served_until_it_succeeds(pg: InPostgres) -> None:
    run = started(pg)
    ledger = PgTurnLedger(pg.pool, pg.ctx(run.intent_id))
    ledger.failed(turn(), SisuError("down"))
    ledger.failed(turn(), SisuError("still down"))
    assert ledger.look(turn()).reply is None
    assert pg.one("SELECT error FROM app.opencode_calls WHERE run_id = %s", run.run_id) == "still down"
    assert ledger.look(turn()).error == "SisuError" and ledger.look(turn("q")).error is None
    ledger.put(turn(), reply())
    ledger.failed(turn(), SisuError("late"))
    assert ledger.look(turn()).reply == reply() and ledger.look(turn()).error is None


def test_what_was_wrong_with_an_answer_and_what_all_turns_took_is_kept(pg: InPostgres) -> None:
    run = started(pg)
    ctx = pg.ctx(run.intent_id)
    ledger = PgTurnLedger(pg.pool, ctx)
    assert ledger.look(turn("z")).spent == 0
    cut = replace(reply(), structured=None, problem="it was cut off")
    ledger.put(turn(), cut)
    ledger.failed(turn("q"), SisuError("down"))
    assert ledger.look(turn()).reply == cut
    PgTurnLedger(pg.pool, replace(ctx, plan_no=2)).put(turn(), reply(tokens=10))
    assert ledger.look(turn("z")).spent == 6 + 11, "of every plan of the Intent"


def unserved(tokens: tuple[int, int]) -> SisuError:
    error = SisuError("down")
    error.tokens = tokens
    return error


@pytest.mark.parametrize("kind", ["memory", "postgres"])
def test_what_failed_turns_took_is_spent_for_every_try(pg: InPostgres, kind: str) -> None:
    run = started(pg)
    ledger: TurnLedger = MemoryLedger() if kind == "memory" else PgTurnLedger(pg.pool, pg.ctx(run.intent_id))
    spent = []
    for error in (unserved((30, 4)), SisuError("nothing was reported"), unserved((20, 2))):
        ledger.failed(turn(), error)
        spent.append(ledger.look(turn()).spent)
    assert spent == [34, 34, 56]
    ledger.put(turn(), reply())
    assert ledger.look(turn()).spent == 56 + 6
    assert ledger.look(turn()).reply == reply(), "an answer has its own count, whoever reads it"
    ledger.failed(turn("q"), unserved((1, 1)))
    assert ledger.look(turn("z")).spent == 56 + 6 + 2


def test_what_failed_turns_took_is_seen(pg: InPostgres) -> None:
    run = started(pg)
    ledger = PgTurnLedger(pg.pool, pg.ctx(run.intent_id))
    ledger.failed(turn(), unserved((30, 4)))
    assert now(pg, run.intent_id).tokens == 34
    ledger.put(turn(), replace(reply(), raw_text="a\0b"))
    assert ledger.look(turn()).error == "InvalidPlan"
    assert now(pg, run.intent_id).tokens == 34 + 6, "an answer that cannot be stored was paid for, too"
    tokens = "SELECT tokens FROM app.opencode_calls WHERE run_id = %s"
    assert pg.one(tokens, run.run_id) == {"in": 35, "out": 5}


def test_a_failed_turn_that_is_written_again_is_spent_once(pg: InPostgres) -> None:
    """A transaction is repeated when the connection broke while it committed."""
    ctx = pg.ctx(started(pg).intent_id)
    for _ in range(2):
        PgTurnLedger(pg.pool, ctx, ids=lambda: "the same try").failed(turn(), unserved((30, 4)))
    assert PgTurnLedger(pg.pool, ctx).look(turn()).spent == 34


def test_another_plan_generation_has_a_ledger_of_its_own(pg: InPostgres) -> None:
    run = started(pg)
    first = pg.ctx(run.intent_id)
    PgTurnLedger(pg.pool, first).put(turn(), reply())
    assert PgTurnLedger(pg.pool, replace(first, plan_no=2)).look(turn()).reply is None


# ------------------------------------------------------------------ PostgreSQL only: tasks, journal, fence


@dataclass(frozen=True)
class Window:
    """A run that executes `count` tasks, `parallelism` at a time, before any of them began."""

    pg: InPostgres
    run: Run
    execution: Execution

    @property
    def workflows(self) -> list[str]:
        found = self.pg.rows(
            "SELECT workflow_id FROM app.sbx_runs WHERE run_id = %s AND workflow_id IS NOT NULL ORDER BY idx",
            self.run.run_id,
        )
        return [w for (w,) in found]

    def counts(self) -> dict[str, int]:
        return dict(
            self.pg.rows("SELECT status, count(*) FROM app.sbx_runs WHERE run_id = %s GROUP BY 1", self.run.run_id)
        )

    def begin(self, workflow: str) -> Attempt:
        attempt = self.pg.work.begin_attempt(self.run.run_id, workflow)
        assert attempt.fence is not None
        return attempt

    def end(self, attempt: Attempt, workflow: str, *, carry: bool = False, **changes: Any) -> Attempt | None:
        done = outcome(key=attempt.task_key, **changes)
        return self.pg.work.record_outcome(attempt, done, workflow_id=workflow, carry=carry)

    def journal(self) -> list[tuple[int, str]]:
        return self.pg.rows(
            "SELECT attempt, state FROM app.sbx_attempts WHERE run_id = %s ORDER BY fence", self.run.run_id
        )

    def enqueued(self, kind: str) -> list[str]:
        return [i for i in self.pg.workflows(self.run.intent_id) if i.startswith(f":{kind}:")]


def window(
    pg: InPostgres, count: int, parallelism: int = 2, depends: Mapping[int, Sequence[int]] | None = None
) -> Window:
    run = executing(pg, count=0, with_=settings(parallelism=parallelism))
    pieces = pg.execution(run.intent_id, count, depends)
    assert pg.work.begin_execution(pieces)
    return Window(pg, run, pieces)


def test_beginning_an_execution_twice_makes_its_tasks_once_and_keeps_the_window(pg: InPostgres) -> None:
    at_ = window(pg, 5)
    assert pg.work.begin_execution(at_.execution)
    assert at_.counts() == {"queued": 5} and len(at_.workflows) == len(at_.enqueued("task")) == 2
    assert pg.one("SELECT total FROM app.runs WHERE id = %s", at_.run.run_id) == 5


def test_an_execution_that_is_not_ours_is_not_begun(pg: InPostgres) -> None:
    run = executing(pg, count=0)
    pieces = pg.execution(run.intent_id, 2)
    assert not pg.work.begin_execution(replace(pieces, execution_no=2))
    assert pg.store.cancel(run, reason="Canceled")
    assert not pg.work.begin_execution(pieces)
    assert pg.one("SELECT count(*) FROM app.sbx_runs WHERE run_id = %s", run.run_id) == 0


def test_an_attempt_is_journaled_with_a_growing_fence_before_anything_runs(pg: InPostgres) -> None:
    at_ = window(pg, 3)
    first, second = (at_.begin(w) for w in at_.workflows)
    assert first.fence is not None and second.fence is not None and first.fence < second.fence
    assert first.request == at_.execution.tasks[0].request and first.task_key == at_.execution.tasks[0].task_key
    assert first.deadline is not None and first.deadline > datetime.now(UTC)
    assert at_.journal() == [(1, "created"), (1, "created")]
    assert [a.fence for a in pg.work.held(at_.workflows[0])] == [first.fence]


def test_without_a_live_lease_no_attempt_begins(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    zombie = PgWorkStore(pg.pool, app_version="v1", executor="never-leased")
    found = zombie.begin_attempt(at_.run.run_id, at_.workflows[0])
    assert (found.fence, found.leased) == (None, False)
    pg.leases.take("was-leased", ttl=-1)
    dead = PgWorkStore(pg.pool, app_version="v1", executor="was-leased")
    assert dead.begin_attempt(at_.run.run_id, at_.workflows[0]).fence is None
    assert at_.counts() == {"queued": 1} and at_.journal() == []


def test_no_attempt_begins_for_a_workflow_without_a_task_or_a_run_that_is_not_executing(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    assert pg.work.begin_attempt(at_.run.run_id, "no such workflow").fence is None
    workflow = at_.workflows[0]
    at_.begin(workflow)
    assert pg.store.cancel(at_.run, reason="Canceled")
    found = pg.work.begin_attempt(at_.run.run_id, workflow)
    assert (found.fence, found.leased, found.run_status) == (None, True, Status.CANCELING)


def test_a_second_attempt_supersedes_the_first_whose_outcome_then_changes_nothing(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    first, second = at_.begin(workflow), at_.begin(workflow)
    assert second.attempt == 2 and list(second.superseded) == [(first.fence, 1)]
    files = [Artifact(name="late", kind="file", content=b"late")]
    assert at_.end(first, workflow, artifacts=files) is None
    assert at_.counts() == {"running": 1} and at_.enqueued("finish") == []
    assert pg.one("SELECT count(*) FROM app.mock_receipts WHERE run_id = %s", at_.run.run_id) == 0
    assert pg.one("SELECT count(*) FROM app.artifacts WHERE run_id = %s", at_.run.run_id) == 0
    pg.work.add_chunks(first, [Chunk(kind="stdout", data=b"late")], base=0)
    assert pg.one("SELECT count(*) FROM app.chunks WHERE task_key = %s", first.task_key) == 0
    assert at_.end(second, workflow) is not None
    assert at_.journal() == [(1, "unknown"), (2, "done")]


def test_law_9_an_attempt_is_told_of_all_before_it_that_nobody_may_have_ended(pg: InPostgres) -> None:
    """Whoever began the second died before it had killed the first one's sandbox."""
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    first, second = at_.begin(workflow), at_.begin(workflow)
    assert sorted(a.fence or 0 for a in pg.work.held(workflow)) == [first.fence, second.fence]
    third = at_.begin(workflow)
    assert sorted(third.superseded) == [(first.fence, 1), (second.fence, 2)]
    assert at_.end(third, workflow) is not None
    assert at_.journal() == [(1, "unknown"), (2, "unknown"), (3, "done")]


def ended_before(attempt: Attempt) -> tuple[int, int, int]:
    return attempt.failures, attempt.interruptions, attempt.interruptions_alone


def test_what_ended_the_attempts_before_is_counted_apart(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    attempt = at_.begin(workflow)
    assert ended_before(attempt) == (0, 0, 0)
    attempt = pg.work.begin_attempt(at_.run.run_id, workflow, failed=attempt.fence)
    assert ended_before(attempt) == (1, 0, 0)
    stale, attempt = attempt, at_.begin(workflow)
    assert ended_before(attempt) == (1, 1, 0)
    pg.work.note_alone(stale)
    attempt = at_.begin(workflow)
    assert ended_before(attempt) == (1, 2, 0), "only the live attempt can be alone"
    pg.work.note_alone(attempt)
    attempt = at_.begin(workflow)
    assert ended_before(attempt) == (1, 2, 1)
    pg.work.note_alone(attempt)
    attempt = pg.work.begin_attempt(at_.run.run_id, workflow, failed=attempt.fence)
    assert ended_before(attempt) == (2, 2, 1), "a failure while alone is a failure"
    assert ended_before(at_.begin(workflow)) == (2, 3, 1), "and the next attempt is not alone by itself"


def test_another_execution_begins_with_a_clean_slate(pg: InPostgres) -> None:
    at_ = window(pg, 2, parallelism=1)
    workflow = at_.workflows[0]
    for _ in range(2):
        pg.work.note_alone(at_.begin(workflow))
    attempt = at_.begin(workflow)
    pg.work.note_alone(attempt)
    lost = outcome(ErrCode.LOST, key=attempt.task_key)
    following = pg.work.record_outcome(attempt, lost, workflow_id=workflow, carry=True)
    assert following is not None and at_.end(following, workflow) is not None
    pg.finish(at_.run.intent_id, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, at_.run.intent_id), count=1)
    again = pg.ctx(at_.run.intent_id)
    assert pg.work.begin_execution(replace(at_.execution, execution_no=again.execution_no))
    (workflow,) = [w for w in at_.workflows if ":task:2:" in w]
    attempt = at_.begin(workflow)
    assert (attempt.attempt, *ended_before(attempt)) == (4, 0, 0, 0)
    assert ended_before(at_.begin(workflow)) == (0, 1, 0)


def test_the_same_outcome_twice_counts_once(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    attempt = at_.begin(workflow)
    assert at_.end(attempt, workflow) is not None and at_.end(attempt, workflow) is None
    receipts = pg.rows("SELECT receipt_key, seen_count FROM app.mock_receipts WHERE run_id = %s", at_.run.run_id)
    assert receipts == [(f"{attempt.task_key}:1", 1)]
    assert pg.one("SELECT outcomes FROM app.sbx_runs WHERE run_id = %s", at_.run.run_id) == 1


def test_an_outcome_brings_artifacts_chunks_and_what_was_measured(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    attempt = at_.begin(workflow)
    pg.work.add_chunks(attempt, [Chunk(kind="stdout", data=b"a")], base=0)
    pg.work.add_chunks(attempt, [Chunk(kind="stdout", data=b"a")], base=0)
    files = [
        Artifact(name="junit.xml", kind="junit", content=b"<x/>"),
        Artifact(name="same", kind="file", content=b"<x/>"),
    ]
    chunks = [Chunk(kind="stderr", data=b"b"), Chunk(kind="stream_closed", data=b"")]
    at_.end(attempt, workflow, artifacts=files, chunks=chunks, chunk_base=1, junit={"tests": 2, "failures": 1})
    stream = pg.rows("SELECT seq, kind, data FROM app.chunks WHERE task_key = %s ORDER BY seq", attempt.task_key)
    assert stream == [(0, "stdout", b"a"), (1, "stderr", b"b"), (2, "stream_closed", b"")]
    uris = pg.rows("SELECT name, uri, sha256 FROM app.artifacts WHERE run_id = %s ORDER BY name", at_.run.run_id)
    assert [u[:2] for u in uris] == [
        (n, f"artifact://run/{at_.run.run_id}/step/ExecuteST/task/{attempt.task_key}/{n}")
        for n in ("junit.xml", "same")
    ]
    assert pg.work.blob(uris[0][2]) == b"<x/>"
    (result,) = pg.work.results(at_.run.run_id, 1)
    assert (result.status, result.exit, result.wall_ms, result.junit) == (
        "succeeded",
        0,
        12,
        {"tests": 2, "failures": 1},
    )


def test_without_a_live_lease_an_outcome_counts_and_the_next_task_is_for_others(pg: InPostgres) -> None:
    at_ = window(pg, 2, parallelism=1)
    (workflow,) = at_.workflows
    pg.leases.take("zombie", ttl=600)
    zombie = PgWorkStore(pg.pool, app_version="v1", executor="zombie")
    attempt = zombie.begin_attempt(at_.run.run_id, workflow)
    pg.leases.take("zombie", ttl=-1)
    done = zombie.record_outcome(attempt, outcome(key=attempt.task_key), workflow_id=workflow, carry=True)
    assert done is not None and done.fence is None, "the fence decides on the outcome; nothing was begun"
    assert at_.counts() == {"succeeded": 1, "queued": 1} and at_.journal() == [(1, "done")]
    (other,) = at_.workflows[1:]
    assert other.removeprefix(at_.run.intent_id) in at_.enqueued("task")
    last = at_.begin(other)
    assert last.attempt == 1 and at_.end(last, other) is not None and ":finish:1" in at_.enqueued("finish")


def test_without_carrying_the_next_task_is_enqueued_and_with_it_begun(pg: InPostgres) -> None:
    at_ = window(pg, 3, parallelism=1)
    workflow = at_.workflows[0]
    following = at_.end(at_.begin(workflow), workflow, carry=True)
    assert following is not None and following.fence is not None
    assert following.request == at_.execution.tasks[1].request and following.attempt == 1
    assert len(at_.enqueued("task")) == 1 and at_.journal() == [(1, "done"), (1, "created")]
    last = at_.end(following, workflow)
    assert last is not None and last.fence is None
    assert len(at_.enqueued("task")) == 2
    assert at_.counts() == {"succeeded": 2, "queued": 1}


@pytest.mark.parametrize("parallelism", [1, 4, 10])
def test_never_more_tasks_run_than_the_window_and_the_last_outcome_enqueues_one_finish(
    pg: InPostgres, parallelism: int
) -> None:
    at_ = window(pg, 20, parallelism=parallelism)

    def slot(workflow: str) -> bool:
        attempt: Attempt | None = pg.work.begin_attempt(at_.run.run_id, workflow)
        while attempt is not None and attempt.fence is not None:
            busy = pg.one("SELECT count(*) FROM app.sbx_runs WHERE run_id = %s AND status = 'running'", at_.run.run_id)
            assert busy <= parallelism
            attempt = at_.end(attempt, workflow, carry=True)
        return True

    race(*(partial(slot, w) for w in at_.workflows))
    assert at_.counts() == {"succeeded": 20}
    assert at_.enqueued("finish") == [":finish:1"]
    after = now(pg, at_.run.intent_id)
    assert at(after) == (Status.RUNNING, Stage.FINISH)
    outcomes = pg.rows("SELECT DISTINCT outcomes FROM app.sbx_runs WHERE run_id = %s", at_.run.run_id)
    receipts = pg.rows("SELECT seen_count FROM app.mock_receipts WHERE run_id = %s", at_.run.run_id)
    assert outcomes == [(1,)] and receipts == [(1,)] * 20


def test_finishing_closes_once_and_only_its_own_execution(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    workflow = at_.workflows[0]
    ctx = pg.ctx(at_.run.intent_id)

    def finish(number: int) -> bool:
        return pg.work.finish(
            ctx, execution_no=number, event="succeed", reason="Succeeded", error=None, result={"patchRef": "p"}
        )

    assert not finish(1), "a task is left"
    at_.end(at_.begin(workflow), workflow)
    assert not finish(2)
    assert finish(1) and not finish(1)
    assert pg.one("SELECT closed FROM app.runs WHERE id = %s", at_.run.run_id) == 1


def test_a_canceled_execution_closes_when_its_last_running_task_has_ended(pg: InPostgres) -> None:
    at_ = window(pg, 4, parallelism=2)
    workflows = at_.workflows
    first, second = (at_.begin(w) for w in workflows)
    assert pg.store.cancel(at_.run, reason="Canceled")
    assert not pg.work.close_canceled(at_.run.run_id)
    assert at_.run.run_id in pg.work.canceling()
    ended = at_.end(first, workflows[0], carry=True)
    assert ended is not None and (ended.fence, ended.run_status) == (None, Status.CANCELING), "nothing is carried on"
    assert not pg.work.close_canceled(at_.run.run_id)
    pg.work.abandon(workflows[1])
    assert pg.work.held(workflows[1]) == [] and at_.end(second, workflows[1]) is None, "abandoned is fenced off"
    assert pg.work.close_canceled(at_.run.run_id) and not pg.work.close_canceled(at_.run.run_id)
    assert now(pg, at_.run.intent_id).status is Status.CANCELED
    assert at_.enqueued("finish") == [] and at_.counts() == {"succeeded": 1, "failed": 3}


def test_nothing_is_abandoned_while_a_run_is_not_being_canceled(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    attempt = at_.begin(at_.workflows[0])
    pg.work.abandon(at_.workflows[0])
    assert at_.end(attempt, at_.workflows[0]) is not None


def test_closing_and_beginning_at_once_never_leave_a_task_in_a_closed_run(pg: InPostgres) -> None:
    for _ in range(ROUNDS):
        at_ = window(pg, 1)
        begin = partial(pg.work.begin_attempt, at_.run.run_id, at_.workflows[0])
        race(begin, partial(pg.store.cancel, at_.run, reason="Canceled"))
        after = now(pg, at_.run.intent_id)
        assert after.tasks.running == (1 if after.status is Status.CANCELING else 0)


def test_a_plan_generation_that_is_over_cannot_wait_or_start(pg: InPostgres) -> None:
    run = started(pg)
    ctx = pg.ctx(run.intent_id)
    assert not pg.work.start_plan(replace(ctx, plan_no=2)) and pg.work.start_plan(ctx) and not pg.work.start_plan(ctx)
    assert not pg.work.planned(
        replace(ctx, plan_no=2), plan=plan(), record={}, digest="d", patch_sha256="p", approval_name="n"
    )


def test_a_plan_of_a_former_generation_cannot_fail_its_successor(pg: InPostgres) -> None:
    run = plan_failed(pg)
    old = pg.ctx(run.intent_id)
    assert pg.store.retry(run, count=1)
    pg.begin_plan(run.intent_id)
    assert not pg.work.fail_plan(old, reason="PlanFailed", error="late")
    assert now(pg, run.intent_id).status is Status.RUNNING


def test_a_workflow_that_plans_cannot_fail_an_execution(pg: InPostgres) -> None:
    run = executing(pg)
    assert not pg.work.fail_plan(pg.ctx(run.intent_id), reason="PlanFailed", error="a repeated RunIntentWF")
    assert now(pg, run.intent_id).status is Status.RUNNING


def test_only_approvals_of_exactly_this_digest_are_counted(pg: InPostgres) -> None:
    run = waiting(pg)
    votes: list[Vote] = [vote(), vote("bob@corp")]
    assert pg.work.approved_votes(run.run_id, str(run.digest)) == 0
    assert pg.store.approve(run, votes)
    assert pg.work.approved_votes(run.run_id, str(run.digest)) == 2
    assert pg.work.approved_votes(run.run_id, "sha256:0") == 0
    assert pg.work.approved_votes(rejected(pg).run_id, str(run.digest)) == 0


def test_refused_bytes_end_the_run(pg: InPostgres) -> None:
    run = executing(pg, count=0)
    ctx = pg.ctx(run.intent_id)
    assert not pg.work.refuse_execution(replace(ctx, execution_no=2), error="of a later execution")
    assert pg.work.refuse_execution(ctx, error="x" * 5000)
    after = now(pg, run.intent_id)
    assert (after.status, after.reason) == (Status.FAILED, "ExecutionRefused") and len(str(after.error)) == 2048


def test_a_refusal_of_an_execution_that_is_over_cannot_end_the_next_one(pg: InPostgres) -> None:
    run = infrastructure_failed(pg)
    old = pg.ctx(run.intent_id)
    assert pg.store.retry(run, count=1)
    assert not pg.work.refuse_execution(old, error="late")
    assert now(pg, run.intent_id).status is Status.RUNNING


# ------------------------------------------------------------------ PostgreSQL only: dependencies


def drained(at_: Window, code: Callable[[str], ErrCode] = lambda _: ErrCode.NONE) -> list[str]:
    """Run every task to its end, one after the other; the order in which they ran."""
    order: list[str] = []
    while waiting_ := at_.pg.rows(
        "SELECT workflow_id FROM app.sbx_runs WHERE run_id = %s AND status = 'queued' AND workflow_id IS NOT NULL ORDER BY idx",
        at_.run.run_id,
    ):
        workflow = waiting_[0][0]
        attempt = at_.begin(workflow)
        assert attempt.request is not None
        order.append(attempt.request.task_id)
        done = outcome(code(attempt.request.task_id), key=attempt.task_key)
        assert at_.pg.work.record_outcome(attempt, done, workflow_id=workflow, carry=False) is not None
    return order


def test_a_task_begins_when_all_that_it_depends_on_has_succeeded(pg: InPostgres) -> None:
    at_ = window(pg, 4, parallelism=4, depends={0: [2, 3], 2: [3]})
    assert len(at_.workflows) == 2, "t1 and t3 depend on nothing"
    assert drained(at_) == ["t1", "t3", "t2", "t0"]
    assert at_.enqueued("finish") == [":finish:1"]


def test_what_depends_on_a_failed_task_is_skipped_and_the_run_finishes(pg: InPostgres) -> None:
    at_ = window(pg, 4, parallelism=4, depends={1: [0], 2: [1]})
    assert drained(at_, lambda t: ErrCode.CMD_NONZERO if t == "t0" else ErrCode.NONE) == ["t0", "t3"]
    assert at_.counts() == {"failed": 3, "succeeded": 1}
    codes = {r.task_id: r.err_code for r in pg.work.results(at_.run.run_id, 1)}
    assert (codes["t0"], str(codes["t1"]), str(codes["t2"])) == (ErrCode.CMD_NONZERO, "SKIPPED", "SKIPPED")
    assert at_.enqueued("finish") == [":finish:1"]


def test_two_dependencies_that_end_at_once_start_the_task_that_waits_for_both(pg: InPostgres) -> None:
    for _ in range(ROUNDS):
        at_ = window(pg, 3, parallelism=2, depends={2: [0, 1]})
        attempts = [(at_.begin(w), w) for w in at_.workflows]
        race(*(partial(at_.end, attempt, workflow) for attempt, workflow in attempts))
        assert drained(at_) == ["t2"] and at_.enqueued("finish") == [":finish:1"]


def test_a_retry_after_infrastructure_failed_also_runs_what_was_skipped_for_it(pg: InPostgres) -> None:
    at_ = window(pg, 2, depends={1: [0]})
    assert drained(at_, lambda _: ErrCode.LOST) == ["t0"]
    pg.finish(at_.run.intent_id, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, at_.run.intent_id), count=1)
    assert pg.work.begin_execution(replace(at_.execution, execution_no=2))
    assert drained(at_) == ["t0", "t1"] and ":finish:2" in at_.enqueued("finish")


# ------------------------------------------------------------------ PostgreSQL only: leases and repair


def test_a_lease_that_ran_out_is_not_renewed(pg: InPostgres) -> None:
    pg.leases.take("lives", ttl=60)
    pg.leases.take("ran-out", ttl=-1)
    assert [pg.leases.renew(name, ttl=60) for name in ("lives", "ran-out", "never-taken")] == [True, False, False]
    pg.leases.release("lives")
    assert not pg.leases.renew("lives", ttl=60)


def test_one_sweeper_at_a_time_and_live_executors_are_left_alone(pg: InPostgres) -> None:
    run = started(pg)
    uid = run.intent_id
    claim = "UPDATE dbos.workflow_status SET status = 'PENDING', executor_id = %s WHERE workflow_uuid = %s RETURNING 1"
    found: list[str] = []
    pg.rows(claim, EXECUTOR, uid)
    pg.leases.sweep(found.extend)
    assert EXECUTOR not in found
    pg.rows(claim, "dead-1", uid)
    pg.leases.sweep(found.extend)
    assert "dead-1" in found
    pg.leases.take("dead-1", ttl=60)
    found.clear()
    pg.leases.sweep(found.extend)
    assert "dead-1" not in found
    pg.leases.release("dead-1")
    inner: list[bool] = []
    pg.leases.sweep(lambda dead: inner.append(bool(pg.leases.sweep(lambda _: None))))
    assert inner == [False], "a second sweep meets the lock and does nothing"
    pg.rows("UPDATE dbos.workflow_status SET status = 'SUCCESS' WHERE workflow_uuid = %s RETURNING 1", uid)


def test_a_task_whose_workflow_ended_without_an_outcome_is_dispatched_again(pg: InPostgres) -> None:
    at_ = window(pg, 1)
    attempt = at_.begin(at_.workflows[0])
    pg.rows(
        "UPDATE dbos.workflow_status SET status = 'SUCCESS' WHERE starts_with(workflow_uuid, %s) RETURNING 1",
        at_.run.intent_id,
    )
    with pg.pool.connection() as c:
        c.execute("ALTER TABLE app.runs DISABLE TRIGGER run_touch")
        c.execute("UPDATE app.runs SET updated_at = updated_at - interval '1 hour' WHERE id = %s", (at_.run.run_id,))
        c.execute("ALTER TABLE app.runs ENABLE TRIGGER run_touch")
    assert pg.leases.sweep(lambda _: None)["tasks"] >= 1
    (again,) = at_.workflows
    assert again.endswith(":r2")
    second = at_.begin(again)
    assert list(second.superseded) == [(attempt.fence, 1)] and at_.end(attempt, again) is None
    assert at_.end(second, again) is not None


def test_partition_and_priority_follow_the_intent_until_tasks_exist(world: Stage_) -> None:
    run = started(world)
    assert world.store.adjust(run, partition="team/b", priority=3)
    seen = world.store.run(run.intent_id)
    assert seen is not None and (seen.settings.partition, seen.settings.priority) == ("team/b", 3)
    assert world.store.cancel(seen, reason="Canceled")
    assert not world.store.adjust(seen, partition="team/c", priority=4), "the run has ended"


def test_once_tasks_may_exist_only_the_priority_follows(world: Stage_) -> None:
    run = executing(world, count=0)
    assert world.store.adjust(run, partition="team/b", priority=3)
    after = now(world, run.intent_id).settings
    assert (after.partition, after.priority) == (run.settings.partition, 3)
