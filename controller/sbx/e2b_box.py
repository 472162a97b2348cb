"""One task in one E2B box, in phases: prepare, upload, command, collect (remote.py has what is the same elsewhere). On the loop of e2b.py.

The template needs bash and the user `user`. Everything of the task runs as that user, so that what it leaves running can be
killed by `kill -1`, which spares root's processes: the SDK kills one process only.
"""

from __future__ import annotations

import asyncio
import shlex
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from controller.core.contract import ErrCode, SBXReq
from controller.core.model import Artifact
from controller.sbx import artifacts, e2b_errors, remote
from controller.sbx.e2b_calls import Bounds
from controller.sbx.jail import OUTPUT, WORKSPACE
from controller.sbx.limits import rlimits
from controller.sbx.loop import give_up, within
from controller.sbx.remote import FEED, LISTING, SAID, Said
from controller.sbx.task import Verdict

if TYPE_CHECKING:
    from e2b import AsyncSandbox

USER = "user"
SCRATCH = "/tmp/.sisu-kodo"
MISSES = 3  # probes without an answer, one after the other
PREPARE = f"mkdir -p {WORKSPACE} {OUTPUT} && chown {USER}: {WORKSPACE} {OUTPUT}"


def command_line(request: SBXReq, *, memory: bool) -> str:
    """The task's command under its limits. A login shell sets PATH anew. Raises InvalidIntent when it is too long."""
    path = f"export PATH={shlex.quote(request.env['PATH'])}; " if "PATH" in request.env else ""
    return path + remote.script(request, rlimits(request.limits, memory=memory))


