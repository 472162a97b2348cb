"""DESIGN section 4: a deleted Intent's run is canceled, whoever was away; absence alone cancels nothing, and never in masses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster.stack import ROOT
from tests.e2e.product import Product

CRDS = Path(__file__).parents[2] / "crds"
SETTLE_SECONDS = 45.0


def gone(product: Product) -> None:
    product.wait(lambda: product.objects("intents") == [], "the Intent is gone", seconds=SETTLE_SECONDS)


def delete(product: Product, name: str) -> None:
    product.kubectl("delete", "intent", name, "--wait=false", user="carol")


def canceled(product: Product) -> None:
    """Rows outlive the object, and nothing is left running."""
    product.wait(
        lambda: product.sql("SELECT status, reason FROM app.runs") == [("canceled", "Deleted")],
        "the run is canceled",
        seconds=SETTLE_SECONDS,
    )
    assert product.sql("SELECT count(*) FROM app.sbx_attempts WHERE state = 'created'") == [(0,)]
    assert product.sql("SELECT count(*) FROM app.sbx_runs WHERE status IN ('queued', 'running')") == [(0,)]
    assert product.sql("SELECT id FROM app.runs WHERE closed > execution_no") == []


def test_deleted_while_queued(product: Product) -> None:
    """No worker: the run stays queued until it is deleted."""
    product.start(program=("-m", "controller", "run", "--role", "controller"))
    product.apply("d", "say hello")
    product.wait(lambda: product.sql("SELECT status FROM app.runs") == [("queued",)], "queued")
    delete(product, "d")
    gone(product)
    canceled(product)
    product.start()  # whoever takes the queued workflow up finds nothing to do
    product.wait(
        lambda: product.sql("SELECT status FROM dbos.workflow_status") in ([("SUCCESS",)], [("CANCELLED",)]),
        "the workflow has ended",
    )
    assert product.sql("SELECT status FROM app.runs") == [("canceled",)]
    assert product.sql("SELECT count(*) FROM app.opencode_calls") == [(0,)]


def test_deleted_while_waiting(product: Product) -> None:
    product.start()
    product.apply("d", "say hello")
    product.wait_phase("d", "WaitingInput")
    delete(product, "d")
    gone(product)
    canceled(product)
    assert product.starts() == {}
    product.wait(lambda: product.objects("planapprovals") == [], "its approval goes with it", seconds=SETTLE_SECONDS)


def test_deleted_while_running_and_the_controller_is_killed(product: Product) -> None:
    # Its lease outlives a slow start of the next one, so that no worker begins the task again before the deletion is seen.
    first = product.start(SBX_MODE="live", LEASE_TTL_SECONDS="20")
    product.apply("d", "wait very long")
    product.wait_phase("d", "WaitingInput")
    product.vote("d")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    first.kill()
    delete(product, "d")
    time.sleep(0.5)
    assert "deletionTimestamp" in product.intent("d")["metadata"], "the finalizer holds it"
    product.start(SBX_MODE="live")
    gone(product)
    canceled(product)
    assert sum(product.starts().values()) == 1


@pytest.mark.parametrize("voted", [False, True], ids=["waiting", "approved"])
def test_deleted_while_the_controller_is_down(product: Product, *, voted: bool) -> None:
    first = product.start()
    product.apply("d", "say hello")
    product.wait_phase("d", "WaitingInput")
    first.stop()
    if voted:
        product.vote("d")
    delete(product, "d")
    product.start()
    gone(product)
    canceled(product)
    assert product.starts() == {}, "a deletion wins over a vote that nobody has counted"


def test_deleted_without_its_finalizer_while_the_controller_is_down(product: Product) -> None:
    """An administrator took the finalizer off: the object is gone before anybody could cancel. Absence, confirmed by a GET."""
    first = product.start()
    product.apply("d", "say hello")
    product.apply("other", "say hello")
    for name in ("d", "other"):
        product.wait_phase(name, "WaitingInput")
    first.stop()
    product.kubectl("patch", "intent", "d", "--type=merge", "-p", '{"metadata":{"finalizers":null}}', user="controller")
    product.kubectl("delete", "intent", "d", "--timeout=10s", user="carol")
    product.start()
    query = "SELECT i.name, r.status FROM app.runs r JOIN app.intents i ON i.id = r.intent_id ORDER BY 1"
    product.wait(lambda: product.sql(query) == [("d", "canceled"), ("other", "waiting_input")], "d is canceled, alone")


def test_the_namespace_is_deleted_while_a_task_runs(product: Product) -> None:
    product.start(SBX_MODE="live")
    product.apply("d", "wait very long")
    product.wait_phase("d", "WaitingInput")
    product.vote("d")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    product.stack.kubectl("delete", "namespace", product.namespace, "--wait=false")
    canceled(product)

    def namespace_gone() -> bool:
        return product.stack.kubectl("get", "namespace", product.namespace, check=False).returncode != 0

    try:
        product.wait(namespace_gone, "nothing of ours holds the namespace", seconds=30)
    finally:
        product.stack.kubectl("create", "namespace", product.namespace, check=False)  # Product deletes it
    assert sum(product.starts().values()) == 1


@pytest.mark.slow
def test_many_missing_intents_are_a_fault_and_not_deletions(product: Product) -> None:
    """More than ten at once: an empty list, a wrong cluster, a restored etcd. Nothing is canceled until somebody looks."""
    first = product.start()
    names = [f"m{n}" for n in range(11)]
    body = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "spec": {"goal": "say hello"}}
    many = {"apiVersion": "v1", "kind": "List", "items": [{**body, "metadata": {"name": n}} for n in names]}
    product.kubectl("apply", "-f", "-", stdin=json.dumps(many), user="carol")
    counted = "SELECT status, count(*) FROM app.runs GROUP BY 1"
    product.wait(lambda: product.sql(counted) == [("waiting_input", 11)], "all wait")
    product.wait(lambda: len(product.objects("planapprovals")) == 11, "all are shown")
    first.stop()
    for name in names:
        patch = '{"metadata":{"finalizers":null}}'
        product.kubectl("patch", "intent", name, "--type=merge", "-p", patch, user="controller")
    product.kubectl("delete", "intents", "--all", "--timeout=20s")
    second = product.start(RESYNC_SECONDS="1")
    product.wait(lambda: "many runs without their Intent" in second.log.read_text(), "the log says so")
    time.sleep(2)
    assert product.sql(counted) == [("waiting_input", 11)]
    assert "sisukodo_runs_orphaned 11.0" in second.get("/metrics")[1]

    # Somebody has looked.
    listed = orphans(product).splitlines()
    assert sorted(line.split()[:2] for line in listed) == sorted([product.namespace, name] for name in names)
    assert {line.split()[3] for line in listed} == {"WaitingInput"}
    assert product.sql(counted) == [("waiting_input", 11)]
    assert orphans(product, "--cancel") and product.sql(counted) == [("canceled", 11)]
    product.wait(lambda: "sisukodo_runs_orphaned 0.0" in second.get("/metrics")[1], "none is left")
    assert orphans(product) == ""


def orphans(product: Product, *options: str) -> str:
    """What `python -m controller orphans` prints, with the controller's settings."""
    environ = product.stack.environment(DATABASE_URL=product.database)
    command = [sys.executable, "-m", "controller", "orphans", *options]
    return subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


