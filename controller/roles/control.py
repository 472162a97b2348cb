"""The controller role: leader election, the watch, the control loop, and what health and metrics ask of them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kubernetes.aio.client import ApiClient
from prometheus_client import Gauge

from controller import metrics
from controller.config import Settings
from controller.core.errors import SisuError, Unavailable
from controller.core.phases import Status
from controller.db import gauges, marks
from controller.db.notify import Listener
from controller.kube import client as kube
from controller.kube.cache import Cache
from controller.kube.crd import GROUP
from controller.kube.gate import IdentityGate
from controller.kube.lease import lead, release
from controller.kube.marks import Marks
from controller.kube.operator import Operator
from controller.kube.policy import Policies
from controller.kube.reconcile import Reconciler
from controller.kube.watch import KINDS, Watch
from controller.roles.adapters import Adapters
from controller.roles.fence import fence_off

log = logging.getLogger(__name__)
RETRY_SECONDS = 2.0
BEAT_SECONDS = 5.0


class Controller:
    """The control loop in the main thread's event loop; kopf, LISTEN and reconcile's database calls in threads."""

    def __init__(self, settings: Settings, adapters: Adapters) -> None:
        self._settings, self._pool, self._clock = settings, adapters.pool, adapters.clock
        self._policies = Policies(settings.policy_file)
        self._store, self._cluster = adapters.runs, adapters.cluster
        self.operator: Operator | None = None
        self.watch: Watch | None = None
        self.leading = False
        self._obstacle: str | None = None  # why this process neither leads nor could

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, or something that it cannot live without is lost; then it raises."""
        api = await kube.connect(self._settings.kubeconfig)
        try:
            leader = asyncio.create_task(self._elect(api))
            stopping = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait({leader, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if leader in done:
                leader.result()
            leader.cancel()
            await asyncio.gather(leader, return_exceptions=True)
            await release(api, namespace=self._settings.namespace, identity=self._settings.pod_name)
        finally:
            await api.close()  # type: ignore[no-untyped-call]

    async def _elect(self, api: ApiClient) -> None:
        """Whoever may lead compares, and goes on beating whether it leads or not."""
        await self._compare(api)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat(api))
            await lead(
                api,
                namespace=self._settings.namespace,
                identity=self._settings.pod_name,
                leading=lambda: self._begin(self._cluster(api)),
                lost=self._lost,
            )

    async def _compare(self, api: ApiClient) -> None:
        """Before anything is executed: an older copy of the database becomes another store, whose Intents wait for people (law 10)."""
        outside = Marks(api, namespace=self._settings.namespace)
        while True:
            try:
                await self._one_beat(outside)
            except SisuError as e:  # also 403: an API server that has just started does not know its roles yet
                self._obstacle = f"the store is not compared: {e}"
                log.warning("store not compared", extra={"error": str(e)})
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._obstacle = None
                return

    async def _one_beat(self, outside: Marks) -> bool:
        """Whether this was an older copy. Outside is read first and written last: it is never ahead but of an older copy."""
        known = await outside.read()
        store_id, mark = await asyncio.to_thread(marks.read, self._pool)
        behind = known.get(store_id, 0) > mark
        if behind:
            refused = await asyncio.to_thread(marks.another, self._pool, store_id)
            log.critical(
                "store is behind", extra={"store": store_id, "mark": mark, "seen": known[store_id], "refused": refused}
            )
        store_id, mark = await asyncio.to_thread(marks.beat, self._pool)
        await outside.write(known, store_id, mark)
        await asyncio.to_thread(marks.compared, self._pool, store_id)
        return behind

    async def _beat(self, api: ApiClient) -> None:
        outside = Marks(api, namespace=self._settings.namespace)
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                if await self._one_beat(outside):
                    fence_off("the database went back under us")
            except SisuError as e:
                log.warning("store not compared", extra={"error": str(e)})

    async def _lost(self) -> None:
        fence_off("the leader lease was lost")

    async def _begin(self, cluster: kube.KubeCluster) -> None:
        """Raises SisuError when leading could not begin: the election calls again."""
        try:
            await self._wait_for_kinds(cluster)
        except SisuError as e:
            self._obstacle = f"leading cannot begin: {e}"
            raise
        await self._lead(cluster)

    async def _lead(self, cluster: kube.KubeCluster) -> None:
        loop = asyncio.get_running_loop()
        s, cache = self._settings, Cache()
        gate = IdentityGate(cluster, namespace=s.namespace, service_account=s.service_account)
        operator = self.operator = Operator(
            cluster=cluster,
            store=self._store,
            cache=cache,
            gate=gate,
            clock=self._clock,
            resync_seconds=s.resync_seconds,
            observe=_observe_kube,
            reconciler=lambda add_later: Reconciler(
                cluster=cluster,
                store=self._store,
                cache=cache,
                gate=gate,
                policies=self._policies,
                clock=self._clock,
                reporter=s.pod_name,
                allow_loopback_http=s.workspace_loopback_http,
                private_repositories=s.workspace_secrets,
                add_later=add_later,
                observe=_observe_kube,
            ),
        )

        def seen(plural: str, kind: str | None, obj: Mapping[str, Any]) -> None:
            loop.call_soon_threadsafe(operator.saw, plural, kind, obj)

        def notified(uid: str | None) -> None:
            loop.call_soon_threadsafe(operator.notify, uid)

        self.watch = Watch(seen=seen, failed=fence_off, in_cluster=s.kubeconfig is None)
        listener = Listener(s.database_url, notified)
        self.watch.start()
        listener.start()
        self.leading = True
        log.info("leading", extra={"identity": s.pod_name})
        try:
            await operator.run()
        except Exception as e:
            log.exception("control loop failed")
            fence_off(f"control loop failed: {e}")
        finally:
            self.leading = False
            await asyncio.to_thread(self.watch.stop)
            await asyncio.to_thread(listener.stop)

    async def _wait_for_kinds(self, cluster: kube.KubeCluster) -> None:
        """A watch that begins without its kinds would never look for them again."""
        for plural in KINDS:
            while not await cluster.crd_exists(plural):
                self._obstacle = f"the CRD {plural}.{GROUP} is missing; install the chart"
                log.error("CRD missing", extra={"problem": self._obstacle})
                await asyncio.sleep(RETRY_SECONDS)
        self._obstacle = None

    # ------------------------------------------------------------------ what health and metrics ask

    def alive(self) -> str | None:
        """Leading without a watch is a reason to restart."""
        if self.leading and self.watch is not None and not self.watch.alive:
            return "the watch thread has ended"
        return None

    def ready(self) -> str | None:
        """A follower is ready, too; a leader once it has listed everything."""
        if self._obstacle is not None:
            return self._obstacle
        if self.leading and self.operator is not None and self.operator.last_resync is None:
            return "the first listing is not done"
        return None

    def collect(self) -> None:
        """Refresh the gauges that only the leader reports."""
        if not self.leading or self.operator is None:
            return
        now, operator = self._clock.monotonic(), self.operator
        for plural in KINDS:
            last = max(operator.last_event.get(plural, 0.0), operator.last_resync or 0.0)
            metrics.WATCH_STALENESS.labels(plural).set(now - last if last else 0.0)
        stalled = Counter(
            c["reason"]
            for obj in operator.intents()
            for c in (obj.get("status") or {}).get("conditions", ())
            if (c["type"], c["status"]) == ("Stalled", "True")
        )
        _set(metrics.STALLED, {(reason,): float(n) for reason, n in stalled.items()})
        try:
            found = gauges.read(self._pool, app_version=self._settings.app_version)
        except Unavailable:
            metrics.DATABASE_UP.set(
                0
            )  # the other series stay as they were: gone ones would look like a dead controller
            return
        metrics.DATABASE_UP.set(1)
        _set(metrics.QUEUE_DEPTH, {key: float(n) for key, n in found.depth.items()})
        _set(metrics.QUEUE_OLDEST, {(queue,): age for queue, age in found.oldest.items()})
        _set(metrics.INTENTS, {(Status(status).phase,): float(n) for status, n in found.runs.items()})
        _set(metrics.RUN_AGE, {(Status(status).phase,): age for status, age in found.run_age.items()})
        _set(metrics.STRANDED, {("version",): float(sum(found.stranded.values()))})


def _set(gauge: Gauge, values: dict[tuple[str, ...], float]) -> None:
    gauge.clear()
    for labels, value in values.items():
        gauge.labels(*labels).set(value)


def _observe_kube(what: str, value: float) -> None:
    if what == "identity_enforced":
        metrics.IDENTITY_ENFORCED.set(value)
    elif what == "reconcile":
        metrics.RECONCILE_SECONDS.observe(value)
    elif what == "status_lag":
        metrics.STATUS_LAG.observe(value)
