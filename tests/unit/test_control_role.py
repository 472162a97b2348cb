"""The controller's own word on whether it can lead: /readyz names what keeps it from beginning."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from controller.core.errors import Permanent, SisuError, Unavailable
from controller.kube import client
from controller.kube.client import KubeCluster
from controller.roles import control
from controller.roles.adapters import Adapters
from controller.roles.control import Controller


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - whatever is waited for has no event
            await asyncio.sleep(0.005)


class Alone:
    """A controller whose database, API server and election are scripted: they fail while these lists hold an error."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, compare: list[SisuError], crds: list[SisuError], wins: bool
    ) -> None:
        self.electing = self.led = False
        settings = SimpleNamespace(kubeconfig=None, namespace="ns", pod_name="me", policy_file=None)

        async def beat(_self: Controller, _outside: object) -> bool:
            answer(compare)
            return False

        async def crd_exists(plural: str) -> bool:
            answer(crds)
            return True

        async def elect(_api: object, *, leading: Callable[[], Coroutine[Any, Any, None]], **_: object) -> None:
            self.electing = True
            while wins and not self.led:
                try:
                    await leading()
                except SisuError:
                    await asyncio.sleep(0.05)
            await asyncio.Event().wait()

        async def lead(_self: Controller, _cluster: object) -> None:
            self.led = True

        async def nothing(*_: object, **__: object) -> None: ...

        async def connect(_: object) -> Any:
            return SimpleNamespace(close=nothing)

        monkeypatch.setattr(control, "RETRY_SECONDS", 0.05)
        monkeypatch.setattr(client, "connect", connect)
        monkeypatch.setattr(control, "Marks", lambda *_, **__: None)
        monkeypatch.setattr(control, "Policies", lambda _: None)
        monkeypatch.setattr(Controller, "_one_beat", beat)
        monkeypatch.setattr(Controller, "_lead", lead)
        monkeypatch.setattr(control, "lead", elect)
        monkeypatch.setattr(control, "release", nothing)
        cluster = cast("KubeCluster", SimpleNamespace(crd_exists=crd_exists))
        adapters = cast("Adapters", SimpleNamespace(pool=None, clock=None, runs=None, cluster=lambda _api: cluster))
        self.controller = Controller(cast("Any", settings), adapters)


def answer(errors: list[SisuError]) -> None:
    for error in errors:
        raise error


@pytest.mark.parametrize(
    ("compare", "crds", "said"),
    [
        ([Unavailable("the Lease cannot be read")], [], "the store is not compared: the Lease cannot be read"),
        ([Permanent("403: no roles yet")], [], "the store is not compared: 403: no roles yet"),
        ([], [Permanent("API server: 403: no")], "leading cannot begin: API server: 403: no"),
        ([], [Unavailable("API server: 500: away")], "leading cannot begin: API server: 500: away"),
    ],
)
@pytest.mark.parametrize("wins", [True, False], ids=["leader", "follower"])
async def test_what_keeps_it_from_leading_is_told_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, *, compare: list[SisuError], crds: list[SisuError], said: str, wins: bool
) -> None:
    compare, crds = list(compare), list(crds)
    alone = Alone(monkeypatch, compare=compare, crds=crds, wins=wins)
    stop = asyncio.Event()
    running = asyncio.create_task(alone.controller.run(stop))
    if compare or wins:
        await until(lambda: alone.controller.ready() is not None)
        assert alone.controller.ready() == said
    compare.clear()
    crds.clear()
    await until(lambda: alone.electing and alone.led == wins)
    assert alone.controller.ready() is None
    stop.set()
    await running
