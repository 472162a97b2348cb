"""Workspace in memory: files are a dictionary, there is one commit, and the edit rules are the real ones."""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from controller.core.contract import Edit
from controller.core.errors import WorkspaceRefused
from controller.core.model import GitSource, Patch, Snapshot
from controller.workspace import edits as rules
from controller.workspace.tree import Entry


@dataclass(kw_only=True)
class MemoryWorkspace:
    """`files` maps paths to text; without a source it is empty. `asked` keeps what was read and searched, in order."""

    files: Mapping[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def resolve(self, source: GitSource | None) -> str:
        return hashlib.sha1(repr(sorted(self._files(source).items())).encode()).hexdigest()

    def snapshot(self, source: GitSource | None, commit: str) -> Snapshot:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path, text in sorted(self._at(source, commit).items()):
                info = tarfile.TarInfo(path)
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        archive = out.getvalue()
        return Snapshot(commit=commit, sha256=hashlib.sha256(archive).hexdigest(), size=len(archive), archive=archive)

    def map(self, source: GitSource | None, commit: str, *, max_bytes: int) -> str:
        files = self._at(source, commit)
        lines = [f"{path} ({len(text.encode())} bytes)\n" for path, text in sorted(files.items())]
        return _cut("".join(lines) or "(no files)\n", max_bytes)

    def read(self, source: GitSource | None, commit: str, path: str, *, max_bytes: int) -> str:
        self.asked.append(path)
        files = self._at(source, commit)
        if path not in files:
            raise WorkspaceRefused(f"{path}: is not a file of the commit")
        return _cut(files[path], max_bytes)

    def search(self, source: GitSource | None, commit: str, pattern: str, *, max_bytes: int) -> str:
        self.asked.append(pattern)
        try:
            expression = re.compile(pattern)
        except re.error as e:
            raise WorkspaceRefused(f"{pattern!r} cannot be searched as an extended regular expression: {e}") from e
        found = [
            f"{path}:{number}:{line}\n"
            for path, text in sorted(self._at(source, commit).items())
            for number, line in enumerate(text.splitlines(), 1)
            if expression.search(line)
        ]
        return _cut("".join(found) or "(no matches)\n", max_bytes)

    def diff(self, source: GitSource | None, commit: str, edits: Sequence[Edit]) -> Patch:
        files = self._at(source, commit)
        entries = {
            path: Entry(path=path, mode="100644", oid=path, size=len(text.encode())) for path, text in files.items()
        }
        changed = rules.apply(edits, entries=entries, read=lambda e: files[e.path].encode(), max_bytes=1_000_000)
        lines: list[str] = []
        touched = []
        for path, content in sorted(changed.items()):
            old, new = files.get(path, ""), (content.data or b"").decode()
            if path in files and content.data is not None and old == new:
                continue
            touched.append(path)
            lines += difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}")
        diff = "".join(lines).encode()
        return Patch(
            sha256=hashlib.sha256(diff).hexdigest(),
            files=tuple(touched),
            additions=sum(line.startswith("+") and not line.startswith("+++") for line in lines),
            deletions=sum(line.startswith("-") and not line.startswith("---") for line in lines),
            diff=diff,
        )

    def _files(self, source: GitSource | None) -> Mapping[str, str]:
        return {} if source is None else self.files

    def _at(self, source: GitSource | None, commit: str) -> Mapping[str, str]:
        if commit != self.resolve(source):
            raise WorkspaceRefused(f"{commit!r} is not the commit")
        return self._files(source)


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode()
    mark = f"\n[cut: {len(data)} bytes]\n"
    return text if len(data) <= max_bytes else data[: max(0, max_bytes - len(mark))].decode("utf-8", "ignore") + mark
