"""After a create that had no answer: whatever it made carries its owner's mark, is looked for, and killed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from controller.core.model import Owner
from controller.sbx.loop import Loop

log = logging.getLogger(__name__)


class Sweep:
    """`kill` says how many it killed; `told` puts its errors in words without secrets; `pauses` are seconds between further looks."""

    def __init__(
        self,
        loop: Loop,
        *,
        kill: Callable[[Owner], Awaitable[int]],
        told: Callable[[Exception], str],
        pauses: Sequence[float],
    ) -> None:
        self._loop, self._kill, self._told, self._pauses = loop, kill, told, pauses

    async def now(self, owner: Owner) -> None:
        """A look at once, and, should the create have come to nothing yet, more of them in the background."""
        if not await self._look(owner):
            self._loop.spawn(self._later(owner))

    async def _later(self, owner: Owner) -> None:
        for pause in self._pauses:
            await asyncio.sleep(pause)
            if await self._look(owner):
                return

    async def _look(self, owner: Owner) -> int:
        try:
            return await self._kill(owner)
        except Exception as e:  # noqa: BLE001 - told, and tried again
            log.warning("sandbox_sweep_failed", extra={"task_key": owner.task_key, "error": self._told(e)})
            return 0
