"""What every sandbox behind a network is asked to do, as commands of ours in it: take files in, run the task, pack its outputs.

The image needs a POSIX shell, GNU tar and find, git, prlimit and sha256sum. Everything runs as the task's own user, so that what
the task leaves running can be killed by `kill -1`. Shell is the provider's way in; nothing here knows which it is.
"""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from controller.core.contract import ErrCode, SBXReq
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact
from controller.sbx import artifacts, changes
from controller.sbx.jail import OUTPUT, WORKSPACE
from controller.sbx.task import PACK, TOOLS, Verdict

FEED = "/tmp/.sisu-kodo-feed"
SAID = 4096  # bytes of a tool's complaint
LISTING = 4 << 20
MAX_SCRIPT = 100_000  # bytes; one argument of a program may have 128 KiB
# The names end at the first that is cut: find has no limit of its own.
LIST = (
    rf"find {OUTPUT} -mindepth 1 \( -type f -printf 'f %s %P\0' -o ! -type d -printf 'x 0 %P\0' \) | head -c {LISTING}"
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a command of ours ended. `out` and `err` are cut."""

    exit: int
    out: bytes
    err: str


class Shell(Protocol):
    """Runs commands of ours as the task's user. Raises what its provider raises; `blame` knows what that means."""

    async def run(self, text: str, *, feed: bytes | None = None) -> Said:
        """A script. `feed` is in the file FEED before it begins."""

    async def pipe(self, text: str, *, feed: bytes, room: int) -> Said:
        """A script whose stdin is `feed`. Raises tarfile.TarError when it prints more than `room` bytes."""

    def blame(self, error: Exception, *, otherwise: ErrCode) -> Verdict:
        """`otherwise` is the phase's own failure, for what is neither a lost sandbox nor the way to it."""


def script(request: SBXReq, limited: Sequence[str]) -> str:
    """The task's command under `limited` (a command line); then everything that it left running dies.

    Raises InvalidIntent when it is too long.
    """
    command = shlex.join([*limited, "/bin/sh", "-c", request.cmd])
    text = f"{command}; code=$?; kill -KILL -1 2> /dev/null; exit $code"
    if len(text.encode()) > MAX_SCRIPT:
        raise InvalidIntent("spec.sandbox", f"the command has more than {MAX_SCRIPT} bytes when it is quoted")
    return text


async def upload(shell: Shell, request: SBXReq, files: Mapping[str, bytes]) -> Verdict | None:
    """Archives first, then patches: brought in, compared with their hash inside, and taken in by their tool."""
    wanted = [(one, tool) for kind, tool in TOOLS for one in request.files_in if one.kind == kind]
    parts = [(one, tool) for one, tool in wanted if one.kind == "archive" or files[one.sha256]]
    for n, (part, tool) in enumerate(parts):
        take_in = (
            f"printf '%s  %s\\n' {part.sha256} {FEED} | sha256sum --check --status || "
            f"{{ echo 'the bytes that arrived do not match {part.sha256}' >&2; exit 1; }}; "
            f"cd {WORKSPACE} && {shlex.join(tool)} < {FEED} && rm -f {FEED}"
        )
        if n == len(parts) - 1:
            take_in += f" && {changes.REMEMBER}"
        why = f"the {part.kind} could not be taken in"
        if verdict := await tried(shell, take_in, ErrCode.UPLOAD_FAIL, why, feed=files[part.sha256]):
            return verdict
    return None


async def tried(shell: Shell, text: str, code: ErrCode, why: str, *, feed: bytes | None = None) -> Verdict | None:
    """None when the script ended well."""
    said: list[Said] = []

    async def run() -> None:
        said.append(await shell.run(text, feed=feed))

    verdict = await guarded(shell, run(), code)
    if verdict is None and said[0].exit != 0:
        return Verdict(code=code, note=f"{why}: {said[0].err}")
    return verdict


async def guarded(shell: Shell, work: Coroutine[Any, Any, None], otherwise: ErrCode) -> Verdict | None:
    """None when it raised nothing."""
    try:
        await work
    except Exception as e:  # noqa: BLE001 - translated, whatever it is
        return shell.blame(e, otherwise=otherwise)
    return None


async def collect(
    shell: Shell, request: SBXReq, *, caps: artifacts.Caps, note: Callable[[str], None]
) -> tuple[list[Artifact], Verdict | None]:
    """What the command left in /output, also when it failed, and what it changed in its workspace."""
    found: list[Artifact] = []

    async def fetch() -> None:
        said = await shell.run(f"{changes.RECORD}; {LIST}" if request.files_in else LIST)
        if changes.FAILED in said.err:
            note(changes.FAILED)
        remarks: list[str] = []
        choice = artifacts.pick(listed(said.out.decode(errors="replace"), remarks), remarks, caps=caps)
        for remark in choice.remarks:
            note(remark)
        if choice.paths:
            found.extend(await _fetch(shell, choice.paths, caps=caps, note=note))

    verdict = await guarded(shell, fetch(), ErrCode.DOWNLOAD_FAIL)
    return (found, None) if verdict is None else ([], verdict)


async def _fetch(
    shell: Shell, paths: tuple[str, ...], *, caps: artifacts.Caps, note: Callable[[str], None]
) -> list[Artifact]:
    names = b"".join(path.encode() + b"\0" for path in paths)
    room = 2 * caps.total_bytes + (1 << 20)  # headers and padding included
    packed = await shell.pipe(shlex.join(PACK), feed=names, room=room)
    if packed.exit != 0:
        raise tarfile.TarError(packed.err)
    found = artifacts.unpack(packed.out, paths, caps=caps)
    for path in sorted(set(paths) - {artifact.name for artifact in found}):
        note(f"output {path!a} left out: not readable")
    return found


def listed(listing: str, remarks: list[str]) -> Iterator[tuple[str, int]]:
    """(path, size) of regular files in name order, from LIST's output."""
    whole = [entry.split(" ", 2) for entry in listing.split("\0")[:-1]]
    entries = [(path, kind, size) for kind, size, path in (entry for entry in whole if len(entry) == 3)]
    for path, kind, size in sorted(entries)[: artifacts.MAX_ENTRIES]:
        if kind == "f" and size.isdecimal():
            yield path, int(size)
        else:
            remarks.append(f"output {path[: artifacts.MAX_PATH]!a} left out: not a regular file")
    if len(entries) > artifacts.MAX_ENTRIES or len(listing.encode()) >= LISTING:
        remarks.append(f"only the first {artifacts.MAX_ENTRIES} outputs were looked at")
