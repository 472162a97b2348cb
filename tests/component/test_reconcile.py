"""The control loop against an API server and a database in memory: reconcile one Intent, and the operator around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from controller.core.errors import Conflict, Permanent, SisuError, Unavailable
from controller.core.phases import Event, Stage, Status
from controller.core.run import Run
from controller.kube import identity
from controller.kube.absence import MASS
from controller.kube.cache import Cache
from controller.kube.crd import FINALIZER
from controller.kube.gate import IdentityGate
from controller.kube.operator import Operator
from controller.kube.policy import Policies
from controller.kube.reconcile import Reconciler
from tests.support.builders import DIFF, NOW, plan, task
from tests.support.fake_cluster import DENIED, NAMESPACE, SERVICE_ACCOUNT, FakeCluster, merged
from tests.support.memory_store import MemoryRunStore

POLICY = """\
default: {required: 1, allowRequester: true, templates: [python], egress: [None], maxPriority: 0,
          recipes: [sandbox-default], maxExecutions: 2}
namespaces:
  strict: {required: 2, allowRequester: false}
"""
MOMENT = 2.0  # what reconcile asks to be called again after sooner than this belongs to the same piece of work
BIG = plan([task(n, command="echo " + "x" * 100) for n in range(400)])


class Hands:
    """A Clock that only the test moves."""

    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return (self.at - NOW).total_seconds()

    def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


class World:
    """Cluster, database and one reconciler; the watch is immediate unless `blind`."""

    def __init__(self, tmp: Path, *, store_id: str = "store-1") -> None:
        self.clock = Hands()
        self.cluster = FakeCluster(namespaces={"team", "strict"})
        self.store = MemoryRunStore(clock=self.clock.now, id=store_id)
        self.later: list[tuple[str, float]] = []
        self.metrics: dict[str, float] = {}
        self.blind = False
        file = tmp / "policy.yaml"
        file.write_text(POLICY)
        self.policies = Policies(file)
        self.restart()
        self.cluster.watchers.append(self._watch)

    def restart(self) -> None:
        """Another process leads: an empty cache that is filled by a list."""
        self.cache = Cache()
        self.gate = IdentityGate(self.cluster, namespace=NAMESPACE, service_account=SERVICE_ACCOUNT)
        self.reconciler = self.make(lambda uid, seconds: self.later.append((uid, seconds)))
        for obj in self.cluster.of_kind("intents"):
            self.cache.saw_intent(obj)
        for obj in self.cluster.of_kind("planapprovals"):
            self.cache.saw_approval(obj)

    def make(self, add_later: Callable[[str, float], None]) -> Reconciler:
        return Reconciler(
            cluster=self.cluster.client,
            store=self.store,
            cache=self.cache,
            gate=self.gate,
            policies=self.policies,
            clock=self.clock,
            reporter="test",
            allow_loopback_http=False,
            private_repositories=False,
            add_later=add_later,
            observe=self.metrics.__setitem__,
        )

    def _watch(self, plural: str, kind: str, obj: Mapping[str, Any]) -> None:
        if self.blind:
            return
        if plural == "intents" and kind == "DELETED":
            self.cache.lost_intent(obj["metadata"]["uid"])
        elif plural == "intents":
            self.cache.saw_intent(obj)
        elif plural == "planapprovals" and kind == "DELETED":
            self.cache.lost_approval(obj)
        elif plural == "planapprovals":
            self.cache.saw_approval(obj)

    async def settle(self, uid: str) -> None:
        """Reconcile as the queue does: again after an error, after a write of ours came back, and when it asked for it."""
        for _ in range(16):
            before, self.later = self.cluster.version, []
            try:
                await self.reconciler.reconcile(uid)
            except SisuError:
                continue
            await self.told()
            soon = [seconds for key, seconds in self.later if key == uid and seconds <= MOMENT]
            if soon:
                self.clock.sleep(min(soon))
            elif self.cluster.version == before:
                return
        raise AssertionError("does not settle")

    async def told(self) -> None:
        """Events are emitted beside the work."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def waiting(self, name: str = "fix-median", *, plan_json: Any = None, **spec: Any) -> str:
        """An Intent whose plan waits for people; its uid."""
        uid = self.cluster.apply(name, **spec)
        await self.settle(uid)
        self.store.plan_ready(uid, diff=DIFF, plan_json=plan_json)
        await self.settle(uid)
        return uid

    def run(self, uid: str) -> Run:
        found = self.store.run(uid)
        assert found is not None
        return found

    def status(self, name: str = "fix-median", namespace: str = "team") -> dict[str, Any]:
        return dict(self.cluster.get("intents", name, namespace=namespace).get("status", {}))

    def approval(self, uid: str, namespace: str = "team") -> dict[str, Any]:
        return self.cluster.get("planapprovals", str(self.run(uid).approval_name), namespace=namespace)

    def events(self) -> list[str]:
        return sorted(e["reason"] for e in self.cluster.of_kind("events"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(c for c in status["conditions"] if c["type"] == kind)
    return found


# ------------------------------------------------------------------ the story


async def test_a_new_intent_is_protected_told_its_store_and_started(world: World) -> None:
    uid = world.cluster.apply()
    await world.settle(uid)
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == [FINALIZER]
    assert (world.status()["phase"], world.status()["storeId"]) == ("Queued", "store-1")
    assert world.store.enqueued == {uid: ("RunIntentWF", uid)}
    assert world.run(uid).requested_by == "carol@corp"


async def test_a_plan_that_is_ready_becomes_an_approval_that_shows_it(world: World) -> None:
    uid = await world.waiting()
    status, approval = world.status(), world.approval(uid)
    assert (status["phase"], status["reason"]) == ("WaitingInput", "plan_not_approved")
    assert status["plan"]["approvalName"] == approval["metadata"]["name"]
    assert approval["metadata"]["ownerReferences"][0]["uid"] == uid
    assert approval["spec"]["decisions"] == [] and approval["spec"]["plan"]["digest"] == world.run(uid).digest
    assert approval["status"]["decision"] == "Pending"
    assert world.run(uid).approval_uid == approval["metadata"]["uid"]
    assert world.events() == ["PlanReady"]


async def test_an_approval_that_the_api_server_refuses_is_said_aloud(world: World) -> None:
    """A Conflict is not logged: people would wait for an approval that never comes."""
    uid = world.cluster.apply()
    await world.settle(uid)
    world.store.plan_ready(uid, diff=DIFF)
    world.cluster.fail["create_approval"] = [Conflict("422: spec.plan.patch.files[0]: Too long")]
    with pytest.raises(Unavailable, match=r"PlanApproval fix-median-\w+ cannot be created: 422: spec.plan.patch"):
        await world.reconciler.reconcile(uid)


async def test_a_vote_starts_the_execution_and_its_end_is_told(world: World) -> None:
    uid = await world.waiting()
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await world.settle(uid)
    assert world.store.enqueued[f"{uid}:execute:1"] == ("ExecutePlanWF", world.run(uid).run_id)
    assert (world.status()["phase"], world.status()["reason"]) == ("Running", "Executing")
    decided = world.approval(uid)["status"]
    assert decided["decision"] == "Approved" and decided["consumedBy"]["workflowId"] == f"{uid}:execute:1"

    world.store.begin_tasks(uid, 2, running=2)
    await world.settle(uid)
    assert world.status()["tasks"]["running"] == 2
    for _ in range(2):
        world.store.end_task(uid)
    world.store.finish(uid, Event.SUCCEED, reason="Succeeded")
    await world.settle(uid)
    assert (world.status()["phase"], world.status()["tasks"]["display"]) == ("Succeeded", "2/2")
    assert condition(world.status(), "Finished")["status"] == "True"
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == []
    assert world.events() == ["ApprovedBy", "PlanReady", "Succeeded"]
    assert world.metrics["identity_enforced"] == 1.0


async def test_a_retry_needs_one_look_however_late_the_watch_tells_of_our_own_writes(world: World) -> None:
    """The finalizer and the status are written before the retry is decided; their echoes come when the cache has them."""
    uid = await world.waiting()
    world.cluster.vote(world.approval(uid)["metadata"]["name"], verdict="Reject")
    await world.settle(uid)
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == []
    world.cluster.apply(retry=1)
    world.blind = True
    await world.reconciler.reconcile(uid)
    assert world.run(uid).status is Status.REPAIRING


async def test_a_rejection_ends_the_run_and_a_retry_plans_anew(world: World) -> None:
    uid = await world.waiting()
    first = world.approval(uid)["metadata"]["name"]
    world.cluster.vote(first, verdict="Reject", reason="no \u202e tests")
    await world.settle(uid)
    assert (world.status()["phase"], world.approval(uid)["status"]["decision"]) == ("Rejected", "Rejected")
    assert "<U+202E>" in condition(world.status(), "Finished")["message"]
    world.cluster.apply(retry=1)
    await world.settle(uid)
    assert world.store.enqueued[f"{uid}:plan:2"] == ("RunIntentWF", uid)
    assert (world.status()["phase"], world.status()["observedRetry"]) == ("Repairing", 1)
    world.store.plan_ready(uid, diff=DIFF)
    await world.settle(uid)
    assert world.approval(uid)["metadata"]["name"] != first
    assert world.status()["phase"] == "WaitingInput"


async def test_an_approval_that_was_superseded_says_so(world: World) -> None:
    uid = await world.waiting()
    first = world.approval(uid)["metadata"]["name"]
    world.cluster.vote(first, verdict="Reject")
    await world.settle(uid)
    world.cluster.apply(retry=1)
    await world.settle(uid)
    assert world.cluster.get("planapprovals", first)["status"]["decision"] in ("Rejected", "Superseded")


async def test_nobody_decides_in_time(world: World) -> None:
    uid = await world.waiting()
    world.clock.at = NOW + timedelta(days=30)
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await world.settle(uid)
    assert world.run(uid).status is Status.EXPIRED
    assert (world.status()["phase"], world.approval(uid)["status"]["decision"]) == ("Expired", "Expired")
    assert set(world.store.enqueued) == {uid}


async def test_when_the_databases_clock_is_behind_ours_it_has_the_last_word(world: World) -> None:
    uid = await world.waiting()
    world.store.clock = lambda: NOW
    world.clock.at = NOW + timedelta(days=30)
    await world.reconciler.reconcile(uid)
    assert world.run(uid).status is Status.WAITING_INPUT
    assert world.later == [(uid, 0.5)], "asked again, but not in a tight circle"


async def test_a_database_clock_that_is_ahead_of_ours_does_not_hold_the_status_up(world: World) -> None:
    uid = await world.waiting()
    world.store.clock = lambda: world.clock.now() + timedelta(seconds=30)
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await world.settle(uid)
    assert world.status()["phase"] == "Running"


@pytest.mark.parametrize(
    ("spec", "phase", "reason"),
    [
        ({"suspend": True}, "Queued", "Suspended"),
        ({"cancel": True}, "Canceled", "Canceled"),
        ({"priority": 5}, None, "InvalidSpec"),
        ({"workspace": {"git": {"url": "http://127.0.0.1/x"}}}, None, "InvalidSpec"),
    ],
)
async def test_what_is_not_to_run_leaves_no_row(world: World, spec: Any, phase: str | None, reason: str) -> None:
    uid = world.cluster.apply(**spec)
    await world.settle(uid)
    assert (world.status().get("phase"), world.status()["reason"]) == (phase, reason)
    assert world.store.run(uid) is None and world.store.enqueued == {}
    assert "finalizers" not in world.cluster.get("intents", "fix-median")["metadata"]


async def test_unsuspending_starts(world: World) -> None:
    uid = world.cluster.apply(suspend=True)
    await world.settle(uid)
    world.cluster.apply(suspend=False)
    await world.settle(uid)
    assert set(world.store.enqueued) == {uid}


# ------------------------------------------------------------------ economy


async def everything(world: World) -> str:
    uid = await world.waiting()
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await world.settle(uid)
    world.store.begin_tasks(uid, 1, running=1)
    return uid


async def test_a_second_look_writes_nothing(world: World) -> None:
    uid = await everything(world)
    await world.settle(uid)
    for _ in range(2):
        world.clock.at += timedelta(hours=1)
        before, decided = world.cluster.writes, dict(world.store.enqueued)
        await world.reconciler.reconcile(uid)
        assert world.cluster.writes == before and world.store.enqueued == decided
        world.restart()  # and so does another process


async def test_the_whole_story_takes_few_writes(world: World) -> None:
    uid = await everything(world)
    await world.settle(uid)
    world.store.end_task(uid)
    world.store.finish(uid, Event.SUCCEED, reason="Succeeded")
    await world.settle(uid)
    calls = world.cluster.calls
    assert (calls["create_approval"], calls["set_finalizer"]) == (1, 2)
    assert calls["patch_status"] <= 9, calls


async def test_without_votes_the_approval_is_not_read_anew(world: World) -> None:
    uid = await world.waiting()
    before = world.cluster.calls["approval"]
    for _ in range(3):
        await world.reconciler.reconcile(uid)
    assert world.cluster.calls["approval"] == before


async def test_an_unknown_intent_is_no_trouble(world: World) -> None:
    await world.reconciler.reconcile("nobody")
    assert world.cluster.writes == 0


# ------------------------------------------------------------------ whose votes count


async def test_four_eyes(world: World) -> None:
    uid = world.cluster.apply("four-eyes", namespace="strict")
    await world.settle(uid)
    world.store.plan_ready(uid, diff=DIFF)
    await world.settle(uid)
    name = str(world.run(uid).approval_name)
    decisions = [{"approver": a, "verdict": "Approve"} for a in ("carol@corp", "alice@corp", "bob@corp")]
    for count in (1, 2):
        first = {"decisions": decisions[:count]}
        world.cluster.edit_spec("planapprovals", name, partial(merged, patch=first), namespace="strict")
        await world.settle(uid)
        assert world.run(uid).status is Status.WAITING_INPUT
    world.cluster.edit_spec("planapprovals", name, lambda s: {**s, "decisions": decisions}, namespace="strict")
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING
    assert [d.approver for d in world.store.decided] == ["alice@corp", "bob@corp"]


async def test_votes_are_counted_on_the_live_object_not_on_the_cached_one(world: World) -> None:
    uid = await world.waiting()
    name = world.approval(uid)["metadata"]["name"]
    world.cluster.vote(name)
    world.blind = True
    world.cluster.edit_spec("planapprovals", name, lambda s: {**s, "decisions": []})
    await world.settle(uid)
    assert world.run(uid).status is Status.WAITING_INPUT


async def test_an_approval_that_somebody_deleted_is_made_again_and_its_old_votes_are_gone(world: World) -> None:
    uid = await world.waiting()
    first = world.approval(uid)["metadata"]
    world.cluster.vote(first["name"])
    world.cluster.delete("planapprovals", first["name"])
    await world.settle(uid)
    again = world.approval(uid)["metadata"]
    assert again["name"] == first["name"] and again["uid"] != first["uid"]
    assert world.run(uid).approval_uid == again["uid"] and world.run(uid).status is Status.WAITING_INPUT
    world.cluster.vote(again["name"])
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING


async def test_a_controller_that_dies_between_making_the_approval_and_recording_it_is_succeeded(world: World) -> None:
    for _ in range(2):  # the first object, and one that replaces it
        world.store.fail["record_approval_object"] = [Unavailable("killed")]
        if not world.store.runs:
            uid = await world.waiting()
        else:
            world.cluster.delete("planapprovals", str(world.run(uid).approval_name))
            with contextlib.suppress(Unavailable):
                await world.reconciler.reconcile(uid)
        world.restart()
        await world.settle(uid)
        assert world.run(uid).approval_uid == world.approval(uid)["metadata"]["uid"]
    world.cluster.vote(str(world.run(uid).approval_name))
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING


async def test_an_approval_of_that_name_that_belongs_to_another_intent_is_not_adopted(world: World) -> None:
    uid = world.cluster.apply()
    await world.settle(uid)
    run = world.store.plan_ready(uid, diff=DIFF)
    body = {
        "metadata": {"name": str(run.approval_name), "namespace": "team"},
        "spec": {"intent": {"uid": "another"}, "plan": {"digest": "d"}, "decisions": []},
    }
    world.cluster.create("planapprovals", body)
    foreign = world.cluster.get("planapprovals", str(run.approval_name), namespace="team")
    await world.settle(uid)
    assert world.run(uid).approval_name == f"{run.approval_name}-2"
    assert world.cluster.get("planapprovals", str(run.approval_name), namespace="team") == foreign, "left alone"


async def test_an_equal_plan_of_another_store_is_superseded_and_its_votes_are_not_ours(world: World) -> None:
    uid = await world.waiting()
    first = world.run(uid)
    world.cluster.vote(str(first.approval_name))
    world.store = MemoryRunStore(clock=world.clock.now, id="store-2")
    world.cluster.acknowledge("fix-median", "store-2")
    world.restart()
    await world.settle(uid)
    world.store.plan_ready(uid, diff=DIFF)
    await world.settle(uid)
    assert world.run(uid).status is Status.WAITING_INPUT, "the old store's vote does not count"
    assert world.run(uid).approval_name == f"{first.approval_name}-2"
    old = world.cluster.get("planapprovals", str(first.approval_name), namespace="team")
    assert old["status"]["decision"] == "Superseded"


# ------------------------------------------------------------------ tampering


async def refused(world: World, uid: str, reason: str) -> None:
    await world.settle(uid)
    assert world.run(uid).status is Status.WAITING_INPUT
    assert world.store.decided == [] and set(world.store.enqueued) == {uid}
    assert (world.status()["phase"], world.status()["reason"]) == ("WaitingInput", reason)
    assert condition(world.status(), "Stalled")["status"] == "True"
    assert condition(world.approval(uid)["status"], "IdentityVerified")["status"] == "False"
    assert reason in world.events()


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: {**spec, "plan": {**spec["plan"], "summary": "harmless"}},
        lambda spec: {**spec, "plan": {**spec["plan"], "tasks": [{**spec["plan"]["tasks"][0], "command": "rm -rf /"}]}},
        lambda spec: {**spec, "policy": {**spec["policy"], "required": 1, "allowRequester": False}},
        lambda spec: {**spec, "plan": {k: v for k, v in spec["plan"].items() if k != "execution"}},
    ],
    ids=["summary", "command", "policy", "execution dropped"],
)
async def test_votes_on_a_changed_plan_do_not_count(world: World, change: Callable[[Any], Any]) -> None:
    uid = await world.waiting()
    name = world.approval(uid)["metadata"]["name"]
    world.cluster.edit_spec("planapprovals", name, change)
    world.cluster.vote(name)
    await refused(world, uid, "ApprovalTampered")


