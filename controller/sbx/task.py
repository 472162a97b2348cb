"""One task in one box, in phases: upload, command, collect. Says how it ended as an ErrCode, from exit states only.

local.py makes the box and cleans up; run.py runs the jails.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from controller.core.contract import ErrCode, SBXReq
from controller.core.model import Artifact
from controller.sbx import artifacts, changes
from controller.sbx.jail import OUTPUT
from controller.sbx.limits import DiskGauge
from controller.sbx.output import Capture
from controller.sbx.run import Cell, Result, Sink, Stop

UPLOAD_SECONDS = 120.0
COLLECT_SECONDS = 60.0
CANCEL_SECONDS = 0.5  # between two questions whether the task is canceled
COLLECTED = (ErrCode.NONE, ErrCode.CMD_NONZERO, ErrCode.TIMEOUT, ErrCode.OOM)  # outputs are fetched after these
STOP_CODES = {Stop.TIMEOUT: ErrCode.TIMEOUT, Stop.CANCELED: ErrCode.CANCELED, Stop.KILLED: ErrCode.LOST}

# tar refuses `..` by itself and strips a leading slash; being inside the jail, even a planted link leads nowhere.
UNPACK = ("/usr/bin/tar", "--extract", "--file=-", "--no-same-owner")
# GIT_DIR that does not exist: a .git that came with the archive is not believed, so that no setting or hook of it acts.
APPLY = (
    *(
        "/usr/bin/env",
        "GIT_DIR=/nonexistent",
        "GIT_CONFIG_NOSYSTEM=1",
        "GIT_CONFIG_GLOBAL=/dev/null",
        "GIT_CEILING_DIRECTORIES=/",
    ),
    *("/usr/bin/git", "apply", "--whitespace=nowarn", "-"),
)
TOOLS = (("archive", UNPACK), ("patch", APPLY))  # in the order in which they are taken in
PACK = (
    *("/usr/bin/tar", "--create", "--file=-", f"--directory={OUTPUT}", "--no-recursion", "--hard-dereference"),
    *("--ignore-failed-read", "--null", "--files-from=-"),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a phase ended the task. `note` is for people, on stderr."""

    code: ErrCode
    exit: int | None = None
    note: str | None = None


