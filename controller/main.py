"""The composition root: builds adapters from settings, starts the worker and the controller, owns the order of shutdown.

Tests compose the same parts with other adapters through `build(...)`; nothing else in the product knows about that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from controller import metrics
from controller.config import ConfigError, Settings
from controller.core.errors import Permanent
from controller.db.admission import PgAdmission
from controller.db.lease import PgLeaseStore
from controller.db.ledger import PgTurnLedger
from controller.db.pool import Pool, open_pool
from controller.db.runs import PgRunStore
from controller.db.work import PgWorkStore
from controller.gateway import health
from controller.kube.credentials import KubeCredentials
from controller.oc.live import LiveAgent
from controller.oc.record import RecordingAgent
from controller.oc.replay import ReplayAgent
from controller.ports import AgentServer, Credentials, SandboxProvider
from controller.roles.adapters import Adapters, WorkerAdapters
from controller.roles.control import Controller
from controller.roles.opening import Opening
from controller.roles.worker import DRAIN_SECONDS, Worker
from controller.sbx import templates
from controller.sbx.e2b import E2BProvider
from controller.sbx.e2b_api import Account
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_pod import PodSettings
from controller.sbx.local import LocalProvider
from controller.sbx.mock import MockProvider
from controller.workspace.workspace import GitWorkspace

log = logging.getLogger(__name__)
RECURSION_LIMIT = 30_000
# Sandboxes per second, and at once, of all workers. E2B's Pro tier; what a small cluster's kubelets and API server take easily.
DEFAULT_LIMITS = {"e2b": (5.0, 100), "kubernetes": (10.0, 100)}


class SystemClock:
    """The real Clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def build(settings: Settings, *, role: str) -> Adapters:
    """The adapters that the settings name. Raises ConfigError for what this build does not have, Unavailable without a database."""
    pool = open_pool(settings.database_url, size=16, name="sisu-kodo")
    return Adapters(
        clock=SystemClock(),
        pool=pool,
        runs=PgRunStore(pool, app_version=settings.app_version),
        worker=None if role == "controller" else _worker(settings, pool),
    )


def _worker(settings: Settings, pool: Pool) -> WorkerAdapters:
    if settings.database_url_worker is not None:
        pool = open_pool(settings.database_url_worker, size=16, name="sisu-kodo-worker")
    # Never reused: two incarnations under one executor id would take each other's work for their own.
    executor = f"{settings.pod_name}-{secrets.token_hex(4)}"
    sandboxes = _sandboxes(settings)
    rate, most = DEFAULT_LIMITS.get(sandboxes.name, (0.0, 0))
    return WorkerAdapters(
        executor=executor,
        agent=_agent(settings),
        workspace=GitWorkspace(
            settings.workspace_root, allow_loopback_http=settings.workspace_loopback_http, environ=settings.git_environ
        ),
        credentials=_credentials(settings),
        sandboxes=sandboxes,
        admission=PgAdmission(
            pool=pool,
            provider=sandboxes.name,
            per_second=rate if settings.sbx_creates_per_second is None else settings.sbx_creates_per_second,
            concurrent=most if settings.sbx_max_concurrent is None else settings.sbx_max_concurrent,
        ),
        store=PgWorkStore(pool, app_version=settings.app_version, executor=executor),
        leases=PgLeaseStore(pool, app_version=settings.app_version),
        ledger=lambda ctx: PgTurnLedger(pool, ctx),
    )


def _credentials(settings: Settings) -> Credentials | None:
    if not settings.workspace_secrets:
        return None
    found = KubeCredentials(settings.kubeconfig)
    try:
        found.check()
    except Permanent as e:
        raise ConfigError(str(e)) from e
    return found


def _agent(settings: Settings) -> AgentServer:
    if settings.oc_mode == "replay":
        return ReplayAgent(settings.oc_fixtures)
    live = LiveAgent(
        settings.oc_base_url or f"http://127.0.0.1:{settings.oc_server_port}",
        password=settings.oc_server_password,
        version=settings.oc_version,
        turn_seconds=settings.oc_turn_seconds,
        concurrency=settings.oc_concurrency,
        observe=lambda outcome, seconds: metrics.OPENCODE_SECONDS.labels(outcome).observe(seconds),
    )
    try:
        live.check()
    except Permanent as e:
        raise ConfigError(str(e)) from e
    if settings.oc_mode == "live":
        return live
    return RecordingAgent(
        live, directory=settings.oc_fixtures, opencode=settings.oc_version, model=settings.oc_model or "unnamed"
    )