async def test_votes_on_a_plan_whose_config_map_was_changed_do_not_count(world: World) -> None:
    uid = await world.waiting(plan_json=BIG)
    approval = world.approval(uid)
    (part,) = world.cluster.of_kind("configmaps")
    assert approval["spec"]["plan"]["tasksRef"]["name"] == part["metadata"]["name"] and part["immutable"]
    world.cluster.edit_data(part["metadata"]["name"], lambda text: text.replace("echo", "rm", 1))
    world.cluster.vote(approval["metadata"]["name"])
    await refused(world, uid, "ApprovalTampered")


async def test_votes_on_a_changed_config_map_do_not_count_after_it_was_put_back(world: World) -> None:
    uid = await world.waiting(plan_json=BIG)
    (part,) = (one["metadata"]["name"] for one in world.cluster.of_kind("configmaps"))
    world.cluster.edit_data(part, lambda text: text.replace("echo", "true", 1))
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await refused(world, uid, "ApprovalTampered")
    world.cluster.edit_data(part, lambda text: text.replace("true", "echo", 1))
    world.restart()
    await refused(world, uid, "ApprovalTampered")


async def test_votes_on_a_plan_whose_config_map_is_gone_do_not_count(world: World) -> None:
    uid = await world.waiting(plan_json=BIG)
    world.cluster.delete("configmaps", world.cluster.of_kind("configmaps")[0]["metadata"]["name"])
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await refused(world, uid, "ApprovalTampered")


