"""An event loop in a thread of its own, for providers that talk over a network, and an outer deadline around every call.

A library's own deadlines are not enough: the e2b SDK's do not fire on Python 3.11 once a stream is open, and on 3.12 and later
they may cancel the task that they were called from (docs/adr/0011). So every call runs in a task of its own, which is given up
when its time is over.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Silent(Exception):
    """No answer within the outer deadline."""


class JobCanceled(Exception):
    """The job was canceled, and has cleaned up behind itself."""


_given_up: set[asyncio.Task[Any]] = set()


async def within(seconds: float, work: Coroutine[Any, Any, T], what: str) -> T:
    """The work's result. Raises Silent when its time is over; the task is canceled then, and not waited for."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            give_up(task)
    if not task.done():
        raise Silent(f"{what}: no answer within {seconds:g} s")
    if task.cancelled():
        raise Silent(f"{what}: the call was taken back")
    return task.result()


def give_up(task: asyncio.Task[Any]) -> None:
    """Cancels it; how it ends interests nobody."""
    _given_up.add(task)
    task.add_done_callback(_forget)
    task.cancel()


def _forget(task: asyncio.Task[Any]) -> None:
    _given_up.discard(task)
    if not task.cancelled():
        task.exception()  # or asyncio logs that nobody asked


class Job(Generic[T]):
    """One coroutine on the loop, watched by a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self._canceled = False
        self._future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(self._shell(work), loop)

    async def _shell(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        try:
            if self._canceled:
                work.close()
                raise JobCanceled
            return await work
        except asyncio.CancelledError:
            raise JobCanceled from None

    def cancel(self) -> None:
        """Once is enough; the job's clean-up is not interrupted by a second."""

        def cancel() -> None:
            if not self._canceled:
                self._canceled = True
                if self._task is not None:
                    self._task.cancel()

        self._loop.call_soon_threadsafe(cancel)

    def when_over(self, tell: Callable[[], None]) -> None:
        """`tell` is called once, in whatever thread."""
        self._future.add_done_callback(lambda _: tell())

    def done(self) -> bool:
        """Whether result() would return at once."""
        return self._future.done()

    def result(self) -> T:
        """Waits. Raises JobCanceled, or what the coroutine raised."""
        return self._future.result()


class Loop:
    """An event loop in a daemon thread. `spawn` is for the loop's own coroutines, the rest for threads."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._background: set[asyncio.Task[Any]] = set()
        threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()

    def start(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        """Begin; the caller watches."""
        return Job(self._loop, work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Begin and wait."""
        return Job(self._loop, work).result()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Goes on whatever happens to the task that it was begun in. It must not raise."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def close(self) -> None:
        """Gives up what runs in the background."""

        async def close() -> None:
            # The e2b SDK's transport has threads of its own, which abort the interpreter when it ends in the midst of a call.
            for task in list(self._background):
                give_up(task)
            await asyncio.sleep(0.05)

        self.run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
