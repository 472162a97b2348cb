"""The process that holds a node's namespaces: `python -m devcluster.node.keeper HOME MACHINE KUBELET PORT`.

It takes a link and cgroups from the host, starts the first process of the namespaces, and passes connections to 127.0.0.1:PORT
inside on to 127.0.0.1:PORT outside, so that the API server need not listen anywhere else. SIGTERM, or the death of whoever
started it, ends the node with everything in it and gives back what was taken.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.identities import write_private
from devcluster.node.host import RECORD, SYSTEM_PATH, Ground, claim
from devcluster.processes import Child, spawn, tail, this_process

SCRIPT = Path(__file__).with_name("namespace.sh")
SETUP_SECONDS = 30.0
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(home: Path, machine: Path, kubelet: Path, port: int) -> None:
    """Runs until SIGTERM, or until the node's first process ends."""
    # Nothing may end us between taking and giving back.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    ground = claim(machine, this_process("keeper"))
    first: Child | None = None
    try:
        first = _start(ground, home, kubelet)
        pid = _first_process(first, home)
        ground.connect(pid)
        listener = _listen_inside(pid, port)
        record = {"pid": pid, "name": ground.name, "address": ground.node_address}
        write_private(home / RECORD, json.dumps(record))
        asyncio.run(_serve(listener, port, first))
    finally:
        (home / RECORD).unlink(missing_ok=True)
        if first is not None:
            first.stop()
        ground.release()


def _start(ground: Ground, home: Path, kubelet: Path) -> Child:
    command: list[str | Path] = ["/bin/sh", SCRIPT, "outer", ground.name, ground.machine, home, kubelet]
    env = {"PATH": SYSTEM_PATH}
    return spawn("namespace", command, log=home / "namespace.log", detach=False, cwd=Path("/"), env=env)


def _first_process(outer: Child, home: Path) -> int:
    """Its pid as the host sees it, once it has made its world and only waits."""
    deadline = time.monotonic() + SETUP_SECONDS
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while outer.alive() and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() == "pause":
                    return int(pid)
        time.sleep(0.02)
    raise DevclusterError(f"the node's namespaces could not be made:\n{tail(home / 'namespace.log')}")


def _listen_inside(pid: int, port: int) -> socket.socket:
    """A socket that listens on the loopback of another network namespace, and is ours."""
    with open("/proc/self/ns/net") as outside, open(f"/proc/{pid}/ns/net") as inside:
        _enter(inside.fileno())
        try:
            return socket.create_server(("127.0.0.1", port))
        finally:
            _enter(outside.fileno())


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise DevclusterError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


async def _serve(listener: socket.socket, port: int, first: Child) -> None:
    done = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, done.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, back), _pump(there, writer))

    server = await asyncio.start_server(forward, sock=listener)
    asyncio.get_running_loop().add_reader(os.pidfd_open(first.pid), done.set)  # readable when it has ended
    await done.wait()
    server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything until the end of one direction, and then its end."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except DevclusterError as error:
        sys.exit(f"error: {error}")