async def test_a_big_plan_that_nobody_touched_is_executed(world: World) -> None:
    uid = await world.waiting(plan_json=BIG)
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING


# ------------------------------------------------------------------ identity


def _without_policy(cluster: FakeCluster) -> None:
    cluster.policies = [p for p in cluster.policies if p["kind"] != identity.POLICY]


def _binding_that_warns(cluster: FakeCluster) -> None:
    for one in cluster.policies:
        if one["kind"] == identity.BINDING:
            one["spec"] = {**one["spec"], "validationActions": ["Warn"]}


def _forgery_let_through(cluster: FakeCluster) -> None:
    cluster.forged_answer = None


def _forgery_denied_by_others(cluster: FakeCluster) -> None:
    cluster.forged_answer = "403: forbidden"


@pytest.mark.parametrize(
    "breaking", [_without_policy, _binding_that_warns, _forgery_let_through, _forgery_denied_by_others]
)
async def test_without_enforced_identity_nothing_is_consumed_until_it_is_enforced_again(
    world: World, breaking: Callable[[FakeCluster], None]
) -> None:
    uid = await world.waiting()
    breaking(world.cluster)
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    await refused(world, uid, "IdentityNotEnforced")
    assert world.metrics["identity_enforced"] == 0.0
    assert (uid, 5.0) in world.later, "it looks again by itself"
    before = world.cluster.writes
    await world.reconciler.reconcile(uid)
    assert world.cluster.writes == before

    world.cluster.policies = identity.shipped(NAMESPACE, SERVICE_ACCOUNT)
    world.cluster.forged_answer = DENIED
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING
    assert not [c for c in world.status()["conditions"] if c["type"] == "Stalled"]