# --------------------------------------------------------------------------- last: it takes the kind away from everybody


@contextmanager
def without_the_kind(product: Product) -> Iterator[None]:
    """The CRD of Intents is deleted, with every Intent; in the end the chart is installed again."""
    for name in [one["metadata"]["name"] for one in product.objects("intents")]:
        patch = '{"metadata":{"finalizers":null}}'
        product.kubectl("patch", "intent", name, "--type=merge", "-p", patch, user="controller")
    product.stack.kubectl("delete", "crd", "intents.sisukodo.dev", "--timeout=90s")
    try:
        yield
    finally:
        product.stack.install()


@pytest.mark.slow
def test_a_missing_kind_is_not_deletion(product: Product) -> None:
    first = product.start()
    for name in ("a", "b"):
        product.apply(name, "say hello")
    for name in ("a", "b"):
        product.wait_phase(name, "WaitingInput")
    first.stop()
    with without_the_kind(product):
        second = product.start(RESYNC_SECONDS="1")  # exit code 75, and a restart by the Deployment, would be right, too
        time.sleep(5)
        assert product.sql("SELECT status FROM app.runs") == [("waiting_input",), ("waiting_input",)]
        second.stop()


BY_NAME = (
    "SELECT i.name, r.status, r.reason FROM app.runs r JOIN app.intents i ON i.id = r.intent_id ORDER BY i.created_at"
)


