"""Cancel, kills and a missing policy: what must not happen does not happen, and everything ends where it should."""

from __future__ import annotations

import json
import time

import psycopg

from tests.e2e.product import APPROVE, Product


def test_cancel_while_waiting_ends_at_once(product: Product) -> None:
    product.start()
    product.apply("c", "say hello")
    product.wait_phase("c", "WaitingInput")
    product.patch_intent("c", {"cancel": True})
    product.wait_phase("c", "Canceled")
    refused = product.vote("c", check=False)
    assert refused.returncode != 0 and "takes no more decisions" in refused.stderr
    assert product.starts() == {}
    product.wait(lambda: "finalizers" not in product.intent("c")["metadata"], "the finalizer is gone")


def test_cancel_while_running_kills_the_sandbox_and_then_closes(product: Product) -> None:
    product.start(SBX_MODE="live")
    product.apply("c", "wait very long")
    product.wait_phase("c", "WaitingInput")
    product.vote("c")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    began = time.monotonic()
    product.patch_intent("c", {"cancel": True})
    product.wait_phase("c", "Canceled", seconds=15)
    assert time.monotonic() - began < 15, "sleep 60 did not run to its end"
    assert product.sql("SELECT status, err_code FROM app.sbx_runs") == [("failed", "CANCELED")]
    assert product.sql("SELECT count(*) FROM app.sbx_attempts WHERE state = 'created'") == [(0,)]


def test_deleting_a_running_intent_cancels_and_lets_it_go(product: Product) -> None:
    product.start()
    product.apply("d", "wait very long")
    product.wait_phase("d", "WaitingInput")
    product.vote("d")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    product.kubectl("delete", "intent", "d", "--wait=false", user="carol")
    product.wait(lambda: product.objects("intents") == [], "the Intent is gone", seconds=20)
    assert product.sql("SELECT status, reason FROM app.runs") == [("canceled", "Deleted")], "rows outlive the CR"


def test_sigkill_while_waiting_loses_nothing(product: Product) -> None:
    first = product.start()
    product.apply("k", "say hello")
    product.wait_phase("k", "WaitingInput")
    first.kill()
    product.vote("k")  # nobody is there to see it
    product.start()
    assert product.wait_phase("k", "Succeeded", "Failed")["phase"] == "Succeeded"
    assert sum(product.starts().values()) == 1
    product.assert_once()


def test_sigkill_inside_the_sandbox_gives_one_effective_outcome(product: Product) -> None:
    first = product.start(SBX_MODE="live")
    product.apply("k", "wait a while")
    product.wait_phase("k", "WaitingInput")
    product.vote("k")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    first.kill()
    product.start(SBX_MODE="live")
    assert product.wait_phase("k", "Succeeded", "Failed", seconds=60)["phase"] == "Succeeded"
    assert list(product.starts().values()) == [2], "the interrupted command was started again, and the sandboxes say so"
    attempts = product.sql("SELECT attempt, state FROM app.sbx_attempts ORDER BY attempt")
    assert attempts == [(1, "unknown"), (2, "done")]
    assert product.sql("SELECT outcomes, attempt, status FROM app.sbx_runs") == [(1, 2, "succeeded")]
    product.assert_once()


# What is left in the database when PostgreSQL commits a worker's claim and the answer is lost with the connection.
LOST_CLAIMS = """
CREATE TABLE public.lost_claims (name text PRIMARY KEY);
CREATE FUNCTION public.lose_claim() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.lost_claims VALUES (NEW.name) ON CONFLICT DO NOTHING;
  IF FOUND THEN
    NEW.status := 'PENDING'; NEW.executor_id := (SELECT executor_id FROM app.executor_leases); NEW.recovery_attempts := 1;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER lose_claim BEFORE INSERT ON dbos.workflow_status FOR EACH ROW EXECUTE FUNCTION public.lose_claim()"""


