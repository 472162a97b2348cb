"""The control loop of one Intent: observe, decide (core.plan), act; again while an action found or made something new."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from controller.core import approval as approvals
from controller.core import events, plan
from controller.core import status as projection
from controller.core.errors import Conflict, Permanent, SisuError, Unavailable
from controller.core.phases import Status
from controller.core.run import Approval, Intent, Run
from controller.core.settings import Settings
from controller.kube import objects, spec
from controller.kube.cache import Cache, Object
from controller.kube.client import KubeCluster, merge_patch
from controller.kube.gate import IdentityGate
from controller.kube.pace import Pace
from controller.kube.policy import Policies
from controller.ports import Clock, RunStore

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_TURNS = 8
MAX_EDITIONS = 5
GATE_RETRY_SECONDS = 5.0
PASSING_SECONDS = 0.25
LOOK_AGAIN_SECONDS = 0.5


class Reconciler:
    """`reconcile(uid)` is level-triggered and idempotent. `observe` takes (event, seconds) for metrics."""

    def __init__(
        self,
        *,
        cluster: KubeCluster,
        store: RunStore,
        cache: Cache,
        gate: IdentityGate,
        policies: Policies,
        clock: Clock,
        reporter: str,
        allow_loopback_http: bool,
        private_repositories: bool,
        add_later: Callable[[str, float], None],
        observe: Callable[[str, float], None],
    ) -> None:
        self._cluster, self._store, self._cache, self._gate, self._policies = cluster, store, cache, gate, policies
        self._clock, self._reporter = clock, reporter
        self._repositories = {"allow_loopback_http": allow_loopback_http, "private_repositories": private_repositories}
        self._add_later, self._observe_metric = add_later, observe
        self._store_id: str | None = None
        self._pace = Pace(clock)
        self._emitting: set[asyncio.Task[None]] = set()

    async def reconcile(self, uid: str) -> None:
        """Bring one Intent a step further. Raises SisuError to be called again later."""
        for _ in range(MAX_TURNS):
            world = await self._observe(uid)
            if world is None:
                return
            actions = plan.decide(world)
            consume = next((a for a in actions if isinstance(a, plan.Consume)), None)
            if consume is not None:
                world, actions = await self._gated(world, actions)
            again = False
            for action in actions:
                again = await self._do(world, action) or again
            if not again:
                return
        raise Conflict(f"intent {uid} does not settle")

    # ------------------------------------------------------------------ observe

    async def _observe(self, uid: str) -> plan.World | None:
        obj = self._cache.intent(uid)
        if obj is None:
            return None
        intent = objects.intent(obj)
        if self._store_id is None:
            self._store_id = await self._db(self._store.store_id)
        run = await self._db(lambda: self._store.run(uid))
        settings, problem = self._settings(intent)
        return plan.World(
            intent=intent,
            run=run,
            approval=None if run is None else await self._approval(intent, run),
            settings=settings,
            problem=problem,
            store_id=self._store_id,
            identity_problem=None,
            now=self._clock.now(),
        )

    def _settings(self, intent: Intent) -> tuple[Settings | None, str | None]:
        try:
            policy = self._policies.of(intent.namespace)
            return spec.check(intent.spec, namespace=intent.namespace, policy=policy, **self._repositories), None
        except Permanent as e:
            return None, str(e)

    async def _approval(self, intent: Intent, run: Run) -> Approval | None:
        """The recorded object: from the cache while nobody has voted, read anew and compared in full once somebody has."""
        if run.approval_name is None or run.approval_uid is None:
            return None
        obj = self._cache.approval(intent.namespace, run.approval_name)
        voted = obj is not None and bool(obj["spec"].get("decisions"))
        if obj is None or obj["metadata"]["uid"] != run.approval_uid or (voted and run.status is Status.WAITING_INPUT):
            obj = await self._cluster.approval(intent.namespace, run.approval_name)
            if obj is not None:
                self._cache.saw_approval(obj)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            return None
        wrong = await self._wrong(intent, run, obj) if run.status is Status.WAITING_INPUT else None
        return objects.approval(obj, problem=wrong)

    async def _wrong(self, intent: Intent, run: Run, obj: Object) -> str | None:
        if not obj["spec"].get("decisions"):
            return None
        if (found := projection.tampered(obj.get("status") or {})) is not None:
            return found
        shown = await self._shown(intent, run)
        parts = {n: await self._cluster.config_map(intent.namespace, n, approvals.PART_KEY) for n in shown.parts}
        return approvals.problem(obj, shown, parts=parts)

    async def _shown(self, intent: Intent, run: Run) -> approvals.Shown:
        diff = await self._db(lambda: self._store.patch(run))
        return approvals.build(run, intent_name=intent.name, diff=diff)

    async def _gated(
        self, world: plan.World, actions: tuple[plan.Action, ...]
    ) -> tuple[plan.World, tuple[plan.Action, ...]]:
        assert world.run is not None and world.run.approval_name is not None
        obj = self._cache.approval(world.intent.namespace, world.run.approval_name)
        problem = "the PlanApproval is gone" if obj is None else await self._gate.check(obj)
        if problem is None:
            self._observe_metric("identity_enforced", 1.0)
            return world, actions
        log.error(
            "approval identity not enforced",
            extra={"intent": world.intent.name, "uid": world.intent.uid, "problem": problem},
        )
        self._observe_metric("identity_enforced", 0.0)
        self._add_later(world.intent.uid, GATE_RETRY_SECONDS)
        world = replace(world, identity_problem=problem)
        return world, plan.decide(world)

    # ------------------------------------------------------------------ act

    async def _do(self, world: plan.World, action: plan.Action) -> bool:
        """True when the database or the world changed and it is worth looking again."""
        match action:
            case plan.WriteStatus():
                return await self._write_status(world, action.status)
            case plan.WriteApprovalStatus():
                return await self._write_approval_status(world, action)
            case plan.AddFinalizer() | plan.RemoveFinalizer():
                await self._finalizer(world, present=isinstance(action, plan.AddFinalizer))
                # A run that begins again waits for it, and the watch's echo of our own write is no news.
                return isinstance(action, plan.AddFinalizer) and world.run is not None
            case plan.CreateApproval():
                return await self._create_approval(world)
            case _:
                await self._decide(world, action)
                return False

    async def _decide(self, world: plan.World, action: plan.Action) -> None:
        """The notification of the new status brings the next look. Where there is none (a new run, a lost race), time does."""
        intent, run, store = world.intent, world.run, self._store
        if isinstance(action, plan.StartRun):
            requester = str(intent.spec.get("requestedBy", ""))
            await self._db(lambda: store.start(intent, action.settings, requested_by=requester))
        else:
            assert run is not None
            won = await self._db(lambda: _call(store, run, action))
            name = type(action).__name__.lower()
            log.info("decided", extra={"action": name, "won": won, "intent": intent.name, "uid": intent.uid})
        self._add_later(intent.uid, LOOK_AGAIN_SECONDS)

    async def _write_status(self, world: plan.World, wanted: Mapping[str, Any]) -> bool:
        intent = world.intent
        wait = self._pace.wait(intent.uid, news=projection.news(intent.status, wanted), running=_passing(world, wanted))
        if wait > 0:
            self._add_later(intent.uid, wait)
            return False
        patch = merge_patch(intent.status, wanted)
        obj = await self._cluster.patch_status("intents", intent.namespace, intent.name, patch, uid=intent.uid)
        again = self._cache.wrote("intents", obj)
        self._pace.wrote(intent.uid)
        for happened in events.between(intent.status, wanted, world.approval):
            self._emitting.add(task := asyncio.create_task(self._emit(world, happened)))
            task.add_done_callback(self._emitting.discard)
        if world.run is not None and world.run.updated_at is not None:
            self._observe_metric("status_lag", max(0.0, (self._clock.now() - world.run.updated_at).total_seconds()))
        return again

    async def _emit(self, world: plan.World, happened: events.Happening) -> None:
        body = objects.event(
            world.intent,
            reason=happened.reason,
            message=happened.message,
            kind="Warning" if happened.warning else "Normal",
            key=happened.key,
            now=world.now,
            reporter=self._reporter,
        )
        try:
            await self._cluster.emit(body)
        except SisuError as e:  # an event is a courtesy: it must not hold the status back
            log.warning(
                "event not emitted", extra={"reason": happened.reason, "uid": world.intent.uid, "error": str(e)}
            )

    async def _write_approval_status(self, world: plan.World, action: plan.WriteApprovalStatus) -> bool:
        assert world.approval is not None
        patch = merge_patch(world.approval.status, action.status)
        obj = await self._cluster.patch_status(
            "planapprovals", world.intent.namespace, action.name, patch, uid=world.approval.uid
        )
        return self._cache.wrote("planapprovals", obj)

    async def _finalizer(self, world: plan.World, *, present: bool) -> None:
        cached = self._cache.intent(world.intent.uid)
        if cached is None:
            return
        try:
            obj = await self._cluster.set_finalizer(cached, present=present)
        except Conflict:
            fresh = await self._cluster.intent(world.intent.namespace, world.intent.name)
            if fresh is None or fresh["metadata"]["uid"] != world.intent.uid:
                self._cache.lost_intent(world.intent.uid)
                return
            self._cache.saw_intent(fresh)
            raise
        self._cache.saw_intent(obj)

    async def _create_approval(self, world: plan.World) -> bool:
        run, intent = world.run, world.intent
        assert run is not None
        shown = await self._shown(intent, run)
        for body in objects.config_maps(intent, shown):
            await self._cluster.create_config_map(body)
        obj = await self._own_approval(intent, shown, world.store_id)
        name = obj["metadata"]["name"]
        self._cache.saw_approval(obj)
        uid = obj["metadata"]["uid"]
        log.info("plan ready", extra={"intent": intent.name, "uid": intent.uid, "approval": name})
        return await self._db(lambda: self._store.record_approval_object(run, name=name, uid=uid))

    async def _own_approval(self, intent: Intent, shown: approvals.Shown, store_id: str) -> Object:
        """Create it, or find that we did before we died; what else has its name is superseded and left alone."""
        for edition in range(1, MAX_EDITIONS + 1):
            wanted = objects.plan_approval(intent, shown, store_id=store_id, edition=edition)
            name = wanted["metadata"]["name"]
            try:
                return await self._cluster.create_approval(wanted)
            except Conflict as e:
                found = await self._cluster.approval(intent.namespace, name)
                if found is None:  # refused, or gone again: said aloud, because nobody can decide until there is one
                    raise Unavailable(f"PlanApproval {name} cannot be created: {e}") from e
                if objects.is_ours(found, wanted):
                    return found
                if found["spec"]["intent"]["uid"] == intent.uid:
                    await self._supersede(found)
        raise Conflict(f"{MAX_EDITIONS} PlanApprovals of {intent.name} have this plan and are not ours")

    async def _supersede(self, obj: Object) -> None:
        """No more votes on it: they would count for nothing."""
        meta = obj["metadata"]
        if (obj.get("status") or {}).get("decision", "Pending") == "Pending":
            patch = {"decision": "Superseded"}
            await self._cluster.patch_status("planapprovals", meta["namespace"], meta["name"], patch, uid=meta["uid"])

    async def _db(self, call: Callable[[], T]) -> T:
        return await asyncio.to_thread(call)


def _passing(world: plan.World, wanted: Mapping[str, Any]) -> bool:
    """`Running` that has only just begun: what follows within a moment is worth a write, this alone is not."""
    run = world.run
    if run is None or run.updated_at is None or wanted.get("phase") != "Running":
        return False
    # The database's clock may be ahead of ours: then we do not know, and write.
    return 0 <= (world.now - run.updated_at).total_seconds() < PASSING_SECONDS


def _call(store: RunStore, run: Run, action: plan.Action) -> bool:
    match action:
        case plan.Consume(votes=votes):
            return store.approve(run, votes)
        case plan.Reject(votes=votes):
            return store.reject(run, votes)
        case plan.Expire():
            return store.expire(run)
        case plan.Cancel(reason=reason):
            return store.cancel(run, reason=reason)
        case plan.Adjust(partition=partition, priority=priority):
            return store.adjust(run, partition=partition, priority=priority)
        case plan.Retry(count=count):
            return store.retry(run, count=count)
        case _:
            raise TypeError(f"{type(action).__name__} is no decision")
