"""A service that is busy or is being restarted is waited out while a sandbox is made. For providers that talk over a network."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

LOOK = 0.2  # seconds between two questions whether to stop
T = TypeVar("T")


async def patiently(
    ask: Callable[[], Awaitable[T]],
    *,
    passing: Callable[[Exception], bool],
    seconds: float,
    stopped: Callable[[], bool],
) -> T:
    """Asks until there is an answer, with growing pauses. Raises what is not `passing`, and all after `seconds` or once `stopped`.

    An error may say by `retry_after` how many seconds it wants at least.
    """
    deadline, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return await ask()
        except Exception as e:
            waits = max(pause, getattr(e, "retry_after", 0.0))
            if not passing(e) or time.monotonic() + waits > deadline or await _stops(waits, stopped):
                raise
        pause = min(2 * pause, 8.0)


async def _stops(waits: float, stopped: Callable[[], bool]) -> bool:
    """Whether we were stopped while we waited so long, give or take a half."""
    until = time.monotonic() + waits * (0.5 + random.random())
    while not stopped():
        left = until - time.monotonic()
        if left <= 0:
            return False
        await asyncio.sleep(min(left, LOOK))
    return True
