"""What a task leaves in its output directory becomes artifacts, capped in number and size. Nothing in it is believed.

The host only looks at names, types and sizes (lstat); contents are read by tar inside the jail, so that no link leads out.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.core.contract import FileOut
from controller.core.model import Artifact
from controller.sbx import changes


@dataclass(frozen=True, kw_only=True)
class Caps:
    """At most so much is taken from one task."""

    files: int = 64
    file_bytes: int = 4 << 20
    total_bytes: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Relative paths to fetch, and remarks on what is left out."""

    paths: tuple[str, ...]
    remarks: tuple[str, ...]


PRINTED = ("stdout.txt", "stderr.txt")  # TaskWF names so what the command printed
MAX_ENTRIES = 10_000
MAX_PATH = 512
MAX_REMARKS = 10


def choose(directory: Path, *, caps: Caps) -> Choice:
    """Regular files in name order until a cap is reached. No process of the task may be alive."""
    remarks: list[str] = []
    return pick(_regular_files(directory, remarks), remarks, caps=caps)


def pick(files: Iterable[tuple[str, int]], remarks: list[str], *, caps: Caps) -> Choice:
    """The same from (path, size) of regular files, wherever they were listed. `remarks` may grow while they are read."""
    paths: list[str] = []
    total = 0
    for path, size in files:
        reason = _unwanted(path, size, caps)
        if reason is None and (len(paths) >= caps.files or total + size > caps.total_bytes):
            reason = f"over {caps.files} files or {caps.total_bytes} bytes in all"
        if reason is None:
            paths.append(path)
            total += size
        else:
            remarks.append(f"output {path[:MAX_PATH]!a} left out: {reason}")
    if len(remarks) > MAX_REMARKS:
        remarks[MAX_REMARKS:] = [f"{len(remarks) - MAX_REMARKS} more outputs left out"]
    return Choice(paths=tuple(paths), remarks=tuple(remarks))


def unpack(archive: bytes, wanted: Sequence[str], *, caps: Caps) -> list[Artifact]:
    """Reads the jail's tar in memory; takes only regular files that were asked for. Raises tarfile.TarError."""
    found: dict[str, Artifact] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for member in tar:
            if member.isreg() and member.name in wanted and member.size <= caps.file_bytes:
                reader = tar.extractfile(member)
                content = reader.read() if reader else b""
                found[member.name] = artifact(member.name, content)
    return [found[name] for name in wanted if name in found]


def artifact(name: str, content: bytes) -> Artifact:
    """`junit` for a file called junit.xml in any folder, `diff` for what the task changed, else `file`."""
    kind = "junit" if name.rpartition("/")[2] == "junit.xml" else "diff" if name == changes.NAME else "file"
    return Artifact(name=name, kind=kind, content=content)


def index(artifacts: Sequence[Artifact]) -> tuple[FileOut, ...]:
    """SBXRes.filesOut."""
    return tuple(FileOut(path=a.name, sha256=hashlib.sha256(a.content).hexdigest()) for a in artifacts)


def _unwanted(path: str, size: int, caps: Caps) -> str | None:
    if size > caps.file_bytes:
        return f"{size} bytes, at most {caps.file_bytes} are taken"
    if len(path) > MAX_PATH:
        return f"its path is longer than {MAX_PATH}"
    if path in PRINTED:
        return "its name is that of what the command printed"
    # Surrogates (names that are not UTF-8), control and bidirectional characters have no place in what people are shown.
    return None if path.isprintable() else "its name is not printable text"


def _regular_files(directory: Path, remarks: list[str]) -> Iterator[tuple[str, int]]:
    left = MAX_ENTRIES
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(directory / folder) as found:
                entries = [entry for _, entry in zip(range(left), found, strict=False)]
        except OSError as e:
            remarks.append(f"output folder {folder[:MAX_PATH]!a} left out: {e.strerror}")
            continue
        left -= len(entries)
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{folder}/{entry.name}".lstrip("/")
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file(follow_symlinks=False):
                yield path, entry.stat(follow_symlinks=False).st_size
            else:
                remarks.append(f"output {path[:MAX_PATH]!a} left out: not a regular file")
    if left == 0:
        remarks.append(f"only the first {MAX_ENTRIES} outputs were looked at")
