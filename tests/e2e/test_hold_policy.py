"""Law 8, the approver is whom the API server authenticated: while the live policies are not the shipped ones nothing executes.

These tests change cluster-scoped objects of the session's cluster, and always put them back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from devcluster.stack import Controller
from tests.e2e.product import APPROVE, Product

POLICY, BINDING = "validatingadmissionpolicy", "validatingadmissionpolicybinding"
NAME = "planapproval.sisukodo.dev"
Step = dict[str, Any]


def op(what: str, path: str, value: Any = None) -> Step:
    return {"op": what, "path": path, **({} if what == "remove" else {"value": value})}


def without_own_name(product: Product) -> list[Step]:
    """The validation that says: under your own name only."""
    rules = json.loads(product.kubectl("get", POLICY, NAME, "-o", "json"))["spec"]["validations"]
    (index,) = [i for i, one in enumerate(rules) if "under your own name" in one.get("message", "")]
    return [op("remove", f"/spec/validations/{index}")]


def only_create(_: Product) -> list[Step]:
    return [op("replace", "/spec/matchConstraints/resourceRules/0/operations", ["CREATE"])]


def forgiving(_: Product) -> list[Step]:
    return [op("replace", "/spec/failurePolicy", "Ignore")]


def but_this_namespace(product: Product) -> list[Step]:
    label = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": [product.namespace]}
    return [op("add", "/spec/matchResources", {"namespaceSelector": {"matchExpressions": [label]}})]


def audit_only(_: Product) -> list[Step]:
    return [op("replace", "/spec/validationActions", ["Audit"])]


WEAKER = [
    pytest.param(POLICY, NAME, without_own_name, "spec.validations", id="narrowed"),
    pytest.param(BINDING, NAME, but_this_namespace, "does not cover everything", id="namespace-left-out"),
    pytest.param(POLICY, NAME, only_create, "spec.matchConstraints", id="only-create", marks=pytest.mark.slow),
    pytest.param(POLICY, NAME, forgiving, "spec.failurePolicy", id="failure-ignored", marks=pytest.mark.slow),
    pytest.param(BINDING, NAME, audit_only, "does not deny", id="audit-only", marks=pytest.mark.slow),
    pytest.param(
        BINDING, "status.sisukodo.dev", audit_only, "does not deny", id="status-unguarded", marks=pytest.mark.slow
    ),
]


@contextmanager
def weaker(product: Product, kind: str, name: str, steps: Sequence[Step]) -> Iterator[None]:
    """Patches a policy or binding, and puts the former spec back in the end."""
    kept = json.loads(product.kubectl("get", kind, name, "-o", "json"))
    product.kubectl("patch", kind, name, "--type=json", "-p", json.dumps(steps))
    try:
        yield
    finally:
        restored = {k: kept[k] for k in ("apiVersion", "kind", "spec")} | {"metadata": {"name": name}}
        product.kubectl("replace", "-f", "-", stdin=json.dumps(restored))
        product.stack.wait_enforced()


def assert_held(product: Product, controller: Controller, name: str, says: str) -> None:
    """Stalled with the reason, an event, the metric at 0, and nothing ran."""
    product.wait(lambda: product.status(name).get("reason") == "IdentityNotEnforced", "the status says why")
    stalled = product.condition(name, "Stalled")
    assert stalled["status"] == "True" and says in stalled["message"]
    assert product.status(name)["phase"] == "WaitingInput"
    product.wait(
        lambda: "IdentityNotEnforced" in {e["reason"] for e in product.objects("events.events.k8s.io")}, "an event"
    )
    assert "sisukodo_approval_identity_enforced 0.0" in controller.get("/metrics")[1]
    time.sleep(1)
    assert product.starts() == {} and product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]
    assert product.sql("SELECT status, execution_no FROM app.runs") == [("waiting_input", 0)]


@pytest.mark.parametrize(("kind", "policy", "change", "says"), WEAKER)
def test_law_8_nothing_executes_when_the_policy_changed_after_the_quorum(
    product: Product, kind: str, policy: str, change: Any, says: str
) -> None:
    first = product.start()
    product.apply("p", "say hello")
    product.wait_phase("p", "WaitingInput")
    first.stop()
    product.vote("p")  # honest, and not consumed yet
    with weaker(product, kind, policy, change(product)):
        second = product.start()
        assert_held(product, second, "p", says)
    assert product.wait_phase("p", "Succeeded", "Failed")["phase"] == "Succeeded", "the same vote is consumed now"
    assert product.sql("SELECT approver FROM app.plan_approvals") == [("alice@corp",)]
    assert "sisukodo_approval_identity_enforced 1.0" in second.get("/metrics")[1]
    assert product.condition("p", "Stalled") == {}
    product.assert_once()


def test_law_8_a_vote_under_a_foreign_name_is_never_consumed(product: Product) -> None:
    """bob may edit and not approve. Without the policy's rule he writes alice's name."""
    controller = product.start()
    product.apply("p", "say hello")
    product.wait_phase("p", "WaitingInput")
    forged = APPROVE.replace('{"verdict"', '{"approver":"alice@corp","verdict"')
    with weaker(product, BINDING, NAME, but_this_namespace(product)):
        product.wait(
            lambda: product.vote("p", user="bob", patch=forged, check=False).returncode == 0,
            "the API server has dropped the policy for this namespace",
        )
        assert_held(product, controller, "p", "does not cover everything")
        product.patch_intent("p", {"cancel": True})  # the runbook's advice where one cannot tell who voted
        product.wait_phase("p", "Canceled")
    assert product.starts() == {}
