"""The store's mark in PostgreSQL: it grows, it opens the door for workers, and an older copy becomes a store where nothing is executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import tuple_row

from controller.core.phases import Stage, Status
from controller.db import marks
from controller.db.migrate import migrate
from controller.db.pool import Pool, open_pool
from devcluster.postgres import Postgres


@pytest.fixture
def pool(postgres: Postgres, request: pytest.FixtureRequest) -> Iterator[Pool]:
    url = postgres.create_database(f"marks_{abs(hash(request.node.name)) % 10**8}")
    migrate(url)
    opened = open_pool(url, size=2, name="test")
    yield opened
    opened.close()


def sql(pool: Pool, query: str, *params: Any) -> list[tuple[Any, ...]]:
    with pool.connection() as c, psycopg.RawCursor(c, row_factory=tuple_row) as cursor:
        cursor.execute(query.encode(), params)
        return cursor.fetchall() if cursor.description else []


def insert_run(pool: Pool, run_id: str, status: Status, stage: Stage) -> None:
    """With one task that runs, one that waits, and one that has ended."""
    sql(pool, "INSERT INTO app.intents VALUES ($1, 'team', $1, 'g', '{}', '{}', 'carol')", run_id)
    sql(
        pool,
        "INSERT INTO app.runs (id, intent_id, workflow_id, status, stage, settings, execution_no, reason)"
        " VALUES ($1, $1, $1, $2, $3, '{}', 1, 'before')",
        run_id,
        status.value,
        stage.value,
    )
    for n, task in enumerate(("running", "queued", "succeeded")):
        sql(
            pool,
            "INSERT INTO app.sbx_runs (run_id, task_key, task_id, idx, generation, request, timeout_ms, status)"
            " VALUES ($1, $2, $3, $4, 1, '{}', 1, $3)",
            run_id,
            f"{run_id}/{task}",
            task,
            n,
        )
    sql(
        pool,
        "INSERT INTO app.sbx_attempts (fence, run_id, task_key, attempt, state, executor)"
        " VALUES (nextval('app.fence_seq'), $1, $2, 1, 'created', 'x')",
        run_id,
        f"{run_id}/running",
    )


def test_the_mark_only_grows(pool: Pool) -> None:
    store, first = marks.read(pool)
    assert [marks.beat(pool) for _ in range(3)] == [(store, first + n) for n in (1, 2, 3)]
    assert marks.read(pool) == (store, first + 3)


def test_a_comparison_opens_for_those_who_came_before_it(pool: Pool) -> None:
    store, _ = marks.read(pool)
    early = marks.clock(pool)
    assert not marks.compared_since(pool, early), "fail closed: nobody has compared"
    marks.compared(pool, "another store")
    assert not marks.compared_since(pool, early)
    marks.compared(pool, store)
    assert marks.compared_since(pool, early)
    assert not marks.compared_since(pool, marks.clock(pool)), "a worker that begins now waits for the next one"


def test_an_older_copy_becomes_another_store_in_which_nothing_is_executed(pool: Pool) -> None:
    before = {}
    for status in Status:
        for stage in Stage:
            run_id = f"{status.value}-{stage.value}"
            insert_run(pool, run_id, status, stage)
            before[run_id] = (status.value, "before", 0)
    store, mark = marks.read(pool)
    marks.compared(pool, store)
    early = marks.clock(pool)

    assert marks.another(pool, store) == ["running-execute"]
    assert marks.read(pool)[0] != store and marks.read(pool)[1] == mark
    assert not marks.compared_since(pool, early)
    assert marks.another(pool, store) is None, "done once"
    after = {r: (s, why, closed) for r, s, why, closed in sql(pool, "SELECT id, status, reason, closed FROM app.runs")}
    assert after == {**before, "running-execute": ("failed", "ExecutionRefused", 1)}
    tasks = "SELECT task_id, status, err_code FROM app.sbx_runs WHERE run_id = $1 ORDER BY idx"
    assert sql(pool, tasks, "running-execute") == [
        ("running", "failed", "LOST"),
        ("queued", "failed", "LOST"),
        ("succeeded", "succeeded", None),
    ]
    assert sql(pool, tasks, "canceling-execute")[0] == ("running", "running", None), (
        "a worker must still end its sandbox"
    )
    journal = "SELECT state FROM app.sbx_attempts WHERE run_id = $1"
    assert sql(pool, journal, "running-execute") == [("unknown",)]
    assert sql(pool, journal, "canceling-execute") == [("created",)]
