"""The controller role: watch events, database notifications and the clock feed one queue; its workers reconcile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from controller import metrics
from controller.core.errors import Conflict, Permanent, SisuError
from controller.kube.absence import MASS, Absence
from controller.kube.cache import Cache
from controller.kube.client import KubeCluster
from controller.kube.gate import IdentityGate
from controller.kube.queue import WorkQueue
from controller.kube.reconcile import Reconciler
from controller.ports import Clock, RunStore

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
GATE_SECONDS = 30.0
AGAIN_SECONDS = 5.0  # after a failure: without a first listing the process is not ready


class Operator:
    """Everything here runs in one event loop; `saw` and `notify` are called in it, too."""

    def __init__(
        self,
        *,
        cluster: KubeCluster,
        store: RunStore,
        cache: Cache,
        gate: IdentityGate,
        clock: Clock,
        reconciler: Callable[[Callable[[str, float], None]], Reconciler],
        resync_seconds: float,
        observe: Callable[[str, float], None],
        workers: int = 16,
    ) -> None:
        self._cluster, self._store, self._cache, self._gate, self._clock = cluster, store, cache, gate, clock
        self._resync_seconds, self._observe = resync_seconds, observe
        self._reconciler = reconciler(lambda uid, seconds: self.queue.add_later(uid, seconds))
        self.queue = WorkQueue(self._timed, workers=workers)
        self._absence = Absence(cluster, store, found=self._found)
        self._marks: Mapping[str, str] = {}
        self._deleted: set[str] = set()
        self.last_event: dict[str, float] = {}
        self.last_resync: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        metrics.RECONCILE_BACKLOG.set_function(lambda: len(self.queue))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.queue.run())
            group.create_task(self._every(TICK_SECONDS, self._tick))
            group.create_task(self._every(self._resync_seconds, self.resync))
            group.create_task(self._every(GATE_SECONDS, self._look_at_gate))

    def saw(self, plural: str, kind: str | None, obj: Mapping[str, Any]) -> None:
        """A watch event. `kind` is None while listing."""
        self.last_event[plural] = self._clock.monotonic()
        uid = str(obj["metadata"]["uid"] if plural == "intents" else obj["spec"]["intent"]["uid"])
        known = self._cache.knows(plural, obj)
        if kind == "DELETED":
            if plural == "intents":
                self._cache.lost_intent(uid)
                self._deleted.add(uid)
            else:
                self._cache.lost_approval(obj)
            self.queue.add(uid)
        elif self._cache.saw_intent(obj) if plural == "intents" else self._cache.saw_approval(obj):
            # Else it is the echo of our own write. What is new here gives way to what has begun.
            self.queue.add(uid, urgent=known)

    def intents(self) -> Iterable[Mapping[str, Any]]:
        """Every Intent as last seen."""
        return self._cache.intents()

    def notify(self, intent_id: str | None) -> None:
        """The run of this Intent changed in the database; None: notifications may have been lost."""
        if intent_id is not None:
            self.queue.add(intent_id)
        else:
            for obj in self._cache.intents():
                self.queue.add(str(obj["metadata"]["uid"]), urgent=False)

    async def _timed(self, uid: str) -> None:
        began = self._clock.monotonic()
        await self._reconciler.reconcile(uid)
        self._observe("reconcile", self._clock.monotonic() - began)

    async def _every(self, seconds: float, call: Callable[[], Any]) -> None:
        while True:
            try:
                await call()
            except SisuError as e:
                log.warning("periodic work failed", extra={"work": call.__name__, "error": str(e)})
                await asyncio.sleep(min(seconds, AGAIN_SECONDS))
            else:
                await asyncio.sleep(seconds)

    async def _tick(self) -> None:
        """What no notification tells: progress of runs at work, deadlines that passed, Intents past their time to live."""
        marks = await asyncio.to_thread(self._store.progress)
        for uid in self._marks.keys() | marks.keys():  # also one that is at work no more
            if self._marks.get(uid) != marks.get(uid):
                self.queue.add(uid)
        self._marks = marks
        for uid in await asyncio.to_thread(self._store.overdue):
            self.queue.add(uid)
        deleted = set(self._deleted)
        if deleted:  # somebody took the finalizer off, or it was never on
            await self._cancel_orphans(
                [r for r in await asyncio.to_thread(self._store.open_runs) if r["intent_id"] in deleted]
            )
            self._deleted -= deleted
        now = self._clock.now()
        for obj in self._cache.intents():
            if _outlived(obj, now):
                await self._bury(obj["metadata"])

    async def _bury(self, meta: Mapping[str, Any]) -> None:
        facts = {"intent": meta["name"], "uid": meta["uid"]}
        log.info("time to live over", extra=facts)
        try:
            await self._cluster.delete_intent(meta["namespace"], meta["name"], meta["uid"])
        except (
            Conflict,
            Permanent,
        ) as e:  # somebody's policy, or another one of its name: none of the others' business
            log.warning("Intent not deleted", extra={**facts, "error": str(e)})

    async def _look_at_gate(self) -> None:
        wrong = await self._gate.policies()
        self._observe("identity_enforced", 0.0 if wrong else 1.0)
        if wrong:
            log.error("approval identity not enforced", extra={"problem": wrong})

    async def resync(self) -> None:
        """List everything, look at everything; find runs whose Intent went unseen."""
        began = self._clock.monotonic()
        seen = set()
        async for obj in self._cluster.intents():
            self._cache.saw_intent(obj)
            seen.add(str(obj["metadata"]["uid"]))
        approvals = set()
        async for obj in self._cluster.approvals():
            self._cache.saw_approval(obj)
            approvals.add((obj["metadata"]["namespace"], obj["metadata"]["name"]))
        self._cache.keep_approvals(approvals)
        await self._forget_gone(seen)
        for uid in seen | {str(obj["metadata"]["uid"]) for obj in self._cache.intents()}:
            self.queue.add(uid, urgent=False)
        unseen = [r for r in await asyncio.to_thread(self._store.open_runs) if r["intent_id"] not in seen]
        metrics.RUNS_ORPHANED.set(await self._cancel_orphans(unseen))
        self.last_resync = self._clock.monotonic()
        metrics.RESYNC_SECONDS.observe(self.last_resync - began)

    async def _forget_gone(self, seen: set[str]) -> None:
        """A watch that begins anew does not tell what was deleted meanwhile."""
        unseen = [obj["metadata"] for obj in self._cache.intents() if obj["metadata"]["uid"] not in seen]
        rows = [{"namespace": m["namespace"], "name": m["name"], "intent_id": m["uid"]} for m in unseen]
        for row in await self._absence.missing(rows):
            self._cache.lost_intent(row["intent_id"])

    async def _cancel_orphans(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Of these runs, those whose Intent is gone; how many were left alone because they are too many to be deletions."""
        orphans = await self._absence.orphans(rows)
        if len(orphans) > MASS:
            log.error("many runs without their Intent; nothing is canceled", extra={"runs": len(orphans)})
            return len(orphans)
        for row in orphans:
            self._cache.lost_intent(row["intent_id"])
        await self._absence.cancel(orphans)
        return 0

    def _found(self, obj: Mapping[str, Any]) -> None:
        if self._cache.saw_intent(obj):
            self.queue.add(str(obj["metadata"]["uid"]))


def _outlived(obj: Mapping[str, Any], now: datetime) -> bool:
    ttl, finished = obj["spec"].get("ttlSecondsAfterFinished"), (obj.get("status") or {}).get("finishedAt")
    if ttl is None or finished is None or "deletionTimestamp" in obj["metadata"]:
        return False
    return now >= datetime.fromisoformat(finished.replace("Z", "+00:00")) + timedelta(seconds=ttl)
