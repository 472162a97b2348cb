"""The objects of one clone: listings, blobs, and the few objects that we write. Reads need no lock: objects never change.

Nothing is resolved by name: a path is matched exactly against the tree's listing, and its content is then read by object id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from controller.core.errors import WorkspaceRefused
from controller.workspace.git import Git, Ran
from controller.workspace.limits import Limits
from controller.workspace.tree import Entry, fault, parse, visible

FIXED_DATE = "946684800 +0000"  # 2000-01-01


class Objects:
    """One clone's object store."""

    def __init__(self, git: Git, directory: Path, *, limits: Limits) -> None:
        self._git, self._directory, self._limits = git, directory, limits

    def run(
        self,
        args: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        max_output: int | None = None,
        may_cut: bool = False,
    ) -> bytes:
        """A short command that must succeed, at most `max_output` bytes (else refused, or cut there)."""
        ran = self._git.run(
            [f"--git-dir={self._directory}", *args],
            max_output=self._limits.tree_bytes if max_output is None else max_output,
            seconds=self._limits.command_seconds,
            stdin=stdin,
            env=env,
            memory_bytes=self._limits.memory_bytes,
        )
        return ran.out if ran.cut and may_cut else must(ran, f"git {args[0]}").out

    def search(self, args: Sequence[str], *, max_output: int) -> Ran:
        """A search, which may end in any way; bounded in memory and time as well. Raises TimedOut."""
        return self._git.run(
            [f"--git-dir={self._directory}", *args],
            max_output=max_output,
            seconds=self._limits.search_seconds,
            memory_bytes=self._limits.search_memory_bytes,
        )

    def commit_of(self, oid: str) -> str | None:
        """The commit that an object is or, being a tag, points at; None when it is not here. After a fetch its whole tree is."""
        ran = self._git.run(
            [
                f"--git-dir={self._directory}",
                "rev-parse",
                "--verify",
                "--quiet",
                "--end-of-options",
                f"{oid}^{{commit}}",
            ],
            max_output=1024,
            seconds=self._limits.command_seconds,
            memory_bytes=self._limits.memory_bytes,
        )
        return ran.out.decode().strip() if ran.code == 0 else None

    def listing(self, commit: str) -> tuple[Entry, ...]:
        """Every file, link and submodule of the commit. Raises WorkspaceRefused over the cap on their number."""
        entries = parse(self.run(["ls-tree", "-r", "-l", "-z", "--full-tree", commit]))
        if len(entries) > self._limits.files:
            raise WorkspaceRefused(f"the repository has {len(entries)} files; at most {self._limits.files} are taken")
        return entries

    def entry(self, commit: str, path: str) -> Entry | None:
        """The entry of exactly this path, of any kind; None when there is none."""
        if fault(path) is not None:
            return None
        found = parse(self.run(["ls-tree", "-l", "-z", "--full-tree", commit, "--", path]))
        return next((entry for entry in found if entry.path == path), None)

    def blob(self, entry: Entry, *, max_bytes: int, may_cut: bool = False) -> bytes:
        """A blob's bytes."""
        if entry.size > max_bytes and not may_cut:
            raise WorkspaceRefused(f"{visible(entry.path)}: has {entry.size} bytes; at most {max_bytes} are taken")
        return self.run(["cat-file", "blob", entry.oid], max_output=max_bytes, may_cut=may_cut)

    def write_blob(self, content: bytes) -> str:
        """The new blob's id."""
        return self.run(["hash-object", "-w", "--no-filters", "--stdin"], stdin=content).decode().strip()

    def commit_tree(self, tree: str) -> str:
        """A commit of `tree` without history, at a fixed date by nobody: a pure function of the tree."""
        who = {"NAME": "sisu-kodo", "EMAIL": "sisu-kodo@invalid", "DATE": FIXED_DATE}
        env = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
        return self.run(["commit-tree", tree, "-m", "snapshot"], env=env).decode().strip()


def must(ran: Ran, what: str) -> Ran:
    """The command's result, or WorkspaceRefused for any failure or too much output."""
    if ran.cut:
        raise WorkspaceRefused(f"{what} has more than {len(ran.out)} bytes of output")
    if ran.code != 0:
        raise WorkspaceRefused(f"{what} failed: {visible(ran.err)[-300:] or f'exit {ran.code}'}")
    return ran
