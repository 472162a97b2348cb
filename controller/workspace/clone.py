"""Bare, shallow clones under one cache folder: made, locked, and filled by commit. No work tree, ever.

A clone only grows: objects are immutable and never collected, so readers need no lock; fetching takes the clone's file lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from controller.core.errors import Unavailable, WorkspaceRefused
from controller.core.model import GitSource
from controller.workspace import source as sources
from controller.workspace.git import Git, Ran
from controller.workspace.limits import Limits
from controller.workspace.objects import Objects, must
from controller.workspace.tree import visible

# Attributes in a repository must not change what `git archive`, `grep` and `diff` give: bytes are the blob's bytes.
ATTRIBUTES = "* -export-ignore -export-subst -text !eol -ident -filter -working-tree-encoding !diff\n"
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
_REFUSED = re.compile(
    r"could not read (Username|Password)|Authentication failed|not found|returned error: 40[0134]|not our ref"
    r"|unadvertised object|does not appear to be a git repository|transport '.*' not allowed|redirect|fsck|bad object"
    r"|out of memory",
    re.IGNORECASE,
)
_UNOPENED = re.compile(r"could not read (Username|Password)|Authentication failed")
_LOCK_POLL = 0.02
_MAX_REFS_OUTPUT = 65_536


class Clones:
    """The clones below `root`. One instance per process is enough; processes may share the folder."""

    def __init__(self, root: Path, *, git: Git, limits: Limits) -> None:
        self._root, self._git, self._limits = root, git, limits

    def directory(self, source: GitSource | None) -> Path:
        """The clone's folder, made if need be."""
        path = self._root / ("empty" if source is None else sources.clone_key(source))
        if not (path / "ready").exists():
            with self.lock(path):
                if not (path / "ready").exists():
                    self._create(path)
        return path

    def _create(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        args = ["init", "--bare", "--quiet", "--template=", "--object-format=sha1", str(path)]
        must(self._git.run(args, max_output=4096, seconds=self._limits.command_seconds), "git init")
        (path / "info").mkdir(exist_ok=True)
        (path / "info" / "attributes").write_text(ATTRIBUTES)
        (path / "ready").touch()

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[int]:
        """Exclusive among threads and processes: the kernel drops a flock with the last process that has the file open.

        A fetch gets the file too: should this process be killed, the lock stays until that fetch has ended as well.
        """
        until = time.monotonic() + self._limits.lock_seconds
        with path.with_suffix(".lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise Unavailable(
                            f"the clone is locked by another fetch for {self._limits.lock_seconds:g} s"
                        ) from None
                    time.sleep(_LOCK_POLL)
            yield file.fileno()

    def empty_commit(self) -> str:
        """The commit of an Intent without a repository."""
        objects = self.objects(None)
        objects.run(["hash-object", "-w", "-t", "tree", os.devnull])
        return objects.commit_tree(EMPTY_TREE)

    def born(self, source: GitSource | None) -> tuple[str, int]:
        """Names the clone as it is on disk now: another one after the cache was wiped."""
        directory = self.directory(source)
        return str(directory), (directory / "ready").stat().st_mtime_ns

    def objects(self, source: GitSource | None) -> Objects:
        """The clone's content."""
        return Objects(self._git, self.directory(source), limits=self._limits)

    def advertised(self, source: GitSource) -> str:
        """The object that the source's ref names now: a branch, else a tag, else a full ref name such as refs/pull/1/head."""
        ref = source.ref
        names = [ref] if ref == "HEAD" or ref.startswith("refs/") else [f"refs/heads/{ref}", f"refs/tags/{ref}"]
        peeled = [f"{name}^{{}}" for name in names if name.startswith("refs/tags/")]
        ran = self._git.run(
            ["ls-remote", "--quiet", "--", source.url, *names, *peeled],
            max_output=_MAX_REFS_OUTPUT,
            seconds=self._limits.command_seconds,
            config=sources.config_of(source),
            memory_bytes=self._limits.memory_bytes,
        )
        lines = (line.partition("\t") for line in remote(ran, source).out.decode("ascii", "replace").splitlines())
        found = {name: oid for oid, _, name in lines if sources.COMMIT.fullmatch(oid)}
        for name in (*names[:1], *peeled, *names[1:]):
            if name in found:
                return found[name]
        raise WorkspaceRefused(f"{sources.REF}: {ref!r} is neither a branch nor a tag of {source.url}")

    def fetch(self, source: GitSource, want: str) -> None:
        """Fetch one object (by id) or ref without history. Raises Unavailable or WorkspaceRefused."""
        directory = self.directory(source)
        with self.lock(directory) as held:
            if sources.COMMIT.fullmatch(want) and self.objects(source).commit_of(want):
                return  # another one fetched it while we waited
            sweep(directory)
            args = [f"--git-dir={directory}", "fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules"]
            args += ["--no-write-fetch-head", "--no-auto-maintenance", "--", source.url, f"+{want}:refs/sisu/last"]
            try:
                ran = self._git.run(
                    args,
                    max_output=4096,
                    seconds=self._limits.fetch_seconds,
                    config=sources.config_of(source),
                    memory_bytes=self._limits.memory_bytes,
                    watch=self._growth_cap(directory),
                    keep_open=held,
                )
            finally:
                sweep(directory)
            remote(ran, source)

    def _growth_cap(self, directory: Path) -> Callable[[], None]:
        packs = directory / "objects" / "pack"
        before, cap = _size(packs), self._limits.fetch_bytes

        def watch() -> None:
            if _size(packs) - before > cap:
                raise WorkspaceRefused(
                    f"{sources.URL}: fetching one commit takes more than {cap} bytes; make the repository smaller"
                )

        return watch


def sweep(directory: Path) -> None:
    """Remove what a killed fetch left behind; its lock files would stop every later one. Only with the clone's lock."""
    for pattern in ("*.lock", "refs/sisu/*.lock", "objects/pack/tmp_*"):
        for leftover in directory.glob(pattern):
            leftover.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def remote(ran: Ran, source: GitSource) -> Ran:
    """The result of talking to a server: WorkspaceRefused where asking again gives the same answer, else Unavailable.

    git tells these apart only by its English messages (LC_ALL=C); what is not known here is worth another try.
    """
    if ran.code == 0 and not ran.cut:
        return ran
    said = visible(sources.quotable(ran.err, source))[-300:] or f"exit {ran.code}"
    if source.token and _UNOPENED.search(ran.err):
        raise WorkspaceRefused(f"{source.url}: the server does not take the credentials of secretRef: {said}")
    if ran.cut or _REFUSED.search(ran.err):
        raise WorkspaceRefused(f"{source.url}: {said}")
    raise Unavailable(f"{source.url}: {said}")
