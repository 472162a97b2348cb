"""The executor's lease: whoever finds that it ran out must end, and never take it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import pytest

from controller.workflows.recovery import Lease


class Ended(Exception):
    """What fence_off does to a process."""


@dataclass
class Leases:
    """LeaseStore that remembers; `renews` is its answer."""

    renews: bool = True
    said: list[str] = field(default_factory=list)

    def take(self, executor: str, *, ttl: float) -> None:
        self.said.append("take")

    def renew(self, executor: str, *, ttl: float) -> bool:
        self.said.append("renew")
        return self.renews

    def release(self, executor: str) -> None:
        self.said.append("release")

    def sweep(self, recover: Callable[[Sequence[str]], None]) -> Mapping[str, int]:
        return {}

    def live_attempts(self, fences: Sequence[int]) -> frozenset[int]:
        return frozenset()


@dataclass
class Hands:
    """A clock that is set."""

    at: float = 0.0

    def now(self) -> datetime:
        raise NotImplementedError

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


def lease(leases: Leases, clock: Hands) -> Lease:
    def end(reason: str) -> None:
        raise Ended(reason)

    return Lease(leases, executor="e", ttl=6.0, clock=clock, fence_off=end)


def test_it_is_taken_once_and_renewed_from_then_on() -> None:
    leases, clock = Leases(), Hands()
    mine = lease(leases, clock)
    mine.start()
    mine._beat()
    mine.stop()
    assert leases.said == ["take", "renew", "release"]


def test_a_lease_that_ran_out_ends_the_process_and_is_not_taken_again() -> None:
    """Its workflows may run elsewhere under the same ids: two that go on would take each task from one another until it is LOST."""
    leases = Leases(renews=False)
    with pytest.raises(Ended, match="ran out"):
        lease(leases, Hands())._beat()
    assert leases.said == ["renew"]


def test_the_watchdog_ends_what_could_not_renew_for_its_whole_length() -> None:
    leases, clock = Leases(), Hands()
    mine = lease(leases, clock)
    mine._beat()
    clock.at = 6.0
    mine._watch()
    clock.at = 6.1
    with pytest.raises(Ended, match="could not be renewed"):
        mine._watch()