def _sandboxes(settings: Settings) -> SandboxProvider:
    if settings.sbx_mode == "mock":
        return MockProvider(start_log=settings.sbx_start_log)
    if settings.sbx_provider == "e2b":
        return _e2b(settings)
    if settings.sbx_provider == "kubernetes":
        return _kubernetes(settings)
    manifests = [templates.load(path) for path in settings.toolchains]
    return LocalProvider(
        state_root=settings.sbx_root,
        templates=[templates.base(), *manifests],
        start_log=settings.sbx_start_log,
        observe=partial(_observe_stage, "local"),
    )


def _e2b(settings: Settings) -> SandboxProvider:
    for name, value in (("E2B_API_KEY", settings.e2b_api_key), ("SBX_E2B_TEMPLATES", settings.sbx_e2b_templates)):
        if not value:
            raise ConfigError(f"{name} is not set; SBX_PROVIDER=e2b needs it (docs/configuration.md)")
    account = Account(
        key=settings.e2b_api_key,
        domain=settings.e2b_domain,
        api_url=settings.e2b_api_url,
        sandbox_url=settings.e2b_sandbox_url,
    )
    return E2BProvider(
        account,
        templates=settings.e2b_templates,
        start_log=settings.sbx_start_log,
        observe=partial(_observe_stage, "e2b"),
    )


def _kubernetes(settings: Settings) -> SandboxProvider:
    if not settings.sbx_kubernetes_templates:
        needs = "SBX_PROVIDER=kubernetes needs it (docs/configuration.md)"
        raise ConfigError(f"SBX_KUBERNETES_TEMPLATES is not set; {needs}")
    return KubernetesProvider(
        settings.kubeconfig,
        templates=settings.kubernetes_templates,
        pods=pod_settings(settings),
        start_log=settings.sbx_start_log,
        observe=partial(_observe_stage, "kubernetes"),
    )


def pod_settings(settings: Settings) -> PodSettings:
    """What all sandbox Pods have in common."""
    return PodSettings(
        namespace=settings.sbx_kubernetes_namespace,
        runtime_class=settings.sbx_kubernetes_runtime_class,
        pull_secrets=[name for name in settings.sbx_kubernetes_pull_secrets.split(",") if name],
        node_selector=settings.kubernetes_node_selector,
        tolerations=settings.kubernetes_tolerations,
        boot=settings.sbx_kubernetes_boot_seconds,
        claims=settings.sbx_kubernetes_claims,
        canary=settings.sbx_kubernetes_canary,
    )


def _observe_stage(provider: str, stage: str, seconds: float) -> None:
    if stage != "total":  # the total is observed by TaskWF, with its outcome
        metrics.SANDBOX_SECONDS.labels(provider, stage, "").observe(seconds)


def product_version() -> str:
    """From the installed package, or the source tree's."""
    try:
        return version("sisu-kodo")
    except PackageNotFoundError:
        return "0.1.0-dev"


def run(settings: Settings, *, role: str, adapters: Adapters | None = None) -> int:
    """The whole life of the process; its exit code. SIGTERM and SIGINT end it within 5 seconds."""
    # The API server takes JSON of 10,000 levels, and a list that holds one such object must still be read.
    sys.setrecursionlimit(RECURSION_LIMIT)
    adapters = adapters or build(settings, role=role)
    pool = adapters.pool
    metrics.BUILD_INFO.labels(product_version(), settings.app_version, role).set(1)
    worker = None if adapters.worker is None else _opening(settings, adapters, adapters.worker)
    controller = None
    if worker is not None:
        worker.start()
    if role in ("all", "controller"):
        controller = Controller(settings, adapters)
    admin = _admin(settings, controller, worker, pool)
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


def _opening(settings: Settings, adapters: Adapters, own: WorkerAdapters) -> Opening:
    def make() -> Worker:
        return Worker(settings, own, clock=adapters.clock, store_id=adapters.runs.store_id())

    return Opening(adapters.pool, make)


def _admin(settings: Settings, controller: Controller | None, worker: Opening | None, pool: Pool) -> health.AdminServer:
    def database() -> str | None:
        try:
            with pool.connection(timeout=2) as c:
                c.execute("SELECT 1")
        except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
            return f"PostgreSQL: {type(e).__name__}"
        return None

    ready = {"database": database}
    alive = {}
    if worker is not None:
        ready["opened"] = worker.ready
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