async def test_not_knowing_whether_identity_is_enforced_is_not_enough(world: World) -> None:
    uid = await world.waiting()
    world.cluster.vote(world.approval(uid)["metadata"]["name"])
    world.cluster.fail["list_all"] = [Unavailable("API server does not answer")]
    with pytest.raises(Unavailable):
        await world.reconciler.reconcile(uid)
    assert world.run(uid).status is Status.WAITING_INPUT


# ------------------------------------------------------------------ cancel and delete


async def test_cancel_while_tasks_run_waits_for_them(world: World) -> None:
    uid = await everything(world)
    world.cluster.apply(cancel=True)
    await world.settle(uid)
    assert world.status()["phase"] == "Canceling"
    assert FINALIZER in world.cluster.get("intents", "fix-median")["metadata"]["finalizers"]
    world.store.end_task(uid)
    assert world.store.close_canceled(uid)
    await world.settle(uid)
    assert (world.status()["phase"], world.status()["reason"]) == ("Canceled", "Canceled")
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == []


async def test_deleting_a_waiting_intent_cancels_its_run_and_takes_everything_along(world: World) -> None:
    uid = await world.waiting(plan_json=BIG)
    world.cluster.delete("intents", "fix-median")
    await world.settle(uid)
    assert (world.run(uid).status, world.run(uid).reason) == (Status.CANCELED, "Deleted")
    assert [p for p, _, _ in world.cluster.objects if p != "events"] == []