@dataclass(kw_only=True)
class BoxTask:
    """Also the remote.Shell of its box. `say(kind, data)` gets the output and `note` lines of ours; neither may block."""

    box: AsyncSandbox
    request: SBXReq
    bounds: Bounds
    caps: artifacts.Caps
    say: Callable[[str, bytes], None]
    note: Callable[[str], None]
    log_start: Callable[[], None]

    async def prepare(self) -> Verdict | None:
        """The two directories of the contract, which no template needs to have."""
        said = list[Said]()

        async def run() -> None:
            said.append(await self._run(PREPARE, user="root"))

        verdict = await remote.guarded(self, run(), ErrCode.BOOT_FAIL)
        if verdict is None and said[0].exit != 0:
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"the sandbox could not be prepared: {said[0].err}")
        return verdict

    async def upload(self, files: Mapping[str, bytes]) -> Verdict | None:
        """What the request brings."""
        return await remote.upload(self, self.request, files)

    async def command(self, *, memory: bool) -> Verdict:
        """The task itself. Watched by probes, for a stream that has died looks like a command that prints nothing."""
        seconds = self.request.timeout_ms / 1000
        work = self.box.commands.run(
            command_line(self.request, memory=memory),
            envs={**self.request.env, "SISU_OUTPUT_DIR": OUTPUT},
            user=USER,
            cwd=self.request.workdir or WORKSPACE,
            on_stdout=lambda text: self.say("stdout", text.encode(errors="replace")),
            on_stderr=lambda text: self.say("stderr", text.encode(errors="replace")),
            timeout=seconds + 2 * self.bounds.grace,  # for the case that we die
            request_timeout=self.bounds.api,
            retain_output=False,
        )
        self.log_start()
        running = asyncio.ensure_future(work)
        try:
            return await self._watch(running, time.monotonic() + seconds)
        finally:
            give_up(running)

    async def collect(self) -> tuple[list[Artifact], Verdict | None]:
        """What the command left in /output."""
        return await remote.collect(self, self.request, caps=self.caps, note=self.note)

    async def run(self, text: str, *, feed: bytes | None = None) -> Said:
        """See remote.Shell."""
        if feed is not None:
            await self._write(FEED, feed)
        return await self._run(text)

    async def pipe(self, text: str, *, feed: bytes, room: int) -> Said:
        """See remote.Shell. By files, for the SDK's streams hold text."""
        names, packed = f"{SCRATCH}-names", f"{SCRATCH}-output"
        await self._write(names, feed)
        said = await self._run(f"{text} < {names} > {packed}")
        if said.exit != 0:
            return said
        return replace(said, out=await within(self.bounds.transfer, self._read(packed, room), "download"))

    def blame(self, error: Exception, *, otherwise: ErrCode) -> Verdict:
        """See remote.Shell."""
        return e2b_errors.of_phase(error, otherwise=otherwise)

    async def _watch(self, running: asyncio.Task[Any], deadline: float) -> Verdict:
        misses = ended = 0
        while True:
            left = deadline - time.monotonic()
            await asyncio.wait({running}, timeout=max(0.0, min(self.bounds.probe, left)))
            if running.done():
                return _ended(running)
            if left <= self.bounds.probe:
                return await self._time_out(running)
            try:
                patience = min(self.bounds.probe, max(0.5, deadline - time.monotonic()))
                alive = await within(patience, self.box.commands.list(), "probe")
            except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
                verdict = e2b_errors.of_phase(e, otherwise=ErrCode.NET_FAIL)
                misses += 1
                if verdict.code is ErrCode.LOST or misses >= MISSES:
                    return verdict
                continue
            misses, ended = 0, 0 if alive else ended + 1
            if ended >= MISSES and not running.done():
                return Verdict(code=ErrCode.NET_FAIL, note="the command ended, but its end did not reach us")

    async def _time_out(self, running: asyncio.Task[Any]) -> Verdict:
        """TIMEOUT only when the box says that it still ran: else the command may have ended in time, unheard."""
        try:
            for process in await within(self.bounds.grace, self.box.commands.list(), "time limit"):
                await within(self.bounds.grace, self.box.commands.kill(process.pid), "time limit")
            await self._run("kill -KILL -1 2> /dev/null; true")
        except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
            return e2b_errors.of_phase(e, otherwise=ErrCode.NET_FAIL)
        await asyncio.wait({running}, timeout=self.bounds.grace)  # its last output
        return Verdict(code=ErrCode.TIMEOUT, note="ended: timeout")

    async def _run(self, text: str, *, user: str = USER) -> Said:
        """One short command of ours."""
        from e2b import CommandExitException

        out, err = _Bounded(LISTING), _Bounded(SAID)
        work = self.box.commands.run(
            text,
            user=user,
            cwd="/",
            on_stdout=out.add,
            on_stderr=err.add,
            timeout=self.bounds.tool,
            request_timeout=self.bounds.api,
            retain_output=False,
        )
        code = 0
        try:
            await within(self.bounds.tool, work, "a command of ours")
        except CommandExitException as e:
            code = e.exit_code
        return Said(exit=code, out=out.text().encode(errors="replace"), err=err.text().strip())

    async def _write(self, path: str, content: bytes) -> None:
        work = self.box.files.write(
            path, content, user=USER, request_timeout=self.bounds.transfer, use_octet_stream=True
        )
        await within(self.bounds.transfer, work, "upload")

    async def _read(self, path: str, room: int) -> bytes:
        content = bytearray()
        chunks = await self.box.files.read(path, format="stream", user=USER, request_timeout=self.bounds.transfer)
        async for chunk in chunks:
            content += chunk
            if len(content) > room:
                raise tarfile.TarError(f"the packed outputs have more than {room} bytes")
        return bytes(content)


class _Bounded:
    """Keeps the beginning."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._parts: list[str] = []

    def add(self, text: str) -> None:
        if self._room > 0:
            self._parts.append(text[: self._room])
            self._room -= len(text)

    def text(self) -> str:
        return "".join(self._parts)


def _ended(running: asyncio.Task[Any]) -> Verdict:
    """How the command ended, from its exit state or from what the SDK raised."""
    from e2b import CommandExitException

    if running.cancelled():
        return Verdict(code=ErrCode.NET_FAIL, note="the call was taken back")
    error = running.exception()
    if error is None:
        return Verdict(code=ErrCode.NONE, exit=0)
    if isinstance(error, CommandExitException):
        if error.exit_code < 0:  # the shell around the command: killed by the task itself, or by the box for memory
            return Verdict(code=ErrCode.CMD_NONZERO, note=f"ended: {error.error}")
        return Verdict(code=ErrCode.CMD_NONZERO, exit=error.exit_code)
    if not isinstance(error, Exception):
        raise error
    return e2b_errors.of_phase(error, otherwise=ErrCode.LOST)
