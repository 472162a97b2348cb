"""The composition root: builds adapters from settings, starts the worker and the controller, owns the order of shutdown.

Tests compose the same parts with other adapters through `build(...)`; nothing else in the product knows about that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import Gauge

from controller import metrics
from controller.config import ConfigError, Settings
from controller.db import gauges
from controller.db.lease import PgLeaseStore
from controller.db.ledger import PgTurnLedger
from controller.db.migrate import sqlalchemy_url
from controller.db.notify import Listener
from controller.db.pool import Pool, open_pool
from controller.db.runs import PgRunStore
from controller.db.work import PgWorkStore
from controller.gateway import health
from controller.kube import client as kube
from controller.kube.cache import Cache
from controller.kube.gate import IdentityGate
from controller.kube.lease import lead
from controller.kube.operator import Operator
from controller.kube.policy import Policies
from controller.kube.reconcile import Reconciler
from controller.kube.watch import KINDS, Watch
from controller.oc.client import OpenCodeClient
from controller.oc.live import LiveAgent
from controller.oc.record import RecordingAgent
from controller.oc.replay import ReplayAgent
from controller.ports import AgentServer, Clock, SandboxProvider, Workspace
from controller.sbx import templates
from controller.sbx.local import LocalProvider
from controller.sbx.mock import MockProvider
from controller.workflows import engine, recovery
from controller.workflows.parts import Parts, install
from controller.workspace.workspace import GitWorkspace

log = logging.getLogger(__name__)
DRAIN_SECONDS = 2


class SystemClock:
    """The real Clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What the worker talks to."""

    agent: AgentServer
    workspace: Workspace
    sandboxes: SandboxProvider
    clock: Clock


def build(
    settings: Settings,
    *,
    agent: AgentServer | None = None,
    workspace: Workspace | None = None,
    sandboxes: SandboxProvider | None = None,
    clock: Clock | None = None,
) -> Adapters:
    """The adapters that the settings name. Raises ConfigError for what this build does not have."""
    return Adapters(
        agent=agent or _agent(settings),
        workspace=workspace
        or GitWorkspace(settings.workspace_root, allow_loopback_http=settings.workspace_loopback_http),
        sandboxes=sandboxes or _sandboxes(settings),
        clock=clock or SystemClock(),
    )


def _agent(settings: Settings) -> AgentServer:
    if settings.oc_mode == "replay":
        return ReplayAgent(settings.oc_fixtures)
    url = settings.oc_base_url or f"http://127.0.0.1:{settings.oc_server_port}"
    live = LiveAgent(OpenCodeClient(url, password=settings.oc_server_password))
    if settings.oc_mode == "live":
        return live
    return RecordingAgent(live, directory=settings.oc_fixtures, opencode="unknown", model="unknown")


def _sandboxes(settings: Settings) -> SandboxProvider:
    if settings.sbx_mode == "mock":
        return MockProvider(start_log=settings.sbx_start_log)
    if settings.sbx_provider != "local":
        raise ConfigError(f"SBX_PROVIDER holds {settings.sbx_provider!r}; this build has: local")
    manifests = [templates.load(path) for path in settings.toolchains]
    return LocalProvider(
        state_root=settings.sbx_root,
        templates=[templates.base(), *manifests],
        start_log=settings.sbx_start_log,
        observe=_observe_local,
    )


def _observe_local(stage: str, seconds: float) -> None:
    if stage != "total":  # the total is observed by TaskWF, with its outcome
        metrics.SANDBOX_SECONDS.labels("local", stage, "").observe(seconds)


def fence_off(reason: str) -> None:
    """End at once, without clean-up: somebody else may already be doing this process' work."""
    log.critical("fenced off", extra={"reason": reason})
    logging.shutdown()
    os._exit(75)


class Worker:
    """DBOS, the executor's lease, the sweeper. No right on Intents or PlanApprovals is needed."""

    def __init__(self, settings: Settings, adapters: Adapters, pool: Pool) -> None:
        self._settings = settings
        # Never reused: two incarnations under one executor id would take each other's work for their own.
        self.executor = f"{settings.pod_name}-{secrets.token_hex(4)}"
        leases = PgLeaseStore(pool, app_version=settings.app_version)
        store = PgWorkStore(pool, app_version=settings.app_version, executor=self.executor)
        self._lease = recovery.Lease(
            leases, executor=self.executor, ttl=settings.lease_ttl_seconds, clock=adapters.clock, fence_off=fence_off
        )
        self._cancel = recovery.CancelWatch(store)
        self._sweeper = recovery.sweeper(leases, seconds=settings.lease_ttl_seconds / 3)
        provider = adapters.sandboxes.name

        def observe(what: str, outcome: str, seconds: float) -> None:
            if what == "fence_rejected":
                metrics.FENCE_REJECTIONS.inc()
            elif what.startswith("step:"):
                metrics.STEP_SECONDS.labels(what.removeprefix("step:"), outcome).observe(seconds)
            else:
                metrics.SANDBOX_SECONDS.labels(provider, what, outcome).observe(seconds)

        install(
            Parts(
                store=store,
                store_id=PgRunStore(pool, app_version=settings.app_version).store_id(),
                ledger=lambda ctx: PgTurnLedger(pool, ctx),
                agent=adapters.agent,
                workspace=adapters.workspace,
                sandboxes=adapters.sandboxes,
                clock=adapters.clock,
                canceled_runs=self._cancel.runs,
                observe=observe,
                fence_off=fence_off,
            )
        )

    def start(self) -> None:
        """Lease first, then dequeue. Must be called while no event loop runs in this thread: DBOS would adopt it."""
        s = self._settings
        self._lease.start()
        engine.launch(
            url=sqlalchemy_url(s.database_url_worker or s.database_url),
            executor=self.executor,
            app_version=s.app_version,
            poll_seconds=s.poll_seconds,
            intent_concurrency=s.intent_concurrency,
            sbx_concurrency=s.sbx_concurrency,
        )
        self._cancel.loop.start()
        self._sweeper.start()

    def stop(self) -> None:
        """What still runs afterwards is taken over by a peer or the next start."""
        self._sweeper.stop()
        self._cancel.loop.stop()
        engine.stop(seconds=DRAIN_SECONDS)
        self._lease.stop()


