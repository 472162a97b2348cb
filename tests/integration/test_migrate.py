"""Migrations: any number of times, any number at once; never edited; and who may write what afterwards."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest

from controller.core.errors import Permanent
from controller.db.migrate import FOLDER, migrate
from devcluster.postgres import Postgres

OURS = sorted(p.name for p in FOLDER.glob("[0-9]*.sql"))


@pytest.fixture
def empty(postgres: Postgres) -> str:
    """URL of a database that nobody has migrated."""
    return postgres.create_database(f"m_{uuid4().hex[:12]}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of our migrations."""
    copy = tmp_path / "migrations"
    shutil.copytree(FOLDER, copy)
    return copy


def one(url: str, statement: LiteralString, *params: Any) -> Any:
    with psycopg.connect(url, autocommit=True) as c:
        row = c.execute(statement, params).fetchone()
        assert row is not None
        return row[0]


def test_the_second_time_there_is_nothing_to_do(empty: str) -> None:
    assert migrate(empty) == OURS
    store = one(empty, "SELECT id FROM app.store")
    assert migrate(empty) == []
    assert one(empty, "SELECT id FROM app.store") == store
    assert one(empty, "SELECT count(*) FROM app.migrations") == len(OURS)


@pytest.mark.timeout(40)
def test_two_at_once_apply_each_migration_once(empty: str) -> None:
    applied: list[Any] = []

    def run() -> None:
        try:
            applied.append(migrate(empty))
        except Exception as e:  # noqa: BLE001 - compared below
            applied.append(e)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(applied) == 3, "they wait for each other"
    assert sorted(applied, key=str) == sorted([OURS, [], []], key=str)


