"""The Workspace port over git: resolves a source to a commit and answers everything else from that commit's objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from controller.core.contract import Edit
from controller.core.errors import Unavailable, WorkspaceRefused
from controller.core.model import GitSource, Patch, Snapshot
from controller.workspace import source as sources
from controller.workspace import view
from controller.workspace.clone import Clones
from controller.workspace.git import Git
from controller.workspace.limits import Limits
from controller.workspace.objects import Objects
from controller.workspace.patch import diff
from controller.workspace.recent import Recent
from controller.workspace.snapshot import snapshot

KNOWN, SNAPSHOTS, SMALL_SNAPSHOT = 4096, 32, 1024 * 1024


class GitWorkspace:
    """Safe for many threads, and for many processes on one `root`.

    `environ` may hold what git's transport needs from outside: proxies and certificate paths.
    """

    def __init__(
        self,
        root: Path,
        *,
        allow_loopback_http: bool = False,
        limits: Limits | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._loopback = allow_loopback_http
        home = root / "home"
        home.mkdir(parents=True, exist_ok=True)
        self._known = Recent[str](size=KNOWN)
        self._snapshots = Recent[Snapshot](size=SNAPSHOTS)
        self._clones = Clones(root, git=Git(home, environ=environ), limits=self._limits)

    def resolve(self, source: GitSource | None) -> str:
        """See ports.Workspace. A ref that is a full commit id is not asked for again once it is here."""
        if source is None:
            return self._known.get((*self._clones.born(None), "empty"), self._clones.empty_commit)
        sources.check(source, allow_loopback_http=self._loopback)
        if sources.COMMIT.fullmatch(source.ref):
            return self._at(source, source.ref, ask_ref=False)[1]
        return self._at(source, self._clones.advertised(source), ask_ref=True)[1]

    def snapshot(self, source: GitSource | None, commit: str) -> Snapshot:
        """See ports.Workspace."""
        objects, commit = self._at(source, commit)
        key = (*self._clones.born(source), commit)
        make = partial(snapshot, objects, commit, limits=self._limits)
        return self._snapshots.get(key, make, keep=lambda made: made.size <= SMALL_SNAPSHOT)

    def map(self, source: GitSource | None, commit: str, *, max_bytes: int) -> str:
        """See ports.Workspace."""
        return view.repository_map(*self._at(source, commit), max_bytes=max_bytes)

    def read(self, source: GitSource | None, commit: str, path: str, *, max_bytes: int) -> str:
        """See ports.Workspace."""
        return view.file_text(*self._at(source, commit), path, max_bytes=max_bytes)

    def search(self, source: GitSource | None, commit: str, pattern: str, *, max_bytes: int) -> str:
        """See ports.Workspace."""
        return view.matches(*self._at(source, commit), pattern, max_bytes=max_bytes)

    def diff(self, source: GitSource | None, commit: str, edits: Sequence[Edit]) -> Patch:
        """See ports.Workspace."""
        return diff(*self._at(source, commit), edits, limits=self._limits)

    def _at(self, source: GitSource | None, oid: str, *, ask_ref: bool = True) -> tuple[Objects, str]:
        """The clone with this object in it, fetched if need be, and the object's commit."""
        if not sources.COMMIT.fullmatch(oid):
            raise WorkspaceRefused(f"{oid[:80]!r} is not a commit id of 40 hex digits")
        if source is not None:
            sources.check(source, allow_loopback_http=self._loopback)
        objects = self._clones.objects(source)
        key = (*self._clones.born(source), oid)
        return objects, self._known.get(key, lambda: self._found(source, oid, objects, ask_ref=ask_ref))

    def _found(self, source: GitSource | None, oid: str, objects: Objects, *, ask_ref: bool) -> str:
        if (commit := objects.commit_of(oid)) is not None:
            return commit
        self._get(source, oid, ask_ref=ask_ref)
        if (commit := objects.commit_of(oid)) is not None:
            return commit
        raise Unavailable(f"the source's ref has moved away from {oid}, which its server does not give any more")

    def _get(self, source: GitSource | None, oid: str, *, ask_ref: bool) -> None:
        if source is None:
            if oid != self._clones.empty_commit():
                raise WorkspaceRefused(f"{oid} is not the commit of an Intent without a repository")
            return
        try:
            self._clones.fetch(source, oid)
        except WorkspaceRefused:
            # Some servers give refs only, no bare ids.
            if not ask_ref or sources.COMMIT.fullmatch(source.ref):
                raise
            self._clones.fetch(source, source.ref)
