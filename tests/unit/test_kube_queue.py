"""The work queue: a key waits once, is worked on by one worker at a time, and comes back later after an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from controller.core.errors import Conflict, Unavailable
from controller.kube.queue import FEW, FIRST_DELAY, MAX_DELAY, SHARE, WorkQueue


@contextlib.asynccontextmanager
async def working(handle: Callable[[str], Awaitable[None]], *, workers: int = 4) -> AsyncIterator[WorkQueue]:
    queue = WorkQueue(handle, workers=workers)
    running = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - whatever is waited for has no event
            await asyncio.sleep(0.005)


async def test_a_key_that_waits_is_handled_once() -> None:
    handled: Counter[str] = Counter()

    async def handle(key: str) -> None:
        handled[key] += 1

    queue = WorkQueue(handle, workers=1)
    for _ in range(50):
        queue.add("a")
    queue.add("b")
    assert len(queue) == 2
    running = asyncio.create_task(queue.run())
    await until(lambda: len(queue) == 0)
    running.cancel()
    assert handled == {"a": 1, "b": 1}


async def test_a_key_is_never_handled_twice_at_once_but_others_are_meanwhile() -> None:
    busy: Counter[str] = Counter()
    most: Counter[str] = Counter()
    together = 0

    async def handle(key: str) -> None:
        nonlocal together
        busy[key] += 1
        most[key] = max(most[key], busy[key])
        together = max(together, sum(busy.values()))
        await asyncio.sleep(0.01)
        busy[key] -= 1

    async with working(handle) as queue:
        for _ in range(5):
            queue.add("a")
            queue.add("b")
            await asyncio.sleep(0.004)
        await until(lambda: len(queue) == 0)
    assert most == {"a": 1, "b": 1} and together == 2


async def test_a_key_that_is_added_while_it_is_handled_is_handled_once_more() -> None:
    handled = 0
    let_go = asyncio.Event()

    async def handle(_: str) -> None:
        nonlocal handled
        handled += 1
        await let_go.wait()

    async with working(handle) as queue:
        queue.add("a")
        await until(lambda: handled == 1)
        for _ in range(3):
            queue.add("a")
        await asyncio.sleep(0.02)
        assert handled == 1
        let_go.set()
        await until(lambda: len(queue) == 0)
        assert handled == 2


@pytest.mark.parametrize("error", [Conflict("moved"), Unavailable("down"), KeyError("bug")])
async def test_an_error_brings_the_key_back_with_growing_delay_until_it_works(error: Exception) -> None:
    times: list[float] = []
    loop = asyncio.get_running_loop()

    async def handle(_: str) -> None:
        times.append(loop.time())
        if len(times) < 4:
            raise error

    async with working(handle) as queue:
        queue.add("a")
        await until(lambda: len(times) == 4)
        assert queue.errors == 3
        gaps = [b - a for a, b in itertools.pairwise(times)]
        wanted = [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
        assert all(gap >= want * 0.95 for gap, want in zip(gaps, wanted, strict=True)), gaps
        times[:] = times[:3]  # fails once more: the delay begins at its first value again
        queue.add("a")
        await until(lambda: len(times) == 4)
        await until(lambda: not queue._delays)


async def test_the_delay_has_a_ceiling_and_one_bad_key_does_not_hold_up_others() -> None:
    good = asyncio.Event()

    async def handle(key: str) -> None:
        if key == "bad":
            raise Unavailable("down")
        good.set()

    async with working(handle, workers=1) as queue:
        queue._delays["bad"] = MAX_DELAY
        queue.add("bad")
        queue.add("good")
        await asyncio.wait_for(good.wait(), 2)
        assert queue._delays["bad"] == MAX_DELAY


async def test_add_later_adds_then() -> None:
    seen: list[str] = []

    async def handle(key: str) -> None:
        seen.append(key)

    async with working(handle) as queue:
        queue.add_later("a", 0.05)
        await asyncio.sleep(0.01)
        assert seen == []
        await until(lambda: seen == ["a"])


async def test_of_several_later_looks_the_soonest_remains() -> None:
    seen: list[str] = []

    async def handle(key: str) -> None:
        seen.append(key)

    async with working(handle) as queue:
        for seconds in (0.2, 0.05, 0.1):
            queue.add_later("a", seconds)
        await asyncio.sleep(0.3)
        assert seen == ["a"]


async def test_a_look_replaces_the_later_one_that_was_asked_for_before_and_may_ask_anew() -> None:
    seen: list[str] = []

    async def handle(key: str) -> None:
        seen.append(key)
        if len(seen) == 1:
            queue.add_later(key, 0.1)

    async with working(handle) as queue:
        queue.add_later("a", 0.05)
        queue.add("a")
        await asyncio.sleep(0.07)
        assert seen == ["a"]
        await until(lambda: seen == ["a", "a"])


async def test_every_key_is_handled_when_there_are_more_than_workers() -> None:
    handled: Counter[str] = Counter()

    async def handle(key: str) -> None:
        await asyncio.sleep(0)
        handled[key] += 1

    async with working(handle, workers=3) as queue:
        for n in range(500):
            queue.add(str(n))
        await until(lambda: len(queue) == 0)
    assert len(handled) == 500 and set(handled.values()) == {1}


async def order(add: Callable[[WorkQueue], None], count: int) -> list[str]:
    """In which order one worker handles what was added before it began."""
    handled: list[str] = []

    async def handle(key: str) -> None:
        handled.append(key)

    queue = WorkQueue(handle, workers=1)
    add(queue)
    assert len(queue) == count
    running = asyncio.create_task(queue.run())
    await until(lambda: len(handled) == count)
    running.cancel()
    return handled


async def test_what_somebody_waits_for_comes_before_what_can_wait() -> None:
    def add(queue: WorkQueue) -> None:
        queue.add("new", urgent=False)
        queue.add("both", urgent=False)
        queue.add("vote")
        queue.add("both")
        queue.add("vote", urgent=False)

    assert await order(add, 3) == ["vote", "both", "new"]


async def test_what_can_wait_does_not_wait_for_ever() -> None:
    def add(queue: WorkQueue) -> None:
        queue.add("patient", urgent=False)
        for n in range(3 * SHARE):
            queue.add(str(n))

    assert (await order(add, 3 * SHARE + 1)).index("patient") == SHARE - 1


async def test_few_workers_serve_what_can_wait_and_the_others_stay_free() -> None:
    let_go = asyncio.Event()
    busy: list[str] = []

    async def handle(key: str) -> None:
        busy.append(key)
        await let_go.wait()

    async with working(handle, workers=2 * FEW) as queue:
        for n in range(2 * FEW):
            queue.add(f"new{n}", urgent=False)
        await asyncio.sleep(0.02)
        assert len(busy) == 2
        queue.add("vote")
        await until(lambda: "vote" in busy)
        let_go.set()
        await until(lambda: len(queue) == 0)
    assert len(busy) == 2 * FEW + 1