def test_two_databases_of_one_server_migrate_at_once(postgres: Postgres) -> None:
    urls = [postgres.create_database(f"m_{uuid4().hex[:12]}") for _ in range(2)]
    applied: list[Any] = []

    def run(url: str) -> None:
        try:
            applied.append(migrate(url))
        except Exception as e:  # noqa: BLE001 - compared below
            applied.append(e)

    threads = [threading.Thread(target=run, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert applied == [OURS, OURS]


def test_an_edited_migration_is_refused_and_named(empty: str, folder: Path) -> None:
    migrate(empty, folder=folder)
    first = folder / OURS[0]
    first.write_text(first.read_text() + "\n-- edited\n")
    with pytest.raises(Permanent, match=OURS[0]):
        migrate(empty, folder=folder)


def test_a_new_migration_is_applied_after_the_others(empty: str, folder: Path) -> None:
    migrate(empty, folder=folder)
    (folder / "0900_pre_more.sql").write_text("CREATE TABLE app.more (a int);")
    assert migrate(empty, folder=folder) == ["0900_pre_more.sql"]
    assert one(empty, "SELECT count(*) FROM app.more") == 0


def test_a_migration_that_fails_leaves_nothing_behind_and_can_be_corrected(empty: str, folder: Path) -> None:
    migrate(empty, folder=folder)
    more = folder / "0900_pre_more.sql"
    more.write_text("CREATE TABLE app.more (a int); SELECT 1/0;")
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate(empty, folder=folder)
    more.write_text("CREATE TABLE app.more (a int);")
    assert migrate(empty, folder=folder) == ["0900_pre_more.sql"]


def test_older_code_tolerates_a_newer_pre_migration(empty: str, folder: Path) -> None:
    (folder / "0900_pre_more.sql").write_text("CREATE TABLE app.more (a int);")
    migrate(empty, folder=folder)
    assert migrate(empty) == []


def test_older_code_refuses_a_newer_post_migration_and_names_it(empty: str, folder: Path) -> None:
    (folder / "0900_post_drop.sql").write_text("ALTER TABLE app.runs DROP COLUMN feedback;")
    migrate(empty, folder=folder)
    with pytest.raises(Permanent, match=r"0900_post_drop\.sql"):
        migrate(empty)
    assert one(empty, "SELECT count(*) FROM app.migrations") == len(OURS) + 1


# ------------------------------------------------------------------ roles

TABLES_OF_WORKER = [
    "run_steps",
    "opencode_calls",
    "sbx_runs",
    "sbx_attempts",
    "mock_receipts",
    "blobs",
    "artifacts",
    "chunks",
]


def may(url: str, role: str, right: str, table: str) -> bool:
    return bool(one(url, "SELECT has_table_privilege(%s, %s, %s)", f"sisukodo_{role}", f"app.{table}", right))


def test_only_the_controller_may_record_a_decision(database: str) -> None:
    insert: LiteralString = (
        "INSERT INTO app.plan_approvals (run_id, digest, approver, verdict, approval_name, approval_uid, consumed_by)"
        " SELECT 'r', 'd', 'mallory', 'Approve', 'n', 'u', 'w' WHERE false"
    )
    with psycopg.connect(database) as c:
        c.execute("SET LOCAL ROLE sisukodo_controller")
        c.execute(insert)
    with psycopg.connect(database) as c:
        c.execute("SET LOCAL ROLE sisukodo_worker")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            c.execute(insert)
        c.rollback()
    for right in ("INSERT", "UPDATE", "DELETE", "TRUNCATE"):
        assert not may(database, "worker", right, "plan_approvals")
    assert may(database, "worker", "SELECT", "plan_approvals")


@pytest.mark.parametrize("role", ["controller", "worker"])
@pytest.mark.parametrize("right", ["UPDATE", "DELETE", "TRUNCATE"])
def test_decisions_are_append_only(database: str, role: str, right: str) -> None:
    assert not may(database, role, right, "plan_approvals")


@pytest.mark.parametrize("table", TABLES_OF_WORKER)
def test_what_ran_is_written_by_the_worker_alone(database: str, table: str) -> None:
    assert may(database, "worker", "INSERT", table)
    assert not may(database, "controller", "INSERT", table)


@pytest.mark.parametrize("role", ["controller", "worker"])
def test_nobody_but_the_migration_changes_the_store_or_its_history(database: str, role: str) -> None:
    for table in ("store", "migrations"):
        assert not any(may(database, role, right, table) for right in ("INSERT", "UPDATE", "DELETE"))


def test_a_worker_neither_opens_its_own_door_nor_makes_another_store(database: str) -> None:
    assert may(database, "controller", "UPDATE", "store_mark") and not may(database, "worker", "UPDATE", "store_mark")
    calls: LiteralString = "SELECT has_function_privilege(%s, 'app.another_store(text)', 'EXECUTE')"
    assert [one(database, calls, f"sisukodo_{role}") for role in ("controller", "worker")] == [True, False]


def test_a_worker_cannot_start_an_intent(database: str) -> None:
    assert not may(database, "worker", "INSERT", "intents") and may(database, "controller", "INSERT", "intents")


@pytest.mark.parametrize("role", ["controller", "worker"])
def test_both_roles_may_enqueue(database: str, role: str) -> None:
    with psycopg.connect(database) as c:
        c.execute("SELECT set_config('role', %s, true)", (f"sisukodo_{role}",))
        c.execute("SELECT app.enqueue('FinishWF', %s, 'r', 'v1')", (f"{role}-{uuid4()}",))
        c.rollback()


def test_the_status_of_a_run_is_one_of_the_list(database: str) -> None:
    with psycopg.connect(database) as c:
        c.execute(
            "INSERT INTO app.intents (id, namespace, name, goal, payload, spec, requested_by)"
            " VALUES ('i', 'n', 'n', 'g', '{}', '{}', '')"
        )
        with pytest.raises(psycopg.errors.CheckViolation):
            c.execute(
                "INSERT INTO app.runs (id, intent_id, workflow_id, status, settings)"
                " VALUES ('r', 'i', 'i', 'dancing', '{}')"
            )
        c.rollback()
