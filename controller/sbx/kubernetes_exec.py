"""One command in a Pod over the exec websocket: v5.channel.k8s.io or v4, which differ only in what we do not use.

A message is one byte that names the channel, then data. How the command ended comes last, as a Status on a channel of its own.
Stdin is never closed: whoever reads it knows how many bytes to expect (`head -c N`), which holds with v4, too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from controller.sbx.kubernetes_errors import ExecFailed, StreamCut
from controller.sbx.loop import give_up

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
STDIN, STDOUT, STDERR, STATUS = range(4)
NAMES = {STDOUT: "stdout", STDERR: "stderr"}
FRAME = 32 << 10
LAST = 2.0  # seconds that the server may take to close after the Status


async def follow(socket: aiohttp.ClientWebSocketResponse, *, stdin: bytes, feed: Callable[[str, bytes], None]) -> int:
    """The exit code. `feed(kind, data)` gets the output as it comes. Raises ExecFailed, StreamCut, aiohttp.ClientError."""
    sending = asyncio.ensure_future(_send(socket, stdin))
    status = b""
    try:
        while True:
            try:
                message = await socket.receive(timeout=LAST if status else None)
            except TimeoutError:
                break
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            channel, data = message.data[0], message.data[1:]
            if channel in NAMES and data:
                feed(NAMES[channel], data)
            elif channel == STATUS:
                status += data
    finally:
        give_up(sending)
    if not status:
        why = socket.exception() or f"closed with code {socket.close_code}"
        raise StreamCut(f"the exec stream broke off: {why}")
    return exit_code(status)


def exit_code(status: bytes) -> int:
    """From the Status at the end. Raises ExecFailed when it tells of no exit."""
    try:
        found = json.loads(status)
        if found["status"] == "Success":
            return 0
        causes: list[dict[str, Any]] = found.get("details", {}).get("causes", [])
        codes = [int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ExecFailed(f"the exec's Status cannot be read: {status[:200]!r}") from e
    if not codes:
        raise ExecFailed(str(found.get("message") or found))
    return codes[0]


async def _send(socket: aiohttp.ClientWebSocketResponse, stdin: bytes) -> None:
    for at in range(0, len(stdin), FRAME):
        await socket.send_bytes(bytes((STDIN,)) + stdin[at : at + FRAME])