async def test_deleting_a_running_intent_waits_for_its_tasks(world: World) -> None:
    uid = await everything(world)
    world.cluster.delete("intents", "fix-median")
    await world.settle(uid)
    assert world.run(uid).status is Status.CANCELING and world.cluster.of_kind("intents")
    world.store.end_task(uid)
    world.store.close_canceled(uid)
    await world.settle(uid)
    assert world.cluster.of_kind("intents") == []


async def test_the_status_of_a_deleted_intent_is_not_written_to_its_successor(world: World) -> None:
    uid = world.cluster.apply()
    await world.settle(uid)
    world.store.begin_plan(uid)
    world.store.plan_failed(uid)
    await world.settle(uid)
    world.blind = True  # our watch is late
    world.cluster.delete("intents", "fix-median")
    second = world.cluster.apply()
    world.store.runs[uid] = replace(world.run(uid), error="something that the status does not say yet")
    world.clock.sleep(60)
    with contextlib.suppress(SisuError):
        await world.reconciler.reconcile(uid)
    assert world.status() == {}
    world.blind = False
    world.restart()
    await world.settle(second)
    assert world.status()["phase"] == "Queued" and second in world.store.enqueued


# ------------------------------------------------------------------ conflicts and crashes


async def test_a_stale_finalizer_patch_is_tried_again_on_the_fresh_object(world: World) -> None:
    uid = world.cluster.apply()
    world.blind = True
    world.cluster.apply(priority=0)  # the object moves on, and our cache does not know
    with pytest.raises(Conflict, match="422"):
        await world.reconciler.reconcile(uid)
    assert world.store.enqueued == {}, "nothing starts without the finalizer"
    await world.reconciler.reconcile(uid)
    assert set(world.store.enqueued) == {uid}
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == [FINALIZER]


async def test_foreign_finalizers_are_kept(world: World) -> None:
    uid = world.cluster.apply()
    world.cluster._edit(
        "intents", "fix-median", "team", lambda o: {**o, "metadata": {**o["metadata"], "finalizers": ["other/x"]}}
    )
    await world.settle(uid)
    assert world.cluster.get("intents", "fix-median")["metadata"]["finalizers"] == ["other/x", FINALIZER]


async def test_an_event_that_cannot_be_emitted_does_not_hold_the_status_up(world: World) -> None:
    world.cluster.fail["emit"] = [Unavailable("down")] * 9
    await world.waiting()
    assert world.status()["phase"] == "WaitingInput" and world.events() == []


class _Later(list[Exception]):
    """`fail` entries that let `skip` calls through first."""

    def __init__(self, skip: int, error: Exception) -> None:
        super().__init__([error])
        self._skip = skip

    def __bool__(self) -> bool:
        self._skip -= 1
        return self._skip < 0 and len(self) > 0


FAILING = [
    "patch_status",
    "set_finalizer",
    "create_approval",
    "approval",
    "create_config_map",
    "list_all",
    "try_forged",
]


@pytest.mark.parametrize("error", [Unavailable("down"), Conflict("409: moved")], ids=["unavailable", "conflict"])
@pytest.mark.parametrize(
    "method", [*FAILING, "store.start", "store.approve", "store.record_approval_object", "store.run"]
)
@pytest.mark.parametrize("nth", [0, 1, 2])
async def test_whatever_fails_once_the_end_is_the_same(tmp_path: Path, method: str, error: SisuError, nth: int) -> None:
    world = World(tmp_path)
    uid = world.cluster.apply()

    async def step() -> None:
        await world.settle(uid)
        world.restart()

    failing = world.store.fail if method.startswith("store.") else world.cluster.fail
    failing[method.removeprefix("store.")] = _Later(nth, error)
    await step()
    world.store.plan_ready(uid, diff=DIFF, plan_json=BIG)
    await step()
    world.cluster.vote(str(world.run(uid).approval_name))
    await step()
    assert set(world.store.enqueued) == {uid, f"{uid}:execute:1"}
    assert (world.run(uid).status, world.run(uid).execution_no) == (Status.RUNNING, 1)
    assert world.status()["phase"] == "Running" and len(world.cluster.of_kind("planapprovals")) == 1
    assert world.approval(uid)["status"]["decision"] == "Approved"


