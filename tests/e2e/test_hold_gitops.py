"""DESIGN 3.1: whoever applies the same manifest again, and again, undoes nothing that people said, and runs nothing twice."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.e2e.product import Product

WAYS = {
    "client-side": ("apply",),
    "server-side": ("apply", "--server-side", "--field-manager=argocd"),
    "replace": ("replace",),
}
GOALS = {
    "approved": "say hello",
    "waiting": "say hello",
    "canceled": "say hello",
    "retried": "prove that one is two",
}
KEPT = ("phase", "observedRetry", "storeId", "runId", "plan")


def manifest(name: str) -> str:
    """As it lies in git: nothing in it about cancel, retry or the requester."""
    body = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "metadata": {"name": name}}
    return json.dumps({**body, "spec": {"goal": GOALS[name]}})


def planned_again(product: Product) -> bool:
    status = product.status("retried")
    return status.get("observedRetry") == 1 and status["phase"] == "WaitingInput"


@pytest.mark.parametrize("way", WAYS)
def test_law_4_applying_the_same_manifest_again_changes_nothing(product: Product, way: str) -> None:
    again = WAYS[way]
    first = ("create",) if way == "replace" else again
    product.start()
    for name in GOALS:
        product.kubectl(*first, "-f", "-", stdin=manifest(name), user="carol")
    for name in GOALS:
        product.wait_phase(name, "WaitingInput")
    product.vote("approved")
    product.vote("retried")
    product.patch_intent("canceled", {"cancel": True})
    product.wait_phase("approved", "Succeeded")
    product.wait_phase("canceled", "Canceled")
    product.wait_phase("retried", "Failed")
    product.patch_intent("retried", {"retry": 1})
    product.wait(lambda: planned_again(product), "a new plan")
    before: dict[str, dict[str, Any]] = {name: product.intent(name) for name in GOALS}
    transitions = product.sql("SELECT count(*) FROM app.run_transitions")

    for _ in range(2):
        for name in GOALS:
            product.kubectl(*again, "-f", "-", stdin=manifest(name), user="carol")
    time.sleep(1.5)

    for name in GOALS:
        after = product.intent(name)
        assert after["spec"] == before[name]["spec"], name
        assert after["metadata"]["uid"] == before[name]["metadata"]["uid"]
        assert after["metadata"]["generation"] == before[name]["metadata"]["generation"]
        assert {k: after["status"].get(k) for k in KEPT} == {k: before[name]["status"].get(k) for k in KEPT}, name
    assert before["canceled"]["spec"]["cancel"] is True and before["retried"]["spec"]["retry"] == 1
    assert {one["spec"]["requestedBy"] for one in before.values()} == {"carol@corp"}
    assert product.sql("SELECT count(*) FROM app.run_transitions") == transitions, "no run moved"
    assert sorted(product.starts().values()) == [1, 1], "hello once, the red test once"
    product.vote("waiting")
    assert product.wait_phase("waiting", "Succeeded", "Failed")["phase"] == "Succeeded"
    assert len(product.starts()) == 3
    product.assert_once()


@pytest.mark.parametrize("way", WAYS)
def test_law_4_a_manifest_applied_by_somebody_else_keeps_the_requester(product: Product, way: str) -> None:
    """Four eyes rest on it: an administrator's GitOps robot must not become the requester of what carol asked for."""
    product.start()
    product.kubectl("create", "-f", "-", stdin=manifest("waiting"), user="carol")
    product.wait_phase("waiting", "WaitingInput")
    product.kubectl(*WAYS[way], "-f", "-", stdin=manifest("waiting"), user="bob")
    assert product.intent("waiting")["spec"]["requestedBy"] == "carol@corp"
    assert product.sql("SELECT requested_by FROM app.intents") == [("carol@corp",)]


def test_law_1_the_same_manifest_after_a_delete_is_a_new_intent(product: Product) -> None:
    product.start()
    old = product.apply("approved", "say hello")
    product.wait_phase("approved", "WaitingInput")
    product.vote("approved")
    product.wait_phase("approved", "Succeeded")
    product.kubectl("delete", "intent", "approved", "--timeout=10s", user="carol")
    new = product.apply("approved", "say hello")
    product.wait_phase("approved", "WaitingInput")
    assert new != old
    assert sorted(product.sql("SELECT id FROM app.intents")) == sorted([(old,), (new,)])
    assert sum(product.starts().values()) == 1, "the other one's approval is not this one's"
    workflows = product.sql("SELECT workflow_uuid FROM dbos.workflow_status WHERE name = 'RunIntentWF'")
    assert sorted(workflows) == sorted([(old,), (new,)])
