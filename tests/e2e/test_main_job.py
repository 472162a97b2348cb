"""The main job through the real API server and kubectl: apply, plan, approve, execute, report."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.product import REJECT, Product


def test_an_approved_intent_is_executed_once_and_reported(product: Product) -> None:
    product.start()
    uid = product.apply("hello", "say hello")
    waiting = product.wait_phase("hello", "WaitingInput")
    assert waiting["lastStep"] == "DecideST" and waiting["reason"] == "plan_not_approved"
    assert waiting["workflowId"] == uid
    assert product.sql("SELECT count(*) FROM app.sbx_runs") == [(0,)], "nothing runs before approval"

    product.vote("hello")
    done = product.wait_phase("hello", "Succeeded", "Failed")

    assert done["phase"] == "Succeeded" and done["lastStep"] == "ExecuteST"
    assert done["tasks"]["display"] == "1/1"
    product.kubectl("wait", "--for=condition=Finished", "intent/hello", "--timeout=5s")
    product.wait(lambda: "finalizers" not in product.intent("hello")["metadata"], "the finalizer is gone")
    assert product.sql("SELECT approver, verdict FROM app.plan_approvals") == [("alice@corp", "Approve")]
    assert product.sql("SELECT workflow_uuid, queue_name FROM dbos.workflow_status WHERE name = 'RunIntentWF'") == [
        (uid, "intentQ")
    ]
    assert sum(product.starts().values()) == 1
    product.assert_once()
    approval = json.loads(product.kubectl("get", "pa", "-o", "json"))["items"][0]
    assert approval["status"]["decision"] == "Approved"
    assert approval["status"]["consumedBy"]["workflowId"] == f"{uid}:execute:1"
    reasons = {e["reason"] for e in product.objects("events.events.k8s.io")}
    assert {"PlanReady", "ApprovedBy", "Succeeded"} <= reasons
    for person in ("carol", "alice"):
        described = product.kubectl("describe", "intent", "hello", user=person)
        events = described.partition("\nEvents:")[2]
        assert all(reason in events for reason in ("PlanReady", "ApprovedBy", "Succeeded")), f"{person} sees:{events}"


def test_a_rejected_plan_never_runs(product: Product) -> None:
    product.start()
    product.apply("hello", "say hello")
    product.wait_phase("hello", "WaitingInput")
    product.vote("hello", patch=REJECT)
    done = product.wait_phase("hello", "Rejected")
    assert "alice@corp: too risky" in product.condition("hello", "Finished")["message"]
    assert done["nextAction"] == "To try again set spec.retry to 1"
    assert product.starts() == {} and product.sql("SELECT count(*) FROM app.sbx_runs") == [(0,)]


def test_a_red_test_fails_the_run_and_a_retry_plans_again(product: Product) -> None:
    product.start()
    product.apply("red", "prove that one is two")
    product.wait_phase("red", "WaitingInput")
    product.vote("red")
    failed = product.wait_phase("red", "Failed")
    assert failed["reason"] == "TaskFailed" and failed["failures"][0]["errCode"] == "CMD_NONZERO"
    assert sum(product.starts().values()) == 1, "a red test is never run again by itself"

    product.patch_intent("red", {"retry": 1})

    def planned_again() -> dict[str, Any] | None:
        status = product.status("red")
        return status if status.get("observedRetry") == 1 and status["phase"] == "WaitingInput" else None

    again = product.wait(planned_again, "a new plan")
    assert again["plan"]["digest"] != failed["plan"]["digest"], "a new plan needs a new approval"
    assert product.sql("SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid LIKE %s", "%:plan:2") == [(1,)]


def test_an_invalid_intent_gets_a_clear_answer_and_zero_rows(product: Product) -> None:
    product.start()
    product.apply("bad", "say hello", sandbox={"template": "windows"})
    condition = product.wait(lambda: c if (c := product.condition("bad", "Accepted")) else None, "an answer")
    assert condition["status"] == "False"
    assert "spec.sandbox.template" in condition["message"] and "python" in condition["message"]
    assert set(product.rows().values()) == {0}


def test_what_the_provider_cannot_run_is_never_shown_for_approval(product: Product) -> None:
    policy = product.stack.state / f"{product.namespace}-policy.yaml"
    policy.write_text((product.stack.state / "policy.yaml").read_text().replace("- None", "- Public"))
    assert "- Public" in policy.read_text()
    product.start(SBX_MODE="live", POLICY_FILE=str(policy))
    product.apply("net", "say hello", sandbox={"egress": {"mode": "Public"}})
    status = product.wait_phase("net", "WaitingInput", "Failed")
    assert (status["phase"], status["reason"]) == ("Failed", "PlanFailed")
    assert (
        "spec.sandbox.egress.mode: the local provider has no network"
        in product.condition("net", "Succeeded")["message"]
    )
    assert product.objects("planapprovals") == []


def test_a_suspended_intent_waits_until_it_is_released(product: Product) -> None:
    product.start()
    product.apply("later", "say hello", suspend=True)
    product.wait(lambda: product.status("later").get("reason") == "Suspended", "held")
    assert product.sql("SELECT count(*) FROM app.runs") == [(0,)]
    product.patch_intent("later", {"suspend": False})
    product.wait_phase("later", "WaitingInput")


def test_a_fan_out_runs_every_task_once_within_its_window(product: Product) -> None:
    product.start()
    product.apply("many", "run 100 small checks", limits={"parallelism": 5})
    product.wait_phase("many", "WaitingInput")
    product.vote("many")
    done = product.wait_phase("many", "Succeeded", "Failed", seconds=60)
    assert done["tasks"]["display"] == "100/100"
    assert len(product.starts()) == 100 and set(product.starts().values()) == {1}
    product.assert_once()
    joined = product.sql("SELECT jsonb_array_length(output->'tasks') FROM app.run_steps WHERE step_id = 'ExecuteST'")
    assert joined == [(100,)]


def test_a_providers_limits_make_tasks_wait_and_never_fail(product: Product) -> None:
    product.start(SBX_CREATES_PER_SECOND="40", SBX_MAX_CONCURRENT="3")
    product.apply("many", "run 100 small checks", limits={"parallelism": 20})
    product.wait_phase("many", "WaitingInput")
    product.vote("many")
    done = product.wait_phase("many", "Succeeded", "Failed", seconds=60)
    assert done["tasks"]["display"] == "100/100"
    assert set(product.starts().values()) == {1}
    product.assert_once()
    first_to_last = "extract(epoch FROM max(finished_at) - min(started_at))"
    [(seconds,)] = product.sql(f"SELECT {first_to_last} FROM app.sbx_runs")
    assert seconds > 60 / 40 * 0.9, "40 at once by the burst, then 40 a second"
    assert product.sql("SELECT count(*) FROM app.sbx_attempts WHERE admitted_by = 'mock'") == [(100,)]


def test_a_fail_fast_recipe_begins_nothing_after_a_failure(product: Product) -> None:
    product.start()
    product.apply("fast", "run five checks of which one fails", recipe="sandbox-fail-fast", limits={"parallelism": 1})
    product.wait_phase("fast", "WaitingInput")
    spec = product.objects("planapprovals")[0]["spec"]
    assert spec["plan"]["execution"]["onFailure"] == "FailFast", "whoever approves sees it"
    product.vote("fast")
    done = product.wait_phase("fast", "Succeeded", "Failed")
    assert (done["phase"], done["reason"], done["tasks"]["display"]) == ("Failed", "TaskFailed", "5/5")
    assert [f["errCode"] for f in done["failures"]] == ["CMD_NONZERO", "SKIPPED", "SKIPPED"]
    assert sum(product.starts().values()) == 3


def test_sandbox_minutes_bound_how_many_run_and_end_the_run_when_they_are_used_up(product: Product) -> None:
    product.start()
    limits = {"parallelism": 4, "maxSandboxMinutes": 1}
    product.apply("enough", "twenty short waits", limits=limits, sandbox={"taskTimeoutSeconds": 25})
    product.apply("short", "twenty short waits", limits=limits)
    for name in ("enough", "short"):
        product.wait_phase(name, "WaitingInput")
        product.vote(name)
    done = product.wait_phase("enough", "Succeeded", "Failed", seconds=60)
    assert (done["phase"], done["tasks"]["succeeded"]) == ("Succeeded", 20)
    at_once = (
        "SELECT max(n) FROM (SELECT a.fence, (SELECT count(*) FROM app.sbx_attempts b WHERE b.run_id = a.run_id"
        " AND b.created_at <= a.created_at AND b.ended_at > a.created_at) AS n"
        " FROM app.sbx_attempts a JOIN app.runs r ON r.id = a.run_id JOIN app.intents i ON i.id = r.intent_id"
        " WHERE i.name = %s) x"
    )
    assert product.sql(at_once, "enough") == [(2,)], "each reserves 25 of 60 seconds"
    over = product.wait_phase("short", "Succeeded", "Failed", seconds=60)
    assert (over["phase"], over["reason"]) == ("Failed", "BudgetExceeded")
    assert over["tasks"]["succeeded"] == 1 and {f["errCode"] for f in over["failures"]} == {"BUDGET"}
    assert "19 of 20 tasks were not run" in product.condition("short", "Succeeded")["message"]
