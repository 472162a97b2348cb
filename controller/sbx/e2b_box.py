"""One task in one E2B box, in the phases of task.py: prepare, upload, command, collect. Runs on the loop of e2b.py.

The template needs bash, GNU tar and find, git, prlimit and sha256sum, and the user `user`. Everything of the task runs as that
user, so that what it leaves running can be killed by `kill -1`, which spares root's processes: the SDK kills one process only.
"""

from __future__ import annotations

import asyncio
import shlex
import tarfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controller.core.contract import ErrCode, SBXReq
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact
from controller.sbx import artifacts, e2b_errors
from controller.sbx.e2b_calls import Bounds, give_up, within
from controller.sbx.jail import OUTPUT, WORKSPACE
from controller.sbx.limits import rlimits
from controller.sbx.task import APPLY, PACK, UNPACK, Verdict

if TYPE_CHECKING:
    from e2b import AsyncSandbox

USER = "user"
SCRATCH = "/tmp/.sisu-kodo"
SAID = 4096  # bytes of a tool's complaint
LISTING = 4 << 20
MAX_SCRIPT = 100_000  # bytes; one argument of a program may have 128 KiB
MISSES = 3  # probes without an answer, one after the other
PREPARE = f"mkdir -p {WORKSPACE} {OUTPUT} && chown {USER}: {WORKSPACE} {OUTPUT}"
# The names end at the first that is cut: find has no limit of its own.
LIST = (
    rf"find {OUTPUT} -mindepth 1 \( -type f -printf 'f %s %P\0' -o ! -type d -printf 'x 0 %P\0' \) | head -c {LISTING}"
)


def script(request: SBXReq, *, memory: bool) -> str:
    """The task's command under its limits; then everything that it left running dies. Raises InvalidIntent when it is too long."""
    # A login shell sets PATH anew.
    path = f"export PATH={shlex.quote(request.env['PATH'])}; " if "PATH" in request.env else ""
    command = shlex.join([*rlimits(request.limits, memory=memory), "/bin/sh", "-c", request.cmd])
    text = f"{path}{command}; code=$?; kill -KILL -1 2> /dev/null; exit $code"
    if len(text.encode()) > MAX_SCRIPT:
        raise InvalidIntent("spec.sandbox", f"the command has more than {MAX_SCRIPT} bytes when it is quoted")
    return text


@dataclass(kw_only=True)
class BoxTask:
    """`say(kind, data)` gets the output and `note` lines of ours; neither may block."""

    box: AsyncSandbox
    request: SBXReq
    bounds: Bounds
    caps: artifacts.Caps
    say: Callable[[str, bytes], None]
    note: Callable[[str], None]
    log_start: Callable[[], None]

    async def prepare(self) -> Verdict | None:
        """The two directories of the contract, which no template needs to have."""
        return await self._tool(PREPARE, ErrCode.BOOT_FAIL, "the sandbox could not be prepared", user="root")

    async def upload(self, files: Mapping[str, bytes]) -> Verdict | None:
        """Archives first, then patches: brought in, compared with their hash inside, and taken in by their tool."""
        for kind, tool in (("archive", UNPACK), ("patch", APPLY)):
            for wanted in self.request.files_in:
                content = files[wanted.sha256]
                if wanted.kind != kind or (kind == "patch" and not content):
                    continue
                path = f"{SCRATCH}-{kind}"
                take_in = (
                    f"printf '%s  %s\\n' {wanted.sha256} {path} | sha256sum --check --status || "
                    f"{{ echo 'the bytes that arrived do not match {wanted.sha256}' >&2; exit 1; }}; "
                    f"cd {WORKSPACE} && {shlex.join(tool)} < {path} && rm -f {path}"
                )
                failed = await self._guard(self._write(path, content), ErrCode.UPLOAD_FAIL)
                why = f"the {kind} could not be taken in"
                if verdict := failed or await self._tool(take_in, ErrCode.UPLOAD_FAIL, why):
                    return verdict
        return None

    async def command(self, *, memory: bool) -> Verdict:
        """The task itself. Watched by probes, for a stream that has died looks like a command that prints nothing."""
        seconds = self.request.timeout_ms / 1000
        work = self.box.commands.run(
            script(self.request, memory=memory),
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
        """What the command left in /output, also when it failed."""
        found: list[Artifact] = []

        async def fetch() -> None:
            _, out, _ = await self._run(LIST)
            remarks: list[str] = []
            choice = artifacts.pick(_listed(out, remarks), remarks, caps=self.caps)
            for remark in choice.remarks:
                self.note(remark)
            if choice.paths:
                found.extend(await self._fetch(choice.paths))

        verdict = await self._guard(fetch(), ErrCode.DOWNLOAD_FAIL)
        return (found, None) if verdict is None else ([], verdict)

    async def _fetch(self, paths: tuple[str, ...]) -> list[Artifact]:
        names, packed = f"{SCRATCH}-names", f"{SCRATCH}-output"
        await self._write(names, b"".join(path.encode() + b"\0" for path in paths))
        code, _, complaint = await self._run(f"{shlex.join(PACK)} < {names} > {packed}")
        if code != 0:
            raise tarfile.TarError(complaint)
        content = await within(self.bounds.transfer, self._read(packed), "download")
        found = artifacts.unpack(content, paths, caps=self.caps)
        for path in sorted(set(paths) - {artifact.name for artifact in found}):
            self.note(f"output {path!a} left out: not readable")
        return found

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

    async def _tool(self, text: str, code: ErrCode, why: str, *, user: str = USER) -> Verdict | None:
        said: list[str] = []

        async def run() -> None:
            exit_code, _, complaint = await self._run(text, user=user)
            if exit_code != 0:
                said.append(f"{why}: {complaint}")

        verdict = await self._guard(run(), code)
        return Verdict(code=code, note=said[0]) if said else verdict

    async def _guard(self, work: Coroutine[Any, Any, None], otherwise: ErrCode) -> Verdict | None:
        try:
            await work
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            return e2b_errors.of_phase(e, otherwise=otherwise)
        return None

    async def _run(self, text: str, *, user: str = USER) -> tuple[int, str, str]:
        """One short command of ours: exit code, stdout, stderr, both cut."""
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
        return code, out.text(), err.text().strip()

    async def _write(self, path: str, content: bytes) -> None:
        work = self.box.files.write(
            path, content, user=USER, request_timeout=self.bounds.transfer, use_octet_stream=True
        )
        await within(self.bounds.transfer, work, "upload")

    async def _read(self, path: str) -> bytes:
        room = 2 * self.caps.total_bytes + (1 << 20)  # headers and padding included
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


def _listed(listing: str, remarks: list[str]) -> Iterator[tuple[str, int]]:
    """(path, size) of regular files in name order, from LIST's output."""
    whole = [entry.split(" ", 2) for entry in listing.split("\0")[:-1]]
    entries = [(path, kind, size) for kind, size, path in (entry for entry in whole if len(entry) == 3)]
    for path, kind, size in sorted(entries)[: artifacts.MAX_ENTRIES]:
        if kind == "f" and size.isdecimal():
            yield path, int(size)
        else:
            remarks.append(f"output {path[: artifacts.MAX_PATH]!a} left out: not a regular file")
    if len(entries) > artifacts.MAX_ENTRIES or len(listing) >= LISTING:
        remarks.append(f"only the first {artifacts.MAX_ENTRIES} outputs were looked at")
