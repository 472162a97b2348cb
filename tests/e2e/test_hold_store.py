"""Law 10, the store has an id: a database that was reset, swapped or restored starts nothing until a person says so."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.e2e.product import APPROVE, REJECT, Product

ACKNOWLEDGE = "sisukodo.dev/acknowledge-store"


def reset(product: Product) -> None:
    """What `DROP SCHEMA` and a second migrate leave: another, empty store in the same database."""
    with psycopg.connect(product.database, autocommit=True) as c:
        c.execute("DROP SCHEMA app CASCADE")
        c.execute("DROP SCHEMA dbos CASCADE")
    product.stack.migrate(product.database)


def swap(product: Product) -> None:
    """A DATABASE_URL that points elsewhere."""
    assert product.stack.postgres is not None
    product.database = product.stack.postgres.create_database(product.namespace.replace("-", "_") + "_other")
    product.stack.migrate(product.database)


def copy(product: Product) -> str:
    """A backup of now, already restored under another name; its URL. Nobody may be connected."""
    assert product.stack.postgres is not None
    name = product.namespace.replace("-", "_")
    with psycopg.connect(product.stack.postgres.dsn, autocommit=True) as c:
        c.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name + "_copy"), sql.Identifier(name))
        )
    return product.stack.postgres.dsn_of(name + "_copy")


def store_id(product: Product) -> str:
    return str(product.sql("SELECT id FROM app.store")[0][0])


def store_behind(product: Product, name: str) -> dict[str, Any]:
    """Waits until the Intent says StoreBehind; its condition Stalled."""
    product.wait(lambda: product.status(name).get("reason") == "StoreBehind", f"{name} is StoreBehind")
    return product.condition(name, "Stalled")


def acknowledge(product: Product, name: str, *, user: str = "carol") -> Any:
    """`kubectl annotate` of the id that app.store has now."""
    args = ("annotate", "intent", name, f"{ACKNOWLEDGE}={store_id(product)}")
    return product.stack.kubectl("-n", product.namespace, *args, user=user, check=False)


def nothing_started(product: Product) -> None:
    """Zero rows: neither a run nor a workflow."""
    for table in ("app.intents", "app.runs", "app.sbx_attempts", "dbos.workflow_status"):
        assert product.sql(f"SELECT count(*) FROM {table}") == [(0,)], table


@pytest.mark.parametrize("lose", [reset, swap])
def test_law_10_another_store_starts_nothing(product: Product, lose: Any) -> None:
    first = product.start()
    product.apply("done", "say hello")
    product.wait_phase("done", "WaitingInput")
    product.vote("done")
    product.wait_phase("done", "Succeeded")
    product.apply("waiting", "say hello")
    product.apply("held", "say hello", suspend=True)
    product.wait_phase("waiting", "WaitingInput")
    product.wait(lambda: product.status("held").get("reason") == "Suspended", "held")
    old, started = store_id(product), product.starts()
    first.stop()

    lose(product)
    product.vote("waiting")  # an approval of the old store's plan
    product.patch_intent("held", {"suspend": False})
    product.start()

    for name in ("done", "waiting", "held"):
        stalled = store_behind(product, name)
        assert stalled["status"] == "True"
        assert f"{ACKNOWLEDGE}={store_id(product)}" in stalled["message"], "it says what a person would type"
        assert product.status(name)["storeId"] == old, "the Intent still says whose it is"
    assert product.status("done")["phase"] == "Succeeded" and product.status("waiting")["phase"] == "WaitingInput"
    nothing_started(product)
    assert product.starts() == started, "the sandboxes' own count"


def test_law_10_only_a_person_acknowledges_and_then_it_runs_in_the_new_store(product: Product) -> None:
    first = product.start()
    product.apply("waiting", "say hello")
    product.wait_phase("waiting", "WaitingInput")
    first.stop()
    reset(product)
    product.start()
    store_behind(product, "waiting")

    refused = acknowledge(product, "waiting", user="controller")
    assert refused.returncode != 0 and "forbidden" in refused.stderr.lower()
    nothing_started(product)

    assert acknowledge(product, "waiting").returncode == 0
    product.wait(lambda: product.status("waiting").get("storeId") == store_id(product), "this store's Intent now")
    product.wait(lambda: product.sql("SELECT status FROM app.runs") == [("waiting_input",)], "planned anew")
    product.wait(lambda: product.status("waiting").get("reason") == "plan_not_approved", "it waits for people")
    assert product.condition("waiting", "Stalled") == {}
    product.vote("waiting")
    assert product.wait_phase("waiting", "Succeeded", "Failed", seconds=15)["phase"] == "Succeeded"
    assert sum(product.starts().values()) == 1
    product.assert_once()


def test_law_10_what_had_ended_stays_ended_in_the_new_store(product: Product) -> None:
    first = product.start()
    for name, verdict, phase in (("done", APPROVE, "Succeeded"), ("no", REJECT, "Rejected")):
        product.apply(name, "say hello")
        product.wait_phase(name, "WaitingInput")
        product.vote(name, patch=verdict)
        product.wait_phase(name, phase)
    before, started = {name: product.status(name) for name in ("done", "no")}, product.starts()
    first.stop()
    reset(product)
    product.start()
    for name in before:
        store_behind(product, name)
        assert acknowledge(product, name).returncode == 0

    here = store_id(product)
    for name, old in before.items():
        product.wait(lambda name=name: product.condition(name, "Stalled") == {}, "acknowledged")  # type: ignore[misc]
        assert product.status(name) == {**old, "storeId": here}, "it says what it said, and whose it is now"
    nothing_started(product)

    for name in before:
        product.patch_intent(name, {"retry": 1})
    product.wait_phase("no", "WaitingInput")  # what a retry may reopen is planned anew, and waits for people
    assert product.sql("SELECT name FROM app.intents") == [("no",)]
    assert product.status("done")["phase"] == "Succeeded"
    assert product.starts() == started, "the sandboxes' own count"


def test_law_10_votes_of_the_old_store_do_not_count_in_the_new_one(product: Product) -> None:
    first = product.start()
    product.apply("waiting", "say hello")
    product.wait_phase("waiting", "WaitingInput")
    first.stop()
    product.vote("waiting")  # given to the old store's plan, never seen by it
    reset(product)
    product.start()
    store_behind(product, "waiting")
    assert acknowledge(product, "waiting").returncode == 0
    product.wait(lambda: product.sql("SELECT status FROM app.runs") == [("waiting_input",)], "planned anew")
    product.wait(lambda: product.status("waiting").get("reason") == "plan_not_approved", "it waits for people")
    assert product.starts() == {} and product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]


def test_law_10_a_wrong_acknowledgement_is_none(product: Product) -> None:
    first = product.start()
    product.apply("waiting", "say hello")
    product.wait_phase("waiting", "WaitingInput")
    product.kubectl("annotate", "intent", "waiting", f"{ACKNOWLEDGE}={store_id(product)}", user="carol")
    first.stop()
    reset(product)
    product.start()
    store_behind(product, "waiting")
    nothing_started(product)


def test_law_10_a_used_approval_is_never_consumed_by_an_older_copy(product: Product) -> None:
    first = product.start()
    product.apply("used", "say hello")
    product.wait_phase("used", "WaitingInput")
    first.stop()
    older = copy(product)
    second = product.start()
    product.vote("used")
    product.wait_phase("used", "Succeeded")
    approval = json.loads(product.kubectl("get", "pa", product.approval_of("used"), "-o", "json"))
    assert approval["status"]["consumedBy"]
    second.stop()
    assert sum(product.starts().values()) == 1

    product.database = older
    product.start()
    stalled = store_behind(product, "used")
    assert "never consumed again" in stalled["message"]
    assert product.sql("SELECT status FROM app.runs") == [("waiting_input",)]
    assert product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]
    # The id is the same, so acknowledging it changes nothing.
    assert acknowledge(product, "used").returncode == 0
    refused = product.vote("used", patch=APPROVE, user="admin", check=False)
    assert refused.returncode != 0 and "Approved already" in refused.stderr
    product.wait(lambda: "acknowledge-store" in json.dumps(product.intent("used")["metadata"]), "annotated")
    assert product.status("used")["reason"] == "StoreBehind"
    assert sum(product.starts().values()) == 1, "the sandboxes' own count"

    product.patch_intent("used", {"cancel": True})
    product.wait_phase("used", "Canceled")


def test_law_10_a_copy_from_before_the_intent_starts_nothing(product: Product) -> None:
    older = copy(product)
    first = product.start()
    product.apply("later", "say hello")
    product.wait_phase("later", "WaitingInput")
    product.vote("later")
    product.wait_phase("later", "Succeeded")
    first.stop()
    product.database = older
    product.start()
    store_behind(product, "later")
    nothing_started(product)
    assert sum(product.starts().values()) == 1


def test_law_10_a_copy_from_the_middle_of_an_execution_runs_nothing_again(product: Product) -> None:
    """The same store id, PENDING and ENQUEUED tasks, and a past that the copy does not know: its worker must not be faster than people."""
    first = product.start()
    product.apply("idle", "say hello")
    product.wait_phase("idle", "WaitingInput")
    product.apply("busy", "twenty short waits", limits={"parallelism": 4})
    product.wait_phase("busy", "WaitingInput")
    product.vote("busy")
    product.wait(lambda: sum(product.starts().values()) >= 5, "some tasks have begun")
    first.kill()
    older, old = copy(product), store_id(product)
    second = product.start()
    product.wait_phase("busy", "Succeeded", seconds=60)
    second.stop()
    started = product.starts()

    product.database = older
    left = "SELECT count(*) FROM dbos.workflow_status WHERE status IN ('PENDING', 'ENQUEUED')"
    assert product.sql(left)[0][0] > 0, "there is something to take up"
    third = product.start()
    for name in ("busy", "idle"):
        store_behind(product, name)
    assert "store is behind" in third.log.read_text()
    assert store_id(product) != old, "an older copy is another store"
    product.wait(lambda: product.sql(left) == [(0,)], "what was on the queues is taken up, and does nothing")
    run = "SELECT r.status, r.reason FROM app.runs r JOIN app.intents i ON i.id = r.intent_id WHERE i.name = 'busy'"
    assert product.sql(run) == [("failed", "ExecutionRefused")]
    assert product.sql("SELECT count(*) FROM app.sbx_attempts WHERE state = 'created'") == [(0,)]
    assert product.status("busy")["phase"] == "Succeeded", "people still read what was done"
    assert product.starts() == started, "the sandboxes' own count"

    for name in ("busy", "idle"):
        assert acknowledge(product, name).returncode == 0
    busy = product.wait_phase("busy", "Failed")
    assert busy["reason"] == "ExecutionRefused"
    assert "older copy" in product.condition("busy", "Finished")["message"]
    assert product.starts() == started
    product.wait(lambda: product.condition("idle", "Stalled") == {}, "this store's Intent now")
    product.vote("idle")
    product.wait_phase("idle", "Succeeded")
    assert sum(product.starts().values()) == sum(started.values()) + 1
    product.assert_once()


def test_law_10_a_restart_on_the_same_database_is_no_other_store(product: Product) -> None:
    first = product.start()
    product.apply("w", "say hello")
    product.wait_phase("w", "WaitingInput")
    here = store_id(product)
    first.kill()
    second = product.start()
    assert store_id(product) == here
    product.vote("w")
    product.wait_phase("w", "Succeeded")
    assert "store is behind" not in second.log.read_text()


def test_law_10_a_worker_of_its_own_begins_when_a_controller_has_compared(product: Product) -> None:
    product.start(program=("-m", "controller", "run", "--role", "controller"), POD_NAME="control")
    product.apply("w", "say hello")
    product.wait(lambda: product.sql("SELECT status FROM app.runs") == [("queued",)], "nobody works")
    before = product.sql("SELECT compared_at FROM app.store_mark")
    worker = product.start(program=("-m", "controller", "run", "--role", "worker"), POD_NAME="work")
    assert product.sql("SELECT compared_at FROM app.store_mark") > before, "it was not content with the last one"
    assert "worker ready" in worker.log.read_text()
    product.wait_phase("w", "WaitingInput")
    product.vote("w")
    product.wait_phase("w", "Succeeded")
    product.assert_once()