# ------------------------------------------------------------------ the store


async def test_another_store_starts_nothing_until_a_person_acknowledges_it(world: World, tmp_path: Path) -> None:
    uid = await world.waiting()
    other = MemoryRunStore(clock=world.clock.now, id="store-2")
    world.store = other
    world.restart()
    await world.settle(uid)
    assert other.enqueued == {} and other.run(uid) is None
    assert (world.status()["reason"], world.status()["storeId"]) == ("StoreBehind", "store-1")
    assert "store-2" in condition(world.status(), "Stalled")["message"]
    world.cluster.acknowledge("fix-median", "store-1")
    await world.settle(uid)
    assert other.enqueued == {}
    world.cluster.acknowledge("fix-median", "store-2")
    await world.settle(uid)
    assert set(other.enqueued) == {uid} and world.status()["storeId"] == "store-2"


@pytest.mark.parametrize(
    ("ended", "spec", "again"),
    [
        (Event.SUCCEED, {}, False),
        (Event.SUCCEED, {"retry": 1}, False),
        (Event.FAIL, {}, False),
        (Event.FAIL, {"retry": 1}, True),
        (Event.FAIL, {"retry": 1, "cancel": True}, False),
        (Event.EXCEED, {"priority": 5}, False),
    ],
    ids=str,
)
async def test_what_had_ended_in_another_store_begins_here_by_a_retry_alone(
    world: World, ended: Event, spec: Any, again: bool
) -> None:
    uid = await everything(world)
    world.store.end_task(uid)
    world.store.finish(uid, ended, reason="of the old store")
    await world.settle(uid)
    before = world.status()
    world.store = MemoryRunStore(clock=world.clock.now, id="store-2")
    world.restart()
    await world.settle(uid)
    assert world.status()["reason"] == "StoreBehind"
    world.cluster.acknowledge("fix-median", "store-2")
    world.cluster.apply(**spec)
    await world.settle(uid)
    if again:
        assert set(world.store.enqueued) == {uid} and world.status()["phase"] == "Queued", "planned anew"
    else:
        assert world.store.enqueued == {} and world.store.run(uid) is None
        assert world.status() == {**before, "storeId": "store-2", "observedGeneration": 2 if spec else 1}
    assert world.store.decided == []


async def test_a_database_restored_from_before_the_approval_does_not_execute_it_again(world: World) -> None:
    uid = await world.waiting()
    backup = world.store.runs[uid]
    world.cluster.vote(str(backup.approval_name))
    await world.settle(uid)
    assert world.run(uid).status is Status.RUNNING
    world.store.runs[uid], world.store.decided[:] = backup, []
    del world.store.enqueued[f"{uid}:execute:1"]
    world.restart()
    await world.settle(uid)
    assert set(world.store.enqueued) == {uid} and world.run(uid).status is Status.WAITING_INPUT
    assert world.status()["reason"] == "StoreBehind"


async def test_the_store_is_in_the_status_before_anything_is_enqueued(world: World) -> None:
    uid = world.cluster.apply()
    world.store.fail["start"] = [Unavailable("down")]
    with pytest.raises(Unavailable):
        await world.reconciler.reconcile(uid)
    assert world.status()["storeId"] == "store-1" and world.store.enqueued == {}
    world.cluster.fail["patch_status"] = [Unavailable("down")]
    second = world.cluster.apply("second")
    with pytest.raises(Unavailable):
        await world.reconciler.reconcile(second)
    assert second not in world.store.enqueued


# ------------------------------------------------------------------ the operator: absence


def operator(world: World) -> Operator:
    made = Operator(
        cluster=world.cluster.client,
        store=world.store,
        cache=world.cache,
        gate=world.gate,
        clock=world.clock,
        reconciler=world.make,
        resync_seconds=3600,
        observe=world.metrics.__setitem__,
    )
    world.cluster.watchers[:] = [made.saw]
    return made


async def test_an_approval_whose_deletion_the_watch_missed_is_made_again_at_the_next_resync(world: World) -> None:
    """Else people are pointed at an object that is not there until the plan expires."""
    uid = await world.waiting()
    first = world.approval(uid)["metadata"]
    made = operator(world)
    world.cluster.watchers.clear()
    world.cluster.delete("planapprovals", first["name"], force=True)
    await made.resync()
    await world.settle(uid)
    assert world.approval(uid)["metadata"]["uid"] != first["uid"]


async def many(world: World, count: int) -> list[str]:
    uids = [world.cluster.apply(f"intent-{n}") for n in range(count)]
    for uid in uids:
        await world.settle(uid)
    return uids


def vanish(world: World, *names: str) -> None:
    """Gone without a word: no finalizer was honoured, no event was seen."""
    for name in names:
        del world.cluster.objects["intents", "team", name]


def open_runs(world: World) -> set[str]:
    return {r["intent_id"] for r in world.store.open_runs()}


async def test_a_list_that_leaves_intents_out_cancels_nothing(world: World) -> None:
    uids = await many(world, 3)
    made = operator(world)
    world.cluster.hidden = set(uids)
    await made.resync()
    assert open_runs(world) == set(uids)


