"""What a retry meets that did not end as it should: a refused execution, a coordinator that has not come yet. In PostgreSQL."""

from __future__ import annotations

from dataclasses import replace

from controller.core.contract import ErrCode
from controller.core.model import Artifact
from controller.core.phases import Event, Stage, Status
from controller.db import artifacts
from tests.integration.test_store_contract import (  # noqa: F401
    InPostgres,
    Window,
    at,
    drained,
    now,
    pg,
    pool,
    started,
    window,
)
from tests.support.builders import vote


def retried(pg: InPostgres) -> Window:  # noqa: F811
    """Infrastructure failed both tasks, and the retry's ExecutePlanWF has not run yet."""
    at_ = window(pg, 2)
    drained(at_, lambda _: ErrCode.LOST)
    pg.finish(at_.run.intent_id, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, at_.run.intent_id), count=1)
    return at_


def unchanged(pg: InPostgres, run_id: str, *, seconds: float, dispatches: int | None = None) -> None:  # noqa: F811
    """Nothing has happened in this run for so long."""
    with pg.pool.connection() as c:
        c.execute("ALTER TABLE app.runs DISABLE TRIGGER run_touch")
        c.execute(
            "UPDATE app.runs SET updated_at = clock_timestamp() - make_interval(secs => %s),"
            " dispatches = coalesce(%s, dispatches) WHERE id = %s",
            (seconds, dispatches, run_id),
        )
        c.execute("ALTER TABLE app.runs ENABLE TRIGGER run_touch")


def planned_again(pg: InPostgres) -> Window:  # noqa: F811
    """The retry's execution was refused; another plan, of one task, is made and approved."""
    at_ = retried(pg)
    uid = at_.run.intent_id
    assert pg.work.refuse_execution(pg.ctx(uid), error="the template changed; plan again")
    assert at_.counts() == {"failed": 2}, "nothing waits in a run that has ended"
    assert {str(r.err_code) for r in pg.work.results(at_.run.run_id, 1)} == {"SKIPPED"}
    assert pg.store.retry(now(pg, uid), count=2)
    pg.plan_ready(uid)
    run = now(pg, uid)
    assert pg.store.record_approval_object(run, name=str(run.approval_name), uid=f"object-2-{uid}")
    assert pg.store.approve(now(pg, uid), [vote()])
    assert at(now(pg, uid)) == (Status.RUNNING, Stage.EXECUTE) and now(pg, uid).plan_no == 2
    again = Window(pg, now(pg, uid), pg.execution(uid, 1))
    assert [t.request.generation for t in again.execution.tasks] == [2]
    return again


def enqueued_generations(pg: InPostgres, run_id: str) -> list[tuple[int]]:  # noqa: F811
    query = "SELECT generation FROM app.sbx_runs WHERE run_id = %s AND status = 'queued' AND workflow_id IS NOT NULL"
    return pg.rows(query, run_id)


def test_what_a_refused_execution_did_not_run_is_not_run_under_the_next_plan(pg: InPostgres) -> None:  # noqa: F811
    again = planned_again(pg)
    assert pg.work.begin_execution(again.execution)
    assert enqueued_generations(pg, again.run.run_id) == [(2,)], "only what was approved"
    assert drained(again) == ["t0"] and ":finish:3" in again.enqueued("finish")


def test_what_waits_of_a_former_plan_neither_begins_nor_holds_the_run_up(pg: InPostgres) -> None:  # noqa: F811
    """Whatever left it waiting: what begins is of the plan that was approved."""
    again = planned_again(pg)
    with pg.pool.connection() as c:
        c.execute("UPDATE app.sbx_runs SET status = 'queued' WHERE run_id = %s", (again.run.run_id,))
    assert pg.work.begin_execution(again.execution)
    assert enqueued_generations(pg, again.run.run_id) == [(2,)]
    assert drained(again) == ["t0"] and ":finish:3" in again.enqueued("finish")


def test_the_sweeper_begins_no_task_of_a_retry_before_its_bytes_were_checked_again(pg: InPostgres) -> None:  # noqa: F811
    at_ = retried(pg)
    uid = at_.run.intent_id
    unchanged(pg, at_.run.run_id, seconds=3600)  # a worker that is late by more than two seconds
    pg.leases.sweep(lambda _: None)
    assert [i for i in at_.enqueued("task") if i.startswith(":task:2:")] == [], "ExecutePlanWF has not looked yet"
    assert pg.work.begin_execution(replace(at_.execution, execution_no=2))
    assert drained(at_) == ["t0", "t1"] and now(pg, uid).stage is Stage.FINISH


def file(name: str, content: bytes) -> Artifact:
    return Artifact(name=name, kind="file", content=content)


def test_only_the_artifacts_of_the_accepted_attempt_are_served(pg: InPostgres) -> None:  # noqa: F811
    at_ = window(pg, 1)
    uid, (workflow,) = at_.run.intent_id, at_.workflows
    first = at_.begin(workflow)
    said = [file("stdout.txt", b"not enough disk"), file("report", b"1")]
    assert at_.end(first, workflow, code=ErrCode.LOST, artifacts=said) is not None
    pg.finish(uid, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, uid), count=1)
    assert pg.work.begin_execution(replace(at_.execution, execution_no=2))
    (workflow,) = at_.workflows
    second = at_.begin(workflow)
    folder = f"artifact://run/{at_.run.run_id}/step/ExecuteST/task/{first.task_key}"
    assert artifacts.read(pg.pool, f"{folder}/stdout.txt") == b"not enough disk", "until there is another outcome"
    assert at_.end(second, workflow, artifacts=[file("report", b"two")]) is not None
    assert artifacts.read(pg.pool, f"{folder}/stdout.txt") is None, "this attempt printed nothing"
    assert artifacts.read(pg.pool, f"{folder}/report") == b"two"
    assert artifacts.below(pg.pool, folder) == [(f"{folder}/report", 3)]


def test_only_the_artifacts_of_a_steps_newest_attempt_are_served(pg: InPostgres) -> None:  # noqa: F811
    run_id = window(pg, 1).run.run_id
    both = [file("patch.diff", b"1"), file("plan.json", b"old")]
    pg.work.save_step(run_id, "ApplyPatchST", 1, output={}, artifacts=both, commit=None)
    pg.work.save_step(run_id, "ApplyPatchST", 2, output={}, artifacts=[file("patch.diff", b"two")], commit=None)
    folder = f"artifact://run/{run_id}/step/ApplyPatchST"
    assert artifacts.read(pg.pool, f"{folder}/plan.json") is None
    assert artifacts.read(pg.pool, f"{folder}/patch.diff") == b"two"
    assert artifacts.below(pg.pool, folder) == [(f"{folder}/patch.diff", 3)]


def test_a_coordinator_that_fails_again_and_again_is_dispatched_ever_more_rarely(pg: InPostgres) -> None:  # noqa: F811
    run = started(pg)
    uid = run.intent_id

    def repaired(*, seconds: float, dispatches: int | None = None) -> int:
        with pg.pool.connection() as c:
            c.execute("UPDATE dbos.workflow_status SET status = 'ERROR' WHERE workflow_uuid LIKE %s", (f"{uid}%",))
        unchanged(pg, run.run_id, seconds=seconds, dispatches=dispatches)
        return pg.leases.sweep(lambda _: None)["coordinators"]

    assert [repaired(seconds=2.5), repaired(seconds=2.5)] == [1, 1], "the first two at once"
    assert [repaired(seconds=3.5), repaired(seconds=5)] == [0, 1]
    assert [repaired(seconds=299, dispatches=40), repaired(seconds=301)] == [0, 1], "and then every five minutes"
