"""The stream of a daemon's events outlives whatever is said in it. A few lines of HTTP here, no daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from controller.core.errors import InvalidPlan
from controller.oc.client import OpenCodeClient, counted
from controller.oc.events import Events

DEEP = b"[" * 100_000 + b"]" * 100_000
NO_NUMBER = b'{"type":"message.part.updated","properties":{"part":{"type":"step-finish","sessionID":"s","tokens":{"input":"x"}}}}'
RETRY = b'{"type":"session.status","properties":{"sessionID":"s","status":{"type":"retry","attempt":1}}}'
Serve = Callable[[list[bytes]], Awaitable[OpenCodeClient]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A daemon that says one of these lines in each connection, and at every other path that nothing is busy."""
    servers: list[asyncio.Server] = []

    async def start(said: list[bytes]) -> OpenCodeClient:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked = await reader.readuntil(b"\r\n\r\n")
            if b"/event" in asked:
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                writer.write(b'data: {"type":"server.connected"}\n\ndata: ' + said.pop(0) + b"\n\n")
            else:
                body = DEEP if b"/message" in asked else b"{}"
                writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            if b"/event" not in asked or said:
                writer.close()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
        return OpenCodeClient(f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}", password="p")

    yield start
    for one in servers:
        one.close()


async def greet() -> None:
    """Every daemon will do."""


@pytest.mark.parametrize("odd", [DEEP, b"[]", NO_NUMBER], ids=["deep", "list", "no number"])
async def test_an_event_that_cannot_be_read_does_not_make_it_deaf(serve: Serve, odd: bytes) -> None:
    client = await serve([odd, RETRY])
    events = Events(client, greet=greet)
    first = events.watch("s")
    reading = asyncio.create_task(events.run())
    async with asyncio.timeout(5):
        await first.changed.wait()
        assert first.lost is not None and "cannot be read" in first.lost
        second = events.watch("s")
        await second.changed.wait()
        assert second.retry is not None
    reading.cancel()
    await client.close()


async def test_an_answer_that_is_nested_too_deep_is_an_invalid_plan(serve: Serve) -> None:
    client = await serve([])
    with pytest.raises(InvalidPlan, match="nested too deep"):
        await client.prompt("s", message="m", agent="a", text="t", schema={}, seconds=5)
    await client.close()


def test_tokens_that_nobody_counted_are_none() -> None:
    assert counted({"input": None, "output": 2, "cache": {"read": 3}}) == (3, 2)