async def test_an_intent_that_a_list_leaves_out_is_served_all_the_same(world: World) -> None:
    """One of three, and the process has just begun to lead: no watch event and no list tells of it, only its run does."""
    uids = await many(world, 3)
    world.store.plan_ready(uids[1], diff=DIFF)
    world.cache = Cache()
    made = operator(world)
    world.cluster.hidden = {uids[1]}
    async with running(made):
        await until(world, lambda: world.status("intent-1").get("phase") == "WaitingInput")
    assert open_runs(world) == set(uids)
    assert {world.run(uid).status for uid in uids} == {Status.QUEUED, Status.WAITING_INPUT}


async def test_a_run_whose_intent_is_really_gone_is_canceled(world: World) -> None:
    gone, kept = await many(world, 2)
    made = operator(world)
    vanish(world, "intent-0")
    await made.resync()
    assert open_runs(world) == {kept}
    assert (world.run(gone).status, world.run(gone).reason) == (Status.CANCELED, "Deleted")


async def test_an_intent_that_was_made_again_under_its_name_is_gone_too(world: World) -> None:
    (first,) = await many(world, 1)
    made = operator(world)
    vanish(world, "intent-0")
    second = world.cluster.apply("intent-0")
    await made.resync()
    assert world.run(first).status is Status.CANCELED and world.store.run(second) is None


@pytest.mark.parametrize(("missing", "canceled"), [(MASS, True), (MASS + 1, False)])
async def test_intents_that_are_gone_in_masses_are_a_fault_and_no_deletion(
    world: World, missing: int, canceled: bool
) -> None:
    uids = await many(world, missing)
    made = operator(world)
    vanish(world, *(f"intent-{n}" for n in range(missing)))
    await made.resync()
    assert open_runs(world) == (set() if canceled else set(uids))
    assert REGISTRY.get_sample_value("sisukodo_runs_orphaned") == (0 if canceled else missing)


async def test_without_the_crd_or_the_namespace_nothing_is_canceled(world: World) -> None:
    uids = await many(world, 1)
    made = operator(world)
    vanish(world, "intent-0")
    world.cluster.has_crd = False
    await made.resync()
    world.cluster.has_crd = True
    world.cluster.namespaces.clear()
    await made.resync()
    assert open_runs(world) == set(uids)
    world.cluster.namespaces.add("team")
    await made.resync()
    assert open_runs(world) == set()


@pytest.mark.parametrize("method", ["intents", "approvals", "intent", "crd_exists", "namespace_exists"])
async def test_an_api_server_that_does_not_answer_cancels_nothing(world: World, method: str) -> None:
    uids = await many(world, 1)
    made = operator(world)
    vanish(world, "intent-0")
    world.cluster.fail[method] = [Unavailable("down")]
    with pytest.raises(Unavailable):
        await made.resync()
    assert open_runs(world) == set(uids) and made.last_resync is None


async def test_a_deletion_that_was_seen_cancels_within_a_tick(world: World) -> None:
    (uid,) = await many(world, 1)
    made = operator(world)
    world.cluster.delete("intents", "intent-0", force=True)
    assert open_runs(world) == {uid}
    await made._tick()
    assert open_runs(world) == set()


async def test_a_deletion_that_was_seen_is_not_forgotten_when_the_tick_fails(world: World) -> None:
    await many(world, 1)
    made = operator(world)
    world.cluster.delete("intents", "intent-0", force=True)
    world.store.fail["open_runs"] = [Unavailable("down")]
    with pytest.raises(Unavailable):
        await made._tick()
    await made._tick()
    assert open_runs(world) == set()


async def test_a_run_that_has_ended_is_left_alone(world: World) -> None:
    (uid,) = await many(world, 1)
    world.store.begin_plan(uid)
    world.store.plan_failed(uid)
    made = operator(world)
    vanish(world, "intent-0")
    await made.resync()
    assert world.run(uid).status is Status.FAILED


async def test_an_ended_intent_whose_deletion_nobody_saw_is_forgotten_at_the_next_resync(world: World) -> None:
    """Else it is deleted anew with every tick, and its status is written in vain, for ever."""
    uid = world.cluster.apply("gone", cancel=True, ttlSecondsAfterFinished=60)
    kept = world.cluster.apply("kept", cancel=True)
    for one in (uid, kept):
        await world.settle(one)
    made = operator(world)
    vanish(world, "gone")
    world.cluster.hidden = {kept}
    await made.resync()
    assert [obj["metadata"]["name"] for obj in made.intents()] == ["kept"]
    world.clock.at += timedelta(seconds=61)
    await made._tick()
    assert world.cluster.calls.get("delete_intent", 0) == 0


# ------------------------------------------------------------------ the operator: time and the whole loop


async def test_an_intent_past_its_time_to_live_is_deleted_and_not_before(world: World) -> None:
    uid = await world.waiting(ttlSecondsAfterFinished=60)
    world.cluster.vote(str(world.run(uid).approval_name), verdict="Reject")
    await world.settle(uid)
    made = operator(world)
    world.clock.at += timedelta(seconds=50)
    await made._tick()
    assert world.cluster.of_kind("intents")
    world.clock.at += timedelta(seconds=10)
    await made._tick()
    assert world.cluster.of_kind("intents") == []


