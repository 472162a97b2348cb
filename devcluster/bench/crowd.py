"""People who do not give up: requests are sent again until they are answered, and the watch is made again when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from devcluster.bench.people import HELLO, IN_FLIGHT, Timed
from devcluster.errors import DevclusterError
from devcluster.stack import Stack
from devcluster.trial.api import RESOURCES, Api, Phases, Refused, now

AGAIN_SECONDS = 0.2


class Crowd:
    """carol applies, alice approves, a lasting watch shows what becomes of it. `patience` is seconds per Intent and phase."""

    def __init__(self, carol: Api, alice: Api, seen: Phases, *, namespace: str, patience: float) -> None:
        self._carol, self._alice, self.seen = carol, alice, seen
        self._path = f"{RESOURCES}/namespaces/{namespace}"
        self._namespace, self._patience = namespace, patience
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    async def apply(self, name: str, goal: str = HELLO) -> Timed:
        """Create it."""
        one = Timed(name=name)
        async with self._slots:
            one.applied = now()
            one.uid = (await self._insist(lambda: self._create(name, goal)))["metadata"]["uid"]
        return one

    async def planned(self, one: Timed) -> Timed:
        """Wait until the watch shows it waiting."""
        sight = await self.seen.wait(one.name, "WaitingInput", seconds=self._patience)
        one.waiting, one.approval = sight.at, sight.status["plan"]["approvalName"]
        return one

    async def approve(self, one: Timed) -> Timed:
        """Vote, and wait until the watch shows it succeeded."""
        async with self._slots:
            one.voted = now()
            await self._insist(lambda: self._vote(one.approval))
        one.done = (await self.seen.wait(one.name, "Succeeded", seconds=self._patience)).at
        return one

    async def story(self, name: str) -> Timed:
        """All of it."""
        return await self.approve(await self.planned(await self.apply(name)))

    async def _create(self, name: str, goal: str) -> Any:
        try:
            return await self._carol.create_intent(self._namespace, name, {"goal": goal})
        except Refused as e:
            if e.status != 409:
                raise
            return await self._carol.send("GET", f"{self._path}/intents/{name}")  # an unanswered request came through

    async def _vote(self, approval: str) -> None:
        try:
            await self._alice.approve(self._namespace, approval)
        except Refused:
            obj = await self._alice.send("GET", f"{self._path}/planapprovals/{approval}")
            if not obj["spec"].get("decisions"):
                raise

    async def _insist(self, call: Callable[[], Awaitable[Any]]) -> Any:
        deadline = now() + self._patience
        while True:
            try:
                return await call()
            except (aiohttp.ClientError, TimeoutError, Refused) as e:
                if now() > deadline:
                    raise DevclusterError(f"no answer within {self._patience:.0f} s: {type(e).__name__}: {e}") from e
            await asyncio.sleep(AGAIN_SECONDS)


@asynccontextmanager
async def crowd(stack: Stack, namespace: str, *, patience: float) -> AsyncIterator[Crowd]:
    """Connections and watch, in this namespace."""
    async with (
        Api(stack.kubeconfig("carol")) as carol,
        Api(stack.kubeconfig("alice")) as alice,
        Phases(carol, namespace, lasting=True) as seen,
    ):
        yield Crowd(carol, alice, seen, namespace=namespace, patience=patience)
