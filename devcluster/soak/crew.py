"""The workers of a soak: processes of role worker that are killed or stopped for longer than their lease, and replaced later."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Mapping

from devcluster.errors import DevclusterError
from devcluster.processes import tail
from devcluster.soak.evidence import Store
from devcluster.soak.rows import Interruption
from devcluster.stack import Controller, Stack
from devcluster.trial.api import now
from devcluster.trial.numbers import counters
from devcluster.trial.progress import say

SANDBOXES = "sisukodo_sandboxes"
READY_SECONDS = 60.0
ASK_SECONDS = 0.5


class Crew:
    """All calls from the main thread, which processes end with."""

    def __init__(
        self,
        stack: Stack,
        settings: Mapping[str, str],
        *,
        ttl: float,
        chance: random.Random,
        store: Store,
    ) -> None:
        self._stack, self._ttl, self._chance, self._store = stack, ttl, chance, store
        self._settings = {**settings, "LEASE_TTL_SECONDS": f"{ttl:g}"}
        self._count = 0
        self._asked = 0.0
        self._worked, self._since = 0.0, time.monotonic()
        self._members: dict[str, Controller] = {}
        self._ready: set[str] = set()
        self._frozen: dict[str, float] = {}
        self._disowned: set[str] = set()
        self._zombies: set[str] = set()
        self._replace_at: list[float] = []
        self.interruptions: list[Interruption] = []
        self.codes: dict[str, int | None] = {}
        self.all: list[Controller] = []

    def open(self, count: int) -> None:
        """Start so many, and wait until all are ready."""
        for _ in range(count):
            self._hire()
        deadline = time.monotonic() + READY_SECONDS
        while len(self._ready) < count:
            self.tick()
            if time.monotonic() > deadline or self.codes:
                log = self.all[0].log
                raise DevclusterError(f"workers are not ready after {READY_SECONDS:.0f} s; {log}:\n{tail(log)}")
            time.sleep(0.1)

    def kill(self) -> bool:
        """SIGKILL for somebody who runs tasks. False: nobody does at the moment."""
        name = self._victim()
        if name is None:
            return False
        self._members[name].kill()
        self._gone(name, "killed")
        return True

    def freeze(self) -> bool:
        """SIGSTOP for somebody who runs tasks, for longer than its lease: when it may go on, its watchdog ends it at once."""
        return self._stop("stopped", self._ttl + self._chance.uniform(2, 4), expire=False)

    def disown(self) -> bool:
        """Its lease runs out while it is stopped, and it goes on when its tasks were just begun anew: the fence has to refuse it.

        Before its watchdog could notice: that looks at its own clock, and the lease ran out on the database's.
        """
        return self._stop("disowned", self._ttl / 2, expire=True)

    def tick(self) -> None:
        """What is due now: replacements, the end of a stop; and who has ended by itself."""
        self._worked += len(self._ready) * (time.monotonic() - self._since)
        self._since = time.monotonic()
        for name, until in list(self._frozen.items()):
            if time.monotonic() >= until or (name in self._disowned and self._store.superseded(name)):
                del self._frozen[name]
                self._zombies.add(name)
                self._members[name].child.signal(signal.SIGCONT)
                say(f"  {name} goes on")
        for name, one in list(self._members.items()):
            if not one.child.alive():
                self._gone(name, "ended")
        for at in [at for at in self._replace_at if time.monotonic() >= at]:
            self._replace_at.remove(at)
            self._hire()
        if time.monotonic() - self._asked >= ASK_SECONDS:
            self._asked = time.monotonic()
            self._ready |= {n for n, one in self._members.items() if n not in self._idle_asks() and one.ready()}

    def settled(self) -> bool:
        """Everybody is there, and nobody is stopped or a zombie."""
        waiting = self._replace_at or self._frozen or self._zombies
        return not waiting and self._members.keys() == self._ready

    def _stop(self, what: str, seconds: float, *, expire: bool) -> bool:
        name = self._victim()
        if name is None:
            return False
        self._members[name].child.signal(signal.SIGSTOP)
        if expire:
            self._store.expire(name)
            self._disowned.add(name)
        self._ready.discard(name)
        self._frozen[name] = time.monotonic() + seconds
        self.interruptions.append(Interruption(worker=name, what=what, at=now()))
        say(f"  {name} is {what}, for {seconds:.1f} s at most")
        return True

    def worked(self) -> float:
        """Seconds that workers were ready since this was last asked, all together."""
        self.tick()
        worked, self._worked = self._worked, 0.0
        return worked

    def sandboxes(self) -> list[str]:
        """By whose count there are sandboxes: what provider.owned(store) told each reaper when it looked last."""
        found = []
        for name in sorted(self._ready):
            text = self._members[name].get("/metrics")[1]
            counts = [n for labels, n in counters(text, SANDBOXES) if labels["state"] == "live"]
            if counts != [0]:
                found.append(f"{name} counts {counts or 'not yet'} sandboxes")
        return found

    def close(self) -> None:
        """End them all; a stopped one must go on first, or it would not hear."""
        for name, one in self._members.items():
            if name in self._frozen:
                one.child.signal(signal.SIGCONT)
            one.stop()
        self._members.clear()

    def _hire(self) -> None:
        self._count += 1
        name = f"worker-{self._count}"
        self._members[name] = self._stack.begin(name=name, role="worker", **self._settings)
        self.all.append(self._members[name])

    def _victim(self) -> str | None:
        busy = self._store.busy()
        ready = sorted(name for name in self._ready if busy.get(name))
        return self._chance.choice(ready) if ready else None

    def _idle_asks(self) -> set[str]:
        """Whom to ask is no use: known as ready, or stopped."""
        return self._ready | self._frozen.keys()

    def _gone(self, name: str, what: str) -> None:
        one = self._members.pop(name)
        self._ready.discard(name)
        self._zombies.discard(name)
        self.codes[name] = one.child.popen.returncode if one.child.popen else None
        self.interruptions.append(Interruption(worker=name, what=what, at=now()))
        self._replace_at.append(time.monotonic() + self._chance.uniform(0.5, 3))
        say(f"  {name} {'is killed' if what == 'killed' else f'ended with {self.codes[name]}'}")
