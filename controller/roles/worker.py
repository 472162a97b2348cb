"""The worker role: DBOS on both queues, the executor's lease, and the loops that keep the work going."""

from __future__ import annotations

import random
import threading

import cachetools

from controller import metrics
from controller.config import Settings
from controller.db.migrate import sqlalchemy_url
from controller.ports import Clock
from controller.roles.adapters import WorkerAdapters
from controller.roles.fence import fence_off
from controller.workflows import engine, recovery
from controller.workflows.parts import Parts, install

DRAIN_SECONDS = 2
BLOB_CACHE_BYTES = 96 * 1024 * 1024  # snapshots and patches: every task of a run uploads the same ones


class Worker:
    """No right on Intents or PlanApprovals is needed."""

    def __init__(self, settings: Settings, adapters: WorkerAdapters, *, clock: Clock, store_id: str) -> None:
        self._settings = settings
        self._executor = adapters.executor
        self._lease = recovery.Lease(
            adapters.leases,
            executor=adapters.executor,
            ttl=settings.lease_ttl_seconds,
            clock=clock,
            fence_off=fence_off,
        )
        self._cancel = recovery.CancelWatch(adapters.store)
        self._sweeper = recovery.sweeper(adapters.leases, seconds=settings.lease_ttl_seconds / 3)
        self._reclaimer = recovery.reclaimer(
            engine.LostClaims(adapters.executor), seconds=settings.lease_ttl_seconds / 3
        )
        provider = adapters.sandboxes.name

        def count(live: int, killed: int) -> None:
            metrics.SANDBOXES.labels(provider, "live").set(live)
            metrics.ORPHANS.inc(killed)

        self._reaper = recovery.Reaper(
            adapters.sandboxes,
            adapters.leases,
            store_id=store_id,
            clock=clock,
            grace=settings.orphan_grace_seconds,
            observe=count,
        )

        def observe(what: str, outcome: str, seconds: float) -> None:
            if what == "fence_rejected":
                metrics.FENCE_REJECTIONS.inc()
            elif what.startswith("step:"):
                metrics.STEP_SECONDS.labels(what.removeprefix("step:"), outcome).observe(seconds)
            else:
                metrics.SANDBOX_SECONDS.labels(provider, what, outcome).observe(seconds)

        install(
            Parts(
                store=adapters.store,
                store_id=store_id,
                ledger=adapters.ledger,
                agent=adapters.agent,
                workspace=adapters.workspace,
                credentials=adapters.credentials,
                sandboxes=adapters.sandboxes,
                admission=adapters.admission,
                clock=clock,
                canceled_runs=self._cancel.runs,
                blob=cachetools.cached(cachetools.LRUCache(BLOB_CACHE_BYTES, getsizeof=len), lock=threading.Lock())(
                    adapters.store.blob
                ),
                observe=observe,
                jitter=random.Random(settings.random_seed).random,
                fence_off=fence_off,
            )
        )

    def start(self) -> None:
        """Lease first, then dequeue. Must be called while no event loop runs in this thread: DBOS would adopt it."""
        s = self._settings
        self._lease.start()
        engine.launch(
            url=sqlalchemy_url(s.database_url_worker or s.database_url),
            executor=self._executor,
            app_version=s.app_version,
            poll_seconds=s.poll_seconds,
            intent_concurrency=s.intent_concurrency,
            sbx_concurrency=s.sbx_concurrency,
        )
        self._cancel.loop.start()
        self._sweeper.start()
        self._reclaimer.start()
        self._reaper.loop.start()

    def stop(self) -> None:
        """What still runs afterwards is taken over by a peer or the next start."""
        self._reaper.loop.stop()
        self._reclaimer.stop()
        self._sweeper.stop()
        self._cancel.loop.stop()
        engine.stop(seconds=DRAIN_SECONDS)
        self._lease.stop()