class Controller:
    """The control loop in the main thread's event loop; kopf, LISTEN and reconcile's database calls in threads."""

    def __init__(self, settings: Settings, pool: Pool, clock: Clock) -> None:
        self._settings, self._pool, self._clock = settings, pool, clock
        self._policies = Policies(settings.policy_file)
        self._store = PgRunStore(pool, app_version=settings.app_version)
        self.operator: Operator | None = None
        self.watch: Watch | None = None
        self.leading = False

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set, or something that it cannot live without is lost; then it raises."""
        api = await kube.connect(self._settings.kubeconfig)
        try:
            leader = asyncio.create_task(
                lead(
                    api,
                    namespace=self._settings.namespace,
                    identity=self._settings.pod_name,
                    leading=lambda: self._lead(kube.KubeCluster(api)),
                    lost=self._lost,
                )
            )
            stopping = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait({leader, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if leader in done:
                leader.result()
            leader.cancel()
            await asyncio.gather(leader, return_exceptions=True)
        finally:
            await api.close()  # type: ignore[no-untyped-call]

    async def _lost(self) -> None:
        fence_off("the leader lease was lost")

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

    # ------------------------------------------------------------------ what health and metrics ask

    def alive(self) -> str | None:
        """Leading without a watch is a reason to restart."""
        if self.leading and self.watch is not None and not self.watch.alive:
            return "the watch thread has ended"
        return None

    def ready(self) -> str | None:
        """A follower is ready, too; a leader once it has listed everything."""
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
        found = gauges.read(self._pool, app_version=self._settings.app_version)
        _set(metrics.QUEUE_DEPTH, {key: float(n) for key, n in found.depth.items()})
        _set(metrics.QUEUE_OLDEST, {(queue,): age for queue, age in found.oldest.items()})
        _set(metrics.INTENTS, {(status,): float(n) for status, n in found.runs.items()})
        _set(metrics.RUN_AGE, {(status,): age for status, age in found.run_age.items()})
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


def product_version() -> str:
    """From the installed package, or the source tree's."""
    try:
        return version("sisu-kodo")
    except PackageNotFoundError:
        return "0.1.0-dev"


def run(settings: Settings, *, role: str, adapters: Adapters | None = None) -> int:
    """The whole life of the process; its exit code. SIGTERM and SIGINT end it within 5 seconds."""
    pool = open_pool(settings.database_url, size=16, name="sisu-kodo")
    clock = adapters.clock if adapters else SystemClock()
    metrics.BUILD_INFO.labels(product_version(), settings.app_version, role).set(1)
    worker = controller = None
    if role in ("all", "worker"):
        worker_pool = (
            open_pool(settings.database_url_worker, size=16, name="sisu-kodo-worker")
            if settings.database_url_worker
            else pool
        )
        worker = Worker(settings, adapters or build(settings), worker_pool)
        worker.start()
    if role in ("all", "controller"):
        controller = Controller(settings, pool, clock)
    admin = _admin(settings, controller, pool)
    admin.start()
    if settings.admin_port_file is not None:
        settings.admin_port_file.write_text(f"{admin.port}\n")
    log.info("started", extra={"role": role, "admin_port": admin.port})
    try:
        if controller is not None:
            asyncio.run(_until_signal(controller))
        else:
            _wait_for_signal()
    finally:
        log.info("stopping")
        watchdog = threading.Timer(
            DRAIN_SECONDS + 2.5, os._exit, args=(0,)
        )  # nothing may hold the exit up: state is in PostgreSQL
        watchdog.daemon = True
        watchdog.start()
        admin.stop()
        if worker is not None:
            worker.stop()
        log.info("stopped")
        logging.shutdown()
    os._exit(0)  # threads of libraries that do not end by themselves must not keep the process


def _admin(settings: Settings, controller: Controller | None, pool: Pool) -> health.AdminServer:
    def database() -> str | None:
        try:
            with pool.connection(timeout=2) as c:
                c.execute("SELECT 1")
        except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
            return f"PostgreSQL: {type(e).__name__}"
        return None

    ready = {"database": database}
    alive = {}
    if controller is not None:
        alive["watch"] = controller.alive
        ready["listed"] = controller.ready
    api = health.app(alive=alive, ready=ready, collect=controller.collect if controller else lambda: None)
    return health.AdminServer(api, host=settings.admin_host, port=settings.admin_port)


async def _until_signal(controller: Controller) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await controller.run(stop)


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
