"""What is asked again, for how long, and how soon it stops."""

from __future__ import annotations

import asyncio
import time

import pytest

from controller.sbx.patience import patiently


class Busy(Exception):
    def __init__(self, retry_after: float = 0.0) -> None:
        self.retry_after = retry_after


class Service:
    """Is busy `times` times."""

    def __init__(self, times: int, retry_after: float = 0.0) -> None:
        self.times, self.retry_after, self.asked = times, retry_after, 0

    async def ask(self) -> str:
        self.asked += 1
        if self.asked > self.times:
            return "done"
        raise Busy(self.retry_after)


async def wait_for(service: Service, *, seconds: float = 60, killed: float = 1e9, passing: bool = True) -> str:
    """`killed` after so many seconds."""
    began = time.monotonic()
    return await patiently(
        service.ask,
        passing=lambda e: passing and isinstance(e, Busy),
        seconds=seconds,
        stopped=lambda: time.monotonic() - began > killed,
    )


def test_it_is_asked_until_it_answers() -> None:
    service, began = Service(2), time.monotonic()
    assert asyncio.run(wait_for(service)) == "done"
    assert service.asked == 3 and time.monotonic() - began > 0.25 + 0.5


def test_what_does_not_pass_is_asked_once() -> None:
    service = Service(1)
    with pytest.raises(Busy):
        asyncio.run(wait_for(service, passing=False))
    assert service.asked == 1


def test_it_ends_when_its_time_is_over() -> None:
    service, began = Service(10**6), time.monotonic()
    with pytest.raises(Busy):
        asyncio.run(wait_for(service, seconds=1))
    assert 2 <= service.asked <= 4 and time.monotonic() - began < 1.5


def test_who_asks_for_more_time_than_there_is_is_not_waited_for() -> None:
    service, began = Service(1, retry_after=60), time.monotonic()
    with pytest.raises(Busy):
        asyncio.run(wait_for(service, seconds=30))
    assert time.monotonic() - began < 0.5


def test_a_long_pause_ends_when_it_is_stopped() -> None:
    service, began = Service(1, retry_after=30), time.monotonic()
    with pytest.raises(Busy):
        asyncio.run(wait_for(service, killed=0.3))
    assert service.asked == 1 and time.monotonic() - began < 1.0


def test_a_long_pause_ends_when_it_is_canceled() -> None:
    async def canceled() -> None:
        waiting = asyncio.create_task(wait_for(Service(1, retry_after=30)))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await waiting

    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(canceled())
    assert time.monotonic() - began < 0.5
