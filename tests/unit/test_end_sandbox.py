"""Law 9: while nobody knows whether a sandbox is gone, no other attempt begins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from controller.core.errors import Unavailable
from controller.core.model import Owner
from controller.workflows.parts import Parts
from controller.workflows.task import end_sandbox

OWNER = Owner(store_id="s", run_id="r", task_key="k", attempt=1, fence=7)


@dataclass
class Silent:
    """The parts that are used: a provider that answers at the third time, a clock, no jitter."""

    asked: list[Owner] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    @property
    def sandboxes(self) -> Silent:
        return self

    @property
    def clock(self) -> Silent:
        return self

    def kill(self, owner: Owner) -> int:
        self.asked.append(owner)
        if len(self.asked) < 3:
            raise Unavailable("the provider does not answer")
        return 1

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def jitter(self) -> float:
        return 0.5


def test_law_9_a_kill_that_is_not_confirmed_is_asked_for_again() -> None:
    silent = Silent()
    assert end_sandbox(cast("Parts", silent), OWNER) == 1
    assert silent.asked == [OWNER] * 3
    assert silent.slept == [2.0, 2.0]
