"""What ends an execution before its last task: a FailFast recipe, and sandbox minutes that are used up. In PostgreSQL."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from controller.core.contract import ErrCode, Metrics
from controller.core.phases import Event
from controller.core.work import Attempt
from tests.integration.test_store_contract import InPostgres, Window, executing, now, pg, pool, race  # noqa: F401
from tests.support.builders import APPROVAL_UID, outcome, response, settings, vote

MINUTE = 60_000


def window(
    pg: InPostgres,  # noqa: F811
    seconds: Sequence[int],
    *,
    parallelism: int = 2,
    **changes: Any,
) -> Window:
    """An execution of tasks with these time limits."""
    changes = {"task_timeout_seconds": max(seconds)} | changes
    run = executing(pg, count=0, with_=settings(parallelism=parallelism, **changes))
    plain = pg.execution(run.intent_id, len(seconds))
    tasks = [
        replace(t, request=t.request.model_copy(update={"timeout_ms": s * 1000}))
        for t, s in zip(plain.tasks, seconds, strict=True)
    ]
    at = Window(pg, run, replace(plain, tasks=tasks))
    assert pg.work.begin_execution(at.execution)
    return at


def holding(at: Window) -> list[str]:
    """TaskWFs that hold a slot."""
    query = (
        "SELECT workflow_id FROM app.sbx_runs WHERE run_id = %s AND status IN ('queued','running')"
        " AND workflow_id IS NOT NULL ORDER BY idx"
    )
    return [w for (w,) in at.pg.rows(query, at.run.run_id)]


def reserved(at: Window) -> tuple[int, int]:
    """Milliseconds that are spent, and that tasks with a slot may still take."""
    query = (
        "SELECT sum(spent_ms)::bigint, coalesce(sum(timeout_ms)"
        " FILTER (WHERE status IN ('queued','running') AND workflow_id IS NOT NULL), 0)::bigint FROM app.sbx_runs WHERE run_id = %s"
    )
    ((spent, held),) = at.pg.rows(query, at.run.run_id)
    return spent, held


def codes(at: Window) -> list[str | None]:
    return [
        r.err_code.value if r.err_code else None for r in at.pg.work.results(at.run.run_id, at.execution.generation)
    ]


def end(
    at: Window, attempt: Attempt, workflow: str, *, ms: int = 12, code: ErrCode = ErrCode.NONE, carry: bool = False
) -> Attempt | None:
    answer = response(code, key=attempt.task_key, metrics=Metrics(wall_ms=ms))
    done = replace(outcome(code, key=attempt.task_key), response=answer)
    return at.pg.work.record_outcome(attempt, done, workflow_id=workflow, carry=carry)


# ------------------------------------------------------------------ FailFast


@pytest.mark.parametrize("carry", [True, False])
def test_after_a_failure_nothing_more_begins_and_what_runs_keeps_its_result(pg: InPostgres, carry: bool) -> None:  # noqa: F811
    at = window(pg, [10] * 6, parallelism=3, on_failure="FailFast")
    workflows = holding(at)
    first, second = (at.begin(w) for w in workflows[:2])
    following = end(at, first, workflows[0], code=ErrCode.CMD_NONZERO, carry=carry)
    assert following is not None and following.fence is None, "nothing is carried on"
    assert at.pg.work.begin_attempt(at.run.run_id, workflows[2]).fence is None, "nor does what was only enqueued begin"
    assert at.enqueued("finish") == []
    end(at, second, workflows[1], carry=carry)
    assert codes(at) == ["CMD_NONZERO", "NONE", *["SKIPPED"] * 4]
    assert at.enqueued("finish") == [":finish:1"]


def test_run_all_goes_on_after_a_failure(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [10] * 3, parallelism=1)
    workflow = holding(at)[0]
    attempt: Attempt | None = at.begin(workflow)
    while attempt is not None and attempt.fence is not None:
        attempt = end(at, attempt, workflow, code=ErrCode.CMD_NONZERO, carry=True)
    assert codes(at) == ["CMD_NONZERO"] * 3


def test_failures_at_once_skip_the_rest_once_and_close_once(pg: InPostgres) -> None:  # noqa: F811
    for _ in range(10):
        at = window(pg, [10] * 20, parallelism=5, on_failure="FailFast")
        attempts = [(at.begin(w), w) for w in holding(at)]
        race(*(partial(end, at, a, w, code=ErrCode.CMD_NONZERO, carry=True) for a, w in attempts))
        while left := holding(at):  # one may have picked its next task before another one failed
            end(at, at.begin(left[0]), left[0])
        assert set(codes(at)) <= {"CMD_NONZERO", "NONE", "SKIPPED"} and codes(at).count("SKIPPED") >= 11
        assert at.enqueued("finish") == [":finish:1"]


def test_a_retry_runs_what_was_skipped_after_infrastructure_failed(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [10] * 3, parallelism=1, on_failure="FailFast")
    (workflow,) = holding(at)
    end(at, at.begin(workflow), workflow, code=ErrCode.LOST)
    assert codes(at) == ["LOST", "SKIPPED", "SKIPPED"]
    pg.finish(at.run.intent_id, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, at.run.intent_id), count=1)
    assert pg.work.begin_execution(replace(at.execution, execution_no=2))
    (again,) = holding(at)
    attempt: Attempt | None = at.begin(again)
    while attempt is not None and attempt.fence is not None:
        attempt = end(at, attempt, again, carry=True)
    assert codes(at) == ["NONE"] * 3


# ------------------------------------------------------------------ sandbox minutes


def test_a_task_reserves_its_time_limit_and_settles_what_it_took(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60] * 5, parallelism=5, max_sandbox_minutes=2)
    assert len(holding(at)) == 2 and reserved(at) == (0, 2 * MINUTE), "two fit into two minutes"
    workflow = holding(at)[0]
    end(at, at.begin(workflow), workflow, ms=1000)
    assert reserved(at) == (1000, MINUTE), "59 s are left, the next one may take 60"
    workflow = holding(at)[0]
    end(at, at.begin(workflow), workflow, ms=1000)
    assert reserved(at) == (2000, MINUTE)
    workflow = holding(at)[0]
    end(at, at.begin(workflow), workflow, ms=MINUTE)
    assert codes(at) == ["NONE", "NONE", "NONE", "BUDGET", "BUDGET"], (
        "58 s are left, and nothing runs that gives any back"
    )
    assert at.enqueued("finish") == [":finish:1"]


def test_time_that_comes_back_fills_the_window_again(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [110, 10, 10, 10, 10], parallelism=4, max_sandbox_minutes=2)
    assert len(holding(at)) == 2 and reserved(at) == (0, 2 * MINUTE)
    workflow = holding(at)[0]
    following = end(at, at.begin(workflow), workflow, ms=1000, carry=True)
    assert following is not None and following.fence is not None
    assert len(holding(at)) == 4, "the carried one and three more"


def test_tasks_are_taken_in_the_plans_order_though_a_later_one_would_fit(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60, 90, 1], parallelism=3, max_sandbox_minutes=2)
    assert len(holding(at)) == 1
    workflow = holding(at)[0]
    end(at, at.begin(workflow), workflow, ms=60_000)
    assert codes(at) == ["NONE", "BUDGET", "BUDGET"]


def test_nothing_fits_from_the_beginning(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [120, 1], max_sandbox_minutes=1)
    assert codes(at) == ["BUDGET", "BUDGET"] and at.enqueued("finish") == [":finish:1"]


def test_what_a_lost_attempt_took_is_spent(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60] * 2, parallelism=1, max_sandbox_minutes=1)
    workflow = holding(at)[0]
    at.begin(workflow)
    pg.rows(
        "UPDATE app.sbx_runs SET started_at = started_at - interval '20 seconds' WHERE run_id = %s RETURNING 1",
        at.run.run_id,
    )
    second = at.begin(workflow)
    assert 20_000 <= reserved(at)[0] < 30_000
    assert 20_000 <= now(pg, at.run.intent_id).tasks.sandbox_ms < 30_000, "status.usage says what the budget says"
    end(at, second, workflow, ms=5)
    assert codes(at) == ["NONE", "BUDGET"]


def test_a_second_execution_of_the_plan_has_what_the_first_one_left(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60] * 2, parallelism=1, max_sandbox_minutes=2)
    back = "UPDATE app.runs SET executing_since = executing_since - interval '100 seconds' WHERE id = %s RETURNING 1"
    pg.rows(back, at.run.run_id)
    for code in (ErrCode.NONE, ErrCode.LOST):
        workflow = holding(at)[0]
        end(at, at.begin(workflow), workflow, ms=50_000, code=code)
    pg.finish(at.run.intent_id, Event.EXCEED, "InfrastructureFailed")
    assert pg.store.retry(now(pg, at.run.intent_id), count=1)
    assert pg.work.begin_execution(replace(at.execution, execution_no=2))
    assert codes(at) == ["NONE", "BUDGET"], "20 s were left"


def test_a_new_plan_has_all_its_minutes(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60], parallelism=1, max_sandbox_minutes=1)
    workflow = holding(at)[0]
    end(at, at.begin(workflow), workflow, ms=50_000, code=ErrCode.CMD_NONZERO)
    pg.finish(at.run.intent_id, Event.FAIL, "TaskFailed")
    assert pg.store.retry(now(pg, at.run.intent_id), count=1)
    pg.plan_ready(at.run.intent_id)
    planned = now(pg, at.run.intent_id)
    assert pg.store.record_approval_object(planned, name=str(planned.approval_name), uid=APPROVAL_UID)
    assert pg.store.approve(now(pg, at.run.intent_id), [vote()])
    tasks = [replace(t, task_key=f"{t.task_key}:2") for t in at.execution.tasks]
    assert pg.work.begin_execution(replace(at.execution, execution_no=2, generation=2, tasks=tasks))
    assert len(holding(at)) == 1


def test_plenty_is_not_counted(pg: InPostgres) -> None:  # noqa: F811
    at = window(pg, [60] * 3, parallelism=2, max_sandbox_minutes=10)
    room = "SELECT app.sandbox_room(r) FROM app.runs r WHERE id = %s"
    assert pg.one(room, at.run.run_id) is None
    since = "UPDATE app.runs SET executing_since = executing_since - interval '10 minutes' WHERE id = %s RETURNING 1"
    pg.rows(since, at.run.run_id)
    assert pg.one(room, at.run.run_id) == 10 * MINUTE - 2 * MINUTE


@pytest.mark.parametrize("seed", range(6))
def test_finishers_at_once_never_reserve_more_than_there_is(pg: InPostgres, seed: int) -> None:  # noqa: F811
    chance = random.Random(seed)
    limits = [chance.randint(1, 30) for _ in range(40)]
    at = window(pg, limits, parallelism=8, max_sandbox_minutes=chance.randint(1, 4))
    budget = (
        pg.one("SELECT (settings->>'max_sandbox_minutes')::int FROM app.runs WHERE id = %s", at.run.run_id) * MINUTE
    )

    def slot(workflow: str, took: random.Random) -> bool:
        attempt: Attempt | None = pg.work.begin_attempt(at.run.run_id, workflow)
        while attempt is not None and attempt.fence is not None:
            assert sum(reserved(at)) <= budget
            assert attempt.request is not None
            ms = took.randint(1, attempt.request.timeout_ms)
            attempt = end(at, attempt, workflow, ms=ms, carry=took.random() < 0.7)
        return True

    while begun := holding(at):
        assert all(race(*(partial(slot, w, random.Random(f"{seed}{w}")) for w in begun)))
    assert set(codes(at)) <= {"NONE", "BUDGET"} and sum(reserved(at)) <= budget
    assert at.enqueued("finish") == [":finish:1"]
