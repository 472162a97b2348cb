"""Staying alive and burying the dead: the executor's lease, the sweeper, the reclaimer of lost claims, the reaper of orphaned
sandboxes, and the list of runs being canceled. One loop and one thread each.

A process that cannot renew its lease for its whole length ends at once: somebody else may already be doing its work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from controller.core.errors import Transient
from controller.core.model import Owner
from controller.ports import Clock, LeaseStore, SandboxProvider, WorkStore
from controller.workflows import engine

log = logging.getLogger(__name__)


class Lease:
    """Heartbeat of one executor, and a watchdog beside it: a heartbeat that hangs must not hide that the lease ran out.

    A lease that ran out on the database's clock is never taken again: two live executors would run the same workflows.

    `fence_off(reason)` must not return.
    """

    def __init__(
        self, store: LeaseStore, *, executor: str, ttl: float, clock: Clock, fence_off: Callable[[str], None]
    ) -> None:
        self._store, self._executor, self._ttl, self._clock, self._fence_off = store, executor, ttl, clock, fence_off
        self._renewed = clock.monotonic()
        self._loops = (
            Loop("lease", self._beat, seconds=ttl / 3),
            Loop("lease-watchdog", self._watch, seconds=min(0.5, ttl / 6)),
        )

    def start(self) -> None:
        """Take the lease, before anything is dequeued."""
        self._renewed = self._clock.monotonic()
        self._store.take(self._executor, ttl=self._ttl)
        for loop in self._loops:
            loop.start()

    def stop(self) -> None:
        """Release it: peers take over within one sweep."""
        for loop in reversed(self._loops):
            loop.stop()
        self._store.release(self._executor)

    def _beat(self) -> None:
        began = self._clock.monotonic()
        if not self._store.renew(self._executor, ttl=self._ttl):
            self._fence_off("the executor lease ran out")
        self._renewed = began

    def _watch(self) -> None:
        if self._clock.monotonic() - self._renewed > self._ttl:
            self._fence_off("the executor lease could not be renewed")


class Loop:
    """Calls `tick` every `seconds` until stopped; an error is logged and the next tick comes anyway."""

    def __init__(self, name: str, tick: Callable[[], None], *, seconds: float) -> None:
        self._name, self._tick, self._seconds = name, tick, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, at most one tick later."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._tick()
            except Exception:  # the loop must outlive whatever the database does
                log.exception("loop failed", extra={"loop": self._name})


def sweeper(store: LeaseStore, *, seconds: float) -> Loop:
    """Recover dead executors' work and repair what ended without an outcome; level-triggered, so it repeats until nothing is left."""

    def tick() -> None:
        did = store.sweep(
            lambda dead: log.info("executors recovered", extra={"dead": dead, "workflows": engine.recover(list(dead))})
        )
        if any(did.values()):
            log.warning("repaired", extra=dict(did))

    return Loop("sweeper", tick, seconds=seconds)


def reclaimer(claims: engine.LostClaims, *, seconds: float) -> Loop:
    """Claims of this process that it knows nothing of go back on their queues."""

    def tick() -> None:
        if lost := claims.look():
            log.warning("lost claims put back", extra={"workflows": lost})

    return Loop("reclaimer", tick, seconds=seconds)


class Reaper:
    """Kills sandboxes that nobody waits for: ours by mark and store id, and without a live attempt for a whole grace period.

    The period is measured here, from when one was first seen so: no clock of a provider is believed.
    """

    def __init__(
        self,
        provider: SandboxProvider,
        store: LeaseStore,
        *,
        store_id: str,
        clock: Clock,
        grace: float,
        observe: Callable[[int, int], None],
    ) -> None:
        self._provider, self._store, self._store_id, self._clock, self._grace = provider, store, store_id, clock, grace
        self._observe = observe  # (sandboxes that live, of them killed now)
        self._since: dict[int, float] = {}
        self.loop = Loop("reaper", self.look, seconds=grace / 2)

    def look(self) -> None:
        """One pass over everything that the provider has of this store."""
        owned = {owner.fence: owner for owner in self._provider.owned(self._store_id)}
        live = self._store.live_attempts(list(owned)) if owned else frozenset()
        now, killed = self._clock.monotonic(), 0
        self._since = {fence: self._since.get(fence, now) for fence in owned.keys() - live}
        for fence, since in self._since.items():
            if now - since >= self._grace:
                killed += self._reap(owned[fence])
        self._observe(len(owned), killed)

    def _reap(self, owner: Owner) -> int:
        """One that cannot be killed now is met again at the next look, and must not keep the others alive."""
        facts = {"task_key": owner.task_key, "fence": owner.fence}
        try:
            killed = self._provider.kill(owner)
        except Transient as e:
            log.warning("sandbox_orphan_not_reaped", extra={**facts, "error": str(e)})
            return 0
        log.warning("sandbox_orphan_reaped", extra=facts)
        return killed


class CancelWatch:
    """Which runs are being canceled, asked once for all running tasks."""

    def __init__(self, store: WorkStore, *, seconds: float = 0.5) -> None:
        self._store = store
        self._runs: frozenset[str] = frozenset()
        self.loop = Loop("cancel-watch", self._look, seconds=seconds)

    def runs(self) -> frozenset[str]:
        """At most `seconds` old."""
        return self._runs

    def _look(self) -> None:
        self._runs = self._store.canceling()
