"""The worker role: DBOS on both queues, the executor's lease, the sweeper."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from controller import metrics
from controller.config import Settings
from controller.db.lease import PgLeaseStore
from controller.db.ledger import PgTurnLedger
from controller.db.migrate import sqlalchemy_url
from controller.db.pool import Pool
from controller.db.runs import PgRunStore
from controller.db.work import PgWorkStore
from controller.ports import AgentServer, Clock, SandboxProvider, Workspace
from controller.roles.fence import fence_off
from controller.workflows import engine, recovery
from controller.workflows.parts import Parts, install

DRAIN_SECONDS = 2


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What the worker talks to."""

    agent: AgentServer
    workspace: Workspace
    sandboxes: SandboxProvider
    clock: Clock


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