@pytest.mark.slow
def test_an_execution_goes_on_without_the_kind_and_another_intent_of_that_name_is_another_run(product: Product) -> None:
    """The kind goes, without its finalizers, while a task runs and nobody watches; then it comes back, and people apply again."""
    first = product.start(SBX_MODE="live")
    for name, goal in (("busy", "wait a while"), ("idle", "say hello")):
        product.apply(name, goal)
        product.wait_phase(name, "WaitingInput")
    product.vote("busy")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    first.kill()
    with without_the_kind(product):
        second = product.start(SBX_MODE="live", RESYNC_SECONDS="1")
        ended = [("busy", "succeeded", "Succeeded"), ("idle", "waiting_input", "plan_not_approved")]
        product.wait(lambda: product.sql(BY_NAME) == ended, "what was approved is carried out, nothing is canceled")
        assert not second.child.alive() or second.get("/readyz")[0] != 200, (
            "and the door says that something is missing"
        )
    # The kind is here and the Intents are not: now they are deleted, and a person finds that in SQL and in the log.
    if not second.child.alive():
        second = product.start(SBX_MODE="live", RESYNC_SECONDS="1")
    orphans = [("busy", "succeeded", "Succeeded"), ("idle", "canceled", "Deleted")]
    product.wait(lambda: product.sql(BY_NAME) == orphans, "a run that nobody can decide any more is canceled")
    assert "Intent is gone; canceling its run" in second.log.read_text()
    started = product.starts()

    product.apply("busy", "wait a while")
    product.wait_phase("busy", "WaitingInput")
    assert product.sql(BY_NAME) == [*orphans, ("busy", "waiting_input", "plan_not_approved")]
    assert product.starts() == started, "the old approval counts for nothing"
    product.assert_once()


@pytest.mark.slow
def test_deleting_the_kind_deletes_its_intents_and_so_cancels_their_runs(product: Product) -> None:
    """`kubectl delete crd` is a deletion of every Intent: the API server marks each, and waits for our finalizer."""
    product.start(SBX_MODE="live")
    for name, goal in (("busy", "wait very long"), ("idle", "say hello")):
        product.apply(name, goal)
        product.wait_phase(name, "WaitingInput")
    product.vote("busy")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    product.stack.kubectl("delete", "crd", "intents.sisukodo.dev", "--timeout=90s")
    product.stack.install()
    canceled_both = [("busy", "canceled", "Deleted"), ("idle", "canceled", "Deleted")]
    assert product.sql(BY_NAME) == canceled_both
    assert product.sql("SELECT count(*) FROM app.sbx_attempts WHERE state = 'created'") == [(0,)]
    assert sum(product.starts().values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_controller_sees_the_kind_come_back(product: Product, when: str) -> None:
    """`running`: the kind goes under a watch that works. `starting`: it is missing when the watch begins."""
    one = product.start(RESYNC_SECONDS="300") if when == "running" else None  # the watch alone tells
    if one is not None:
        log = one.log
        product.wait(lambda: "leading identity" in log.read_text(), "it leads")
        time.sleep(1)
    with without_the_kind(product):
        one = one or product.start(RESYNC_SECONDS="300")
        time.sleep(3)
    watching = one
    product.apply("c", "say hello")
    product.wait(
        lambda: not watching.child.alive() or product.status("c").get("phase") == "WaitingInput", "it sees, or it ends"
    )
    if not watching.child.alive():  # exit code 75: a Deployment starts it again
        product.start(RESYNC_SECONDS="300")
    product.wait_phase("c", "WaitingInput", seconds=15)
    product.vote("c")
    assert product.wait_phase("c", "Succeeded", "Failed")["phase"] == "Succeeded"
    product.assert_once()