@dataclass(kw_only=True)
class Task:
    """`view` is bubblewrap's argument list; `observe` is told how long each phase took."""

    cell: Cell
    request: SBXReq
    view: bytes
    capture: Capture
    canceled: Callable[[], bool]
    log_start: Callable[[], None]
    caps: artifacts.Caps
    _asked: float = field(default=0.0)

    def upload(self, files: Mapping[str, bytes]) -> Verdict | None:
        """Archives first, then patches, each by its tool inside the jail. None when all went well."""
        for kind, command in TOOLS:
            for wanted in self.request.files_in:
                if wanted.kind != kind or (kind == "patch" and not files[wanted.sha256]):
                    continue
                said = bytearray()
                sink = Sink(feed=lambda _, data, said=said: keep(said, data, 4096))  # type: ignore[misc]
                watch = self._watch(UPLOAD_SECONDS)
                result = self.cell.run(command, view=self.view, sink=sink, watch=watch, stdin=files[wanted.sha256])
                verdict = self._judge(result)
                if verdict.code is not ErrCode.NONE:
                    text = said.decode(errors="replace").strip()
                    return self._blame(verdict, ErrCode.UPLOAD_FAIL, f"the {kind} could not be taken in: {text}")
        if self.request.files_in:
            self._quietly(changes.REMEMBER)
        return None

    def command(self) -> Verdict:
        """The task itself, by /bin/sh -c."""
        sink = Sink(feed=self.capture.feed, full=self.capture.full)
        gauge = DiskGauge(self.cell.box.tree, limit_mb=self.request.limits.disk_mb)
        watch = self._watch(self.request.timeout_ms / 1000, gauge=gauge)
        command = ("/bin/sh", "-c", self.request.cmd)
        return self._judge(self.cell.run(command, view=self.view, sink=sink, watch=watch, before=self.log_start))

    def collect(self) -> tuple[list[Artifact], Verdict | None]:
        """What the command left in /output, also when it failed: a red test's report matters most."""
        if self.request.files_in and changes.FAILED in self._quietly(changes.RECORD):
            self.capture.note(changes.FAILED)
        choice = artifacts.choose(self.cell.box.tree / "output", caps=self.caps)
        for remark in choice.remarks:
            self.capture.note(remark)
        if not choice.paths:
            return [], None
        room = 2 * self.caps.total_bytes + (1 << 20)  # headers and padding included
        archive, said = bytearray(), bytearray()
        sink = Sink(feed=lambda kind, data: keep(*((archive, data, room) if kind == "stdout" else (said, data, 4096))))
        names = b"".join(path.encode() + b"\0" for path in choice.paths)
        result = self.cell.run(PACK, view=self.view, sink=sink, watch=self._watch(COLLECT_SECONDS), stdin=names)
        verdict = self._judge(result)
        if verdict.code is not ErrCode.NONE:
            text = said.decode(errors="replace").strip()
            return [], self._blame(verdict, ErrCode.DOWNLOAD_FAIL, f"outputs could not be collected: {text}")
        try:
            found = artifacts.unpack(bytes(archive), choice.paths, caps=self.caps)
        except tarfile.TarError as e:
            return [], Verdict(code=ErrCode.DOWNLOAD_FAIL, note=f"outputs could not be read: {e}")
        for path in sorted(set(choice.paths) - {artifact.name for artifact in found}):
            self.capture.note(f"output {path!a} left out: not readable")
        return found, None

    def _quietly(self, script: str) -> str:
        """What a script of ours said, whose failure is nobody's."""
        said = bytearray()
        sink = Sink(feed=lambda _, data: keep(said, data, 4096))
        self.cell.run(("/bin/sh", "-c", script), view=self.view, sink=sink, watch=self._watch(COLLECT_SECONDS))
        return said.decode(errors="replace")

    def _judge(self, result: Result) -> Verdict:
        if result.stop is Stop.DISK:
            return Verdict(
                code=ErrCode.CMD_NONZERO, note=f"killed: more than {self.request.limits.disk_mb} MiB on disk"
            )
        if result.stop is not None:
            return Verdict(code=STOP_CODES[result.stop], note=f"ended: {result.stop.value}")
        if result.exit == 0:
            return Verdict(code=ErrCode.NONE, exit=0)
        if self.cell.box.killed():
            return Verdict(code=ErrCode.LOST, note="killed by its fence")
        if self.cell.cgroup.oom_kills():
            note = f"out of memory: more than {self.request.limits.memory_mb} MiB"
            return Verdict(code=ErrCode.OOM, exit=result.exit, note=note)
        if result.failure is not None:
            return Verdict(code=ErrCode.BOOT_FAIL, note=result.failure)
        if result.exit is None:
            return Verdict(code=ErrCode.LOST, note="the sandbox was killed from outside")
        return Verdict(code=ErrCode.CMD_NONZERO, exit=result.exit)

    def _blame(self, verdict: Verdict, code: ErrCode, note: str) -> Verdict:
        """A tool of ours failed: its non-zero exit or its own time limit is the phase's failure, all else stays what it is."""
        if verdict.code in (ErrCode.CMD_NONZERO, ErrCode.TIMEOUT):
            return Verdict(code=code, note=note)
        return Verdict(code=verdict.code, note=verdict.note or note)

    def _watch(self, seconds: float, *, gauge: DiskGauge | None = None) -> Callable[[], Stop | None]:
        deadline = time.monotonic() + seconds
        looked = 0.0

        def watch() -> Stop | None:
            nonlocal looked
            now = time.monotonic()
            if now >= deadline:
                return Stop.TIMEOUT
            if now - looked < 0.05:
                return None
            looked = now
            if self.cell.box.killed():
                return Stop.KILLED
            if now - self._asked >= CANCEL_SECONDS:
                self._asked = now
                if self.canceled():
                    return Stop.CANCELED
            return Stop.DISK if gauge is not None and gauge.exceeded() else None

        return watch


def settle(verdict: Verdict, trouble: Verdict | None, note: Callable[[str], None]) -> Verdict:
    """The outcome when collecting had trouble: the command's own failure comes first, unless the sandbox was lost."""
    if trouble is not None and verdict.code is not ErrCode.NONE and trouble.code is not ErrCode.LOST:
        note(trouble.note or trouble.code.value)
        trouble = None
    return trouble or verdict


def keep(buffer: bytearray, data: bytes, room: int) -> None:
    """Appends what still fits."""
    buffer += data[: max(0, room - len(buffer))]