async def test_one_intent_that_may_not_be_deleted_keeps_no_other_alive(world: World) -> None:
    """As where a policy of somebody else's protects it."""
    for name in ("protected", "other"):
        await world.settle(world.cluster.apply(name, cancel=True, ttlSecondsAfterFinished=60))
    made = operator(world)
    world.clock.at += timedelta(seconds=61)
    world.cluster.fail["delete_intent"] = [Permanent("API server: 403: denied")]
    await made._tick()
    assert [obj["metadata"]["name"] for obj in world.cluster.of_kind("intents")] == ["protected"]


async def test_an_intent_canceled_before_its_start_has_a_time_to_live_too(world: World) -> None:
    uid = world.cluster.apply(cancel=True, ttlSecondsAfterFinished=60)
    await world.settle(uid)
    made = operator(world)
    world.clock.at += timedelta(seconds=61)
    await made._tick()
    assert world.cluster.of_kind("intents") == []


@contextlib.asynccontextmanager
async def running(made: Operator) -> Any:
    async def pass_time() -> None:
        while True:
            await asyncio.sleep(0.01)
            made._clock.sleep(0.05)

    working = [asyncio.create_task(made.run()), asyncio.create_task(pass_time())]
    try:
        yield
    finally:
        for one in working:
            one.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def until(world: World, condition_: Callable[[], bool]) -> None:
    """Real time passes, and the clock of the test with it."""
    async with asyncio.timeout(10):
        while not condition_():
            await asyncio.sleep(0.01)
            world.clock.sleep(0.01)


async def test_the_operator_leads_an_intent_from_apply_to_running(world: World) -> None:
    made = operator(world)
    async with running(made):
        uid = world.cluster.apply()
        await until(world, lambda: uid in world.store.enqueued)
        world.store.plan_ready(uid, diff=DIFF)
        made.notify(uid)
        await until(
            world, lambda: world.status().get("phase") == "WaitingInput" and world.run(uid).approval_uid is not None
        )
        world.cluster.vote(str(world.run(uid).approval_name))
        await until(world, lambda: world.status().get("phase") == "Running")
    assert set(world.store.enqueued) == {uid, f"{uid}:execute:1"}
    assert (world.run(uid).stage, world.metrics["identity_enforced"]) == (Stage.EXECUTE, 1.0)


async def test_what_no_notification_tells_is_seen_by_the_tick(world: World) -> None:
    uid = await everything(world)
    world.store.begin_tasks(uid, 2, running=1)
    await world.settle(uid)
    made = operator(world)
    async with running(made):
        await until(world, lambda: made.last_resync is not None and len(made.queue) == 0)
        world.store.end_task(uid)
        await until(world, lambda: world.status()["tasks"]["succeeded"] == 1)


async def test_a_run_that_stops_working_is_seen_by_the_tick_when_its_notification_is_lost(world: World) -> None:
    """The listening connection may be dead without anybody knowing: nothing is ever sent on it."""
    uid = world.cluster.apply()
    await world.settle(uid)
    world.store.begin_plan(uid)
    await world.settle(uid)
    made = operator(world)
    async with running(made):
        await until(world, lambda: made.last_resync is not None and len(made.queue) == 0 and uid in made._marks)
        world.store.plan_ready(uid, diff=DIFF)
        await until(world, lambda: world.status()["phase"] == "WaitingInput")


async def test_a_vote_that_comes_with_the_answer_to_our_own_write_is_counted(world: World) -> None:
    def votes_at_once(plural: str, kind: str, obj: Mapping[str, Any]) -> None:
        if not world.blind and plural == "intents" and obj.get("status", {}).get("phase") == "WaitingInput":
            world.blind = True
            world.cluster.vote(obj["status"]["plan"]["approvalName"])

    uid = world.cluster.apply()
    await world.settle(uid)
    world.store.plan_ready(uid, diff=DIFF)
    world.cluster.watchers.append(votes_at_once)
    await world.reconciler.reconcile(uid)
    assert f"{uid}:execute:1" in world.store.enqueued


async def test_a_change_of_the_intent_that_comes_with_the_answer_to_our_own_write_is_seen(world: World) -> None:
    uid = await everything(world)
    world.blind = True
    world.cluster.apply(cancel=True)
    world.store.begin_tasks(uid, 2, running=1)
    world.clock.sleep(2)
    await world.reconciler.reconcile(uid)
    assert world.run(uid).status is Status.CANCELING


async def test_a_listing_that_failed_is_not_waited_for_until_the_next_resync(world: World) -> None:
    made = operator(world)
    world.cluster.fail["intents"] = [Unavailable("429: too many requests")]
    async with running(made):
        await until(world, lambda: made.last_resync is not None)
    assert world.cluster.calls["intents"] == 2


async def test_a_deadline_that_passed_is_seen_by_the_tick(world: World) -> None:
    uid = await world.waiting()
    world.clock.at = NOW + timedelta(days=30)
    made = operator(world)
    async with running(made):
        await until(world, lambda: world.status()["phase"] == "Expired")
    assert world.run(uid).status is Status.EXPIRED


async def test_lost_notifications_make_everything_be_looked_at(world: World) -> None:
    uids = await many(world, 3)
    made = operator(world)
    made.notify(None)
    assert len(made.queue) == 3
    made.notify(uids[0])
    assert len(made.queue) == 3


async def test_an_operator_that_begins_anew_finds_what_happened_while_it_was_away(world: World) -> None:
    uid = await world.waiting()
    world.blind = True
    world.cluster.vote(str(world.run(uid).approval_name))
    world.cache = Cache()
    made = operator(world)
    async with running(made):
        await until(world, lambda: world.status()["phase"] == "Running")
    assert world.run(uid).execution_no == 1