def test_claims_whose_answer_was_lost_are_claimed_again(product: Product) -> None:
    product.start()
    with psycopg.connect(product.database, autocommit=True) as c:
        c.execute(LOST_CLAIMS)
    product.apply("c", "twenty short waits", limits={"parallelism": 4})
    product.wait_phase("c", "WaitingInput")
    product.vote("c")
    assert product.wait_phase("c", "Succeeded", "Failed", seconds=60)["phase"] == "Succeeded"
    lost = product.sql("SELECT name FROM public.lost_claims ORDER BY name")
    assert lost == [("ExecutePlanWF",), ("FinishWF",), ("RunIntentWF",), ("TaskWF",)], "one of each kind was lost"
    assert set(product.starts().values()) == {1}, "nothing ran twice for it"
    product.assert_once()


def test_an_idle_worker_does_not_read_its_queues_settings_at_each_poll(product: Product) -> None:
    """We replace a private method of DBOS for that (workflows/engine.py): an upgrade may stop calling it, without a word."""
    reads = "SELECT sum(seq_scan + idx_scan) FROM pg_stat_user_tables WHERE schemaname = 'dbos' AND relname = 'queues'"
    product.start()
    product.wait(lambda: product.sql(reads)[0][0] > 0, "a table of this name is read")
    time.sleep(2)  # what a connection has counted is told within a second or two
    ((before,),) = product.sql(reads)
    time.sleep(4)  # 80 polls
    ((after,),) = product.sql(reads)
    assert after - before < 20


def test_sigkill_during_a_fan_out_accepts_every_task_once(product: Product) -> None:
    first = product.start()
    product.apply("f", "twenty short waits", limits={"parallelism": 4})
    product.wait_phase("f", "WaitingInput")
    product.vote("f")
    product.wait(lambda: sum(product.starts().values()) >= 5, "some tasks have begun")
    first.kill()
    product.start()
    assert product.wait_phase("f", "Succeeded", "Failed", seconds=60)["phase"] == "Succeeded"
    assert product.sql("SELECT count(*), sum(outcomes) FROM app.sbx_runs") == [(20, 20)]
    assert product.sql("SELECT closed FROM app.runs") == [(1,)]
    product.assert_once()


def test_nothing_executes_while_the_policy_is_deleted(product: Product) -> None:
    controller = product.start()
    product.apply("p", "say hello")
    product.wait_phase("p", "WaitingInput")
    approval = product.approval_of("p")
    policy = "planapproval.sisukodo.dev"
    kept = json.loads(product.kubectl("get", "validatingadmissionpolicy", policy, "-o", "json"))
    product.kubectl("delete", "validatingadmissionpolicy", policy)
    try:
        # Without the policy anybody with update rights could vote under any name; bob forges one.
        forged = APPROVE.replace('{"verdict"', '{"approver":"alice@corp","verdict"')
        product.wait(
            lambda: (
                product.stack.kubectl(
                    "-n",
                    product.namespace,
                    "patch",
                    "pa",
                    approval,
                    "--type=json",
                    "-p",
                    forged,
                    user="bob",
                    check=False,
                ).returncode
                == 0
            ),
            "the API server has dropped the policy",
        )
        product.wait(lambda: product.status("p").get("reason") == "IdentityNotEnforced", "the status says why")
        time.sleep(2)
        assert product.status("p")["phase"] == "WaitingInput" and product.starts() == {}
        assert product.condition("p", "Stalled")["status"] == "True"
        assert "sisukodo_approval_identity_enforced 0.0" in controller.get("/metrics")[1]
        assert product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]
    finally:
        body = {k: kept[k] for k in ("apiVersion", "kind", "spec")} | {"metadata": {"name": policy}}
        product.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))
        product.stack.wait_enforced()


def test_sigterm_ends_within_five_seconds_while_a_task_runs(product: Product) -> None:
    first = product.start(SBX_MODE="live")
    product.apply("t", "wait very long")
    product.wait_phase("t", "WaitingInput")
    product.vote("t")
    product.wait(lambda: sum(product.starts().values()) == 1, "the task has begun")
    assert first.stop() < 5
    product.start(SBX_MODE="live")
    product.wait(lambda: sum(product.starts().values()) == 2, "taken over", seconds=20)
    product.patch_intent("t", {"cancel": True})
    product.wait_phase("t", "Canceled", seconds=20)


def test_a_proxy_for_git_is_not_on_the_way_to_the_api_server(product: Product) -> None:
    product.start(HTTPS_PROXY="http://127.0.0.1:1")
    product.apply("p", "say hello")
    product.wait_phase("p", "WaitingInput")
