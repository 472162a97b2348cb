"""The Workspace port over git: resolves a source to a commit and answers everything else from that commit's objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from controller.workspace.snapshot import snapshot


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
        self._clones = Clones(root, git=Git(home, environ=environ), limits=self._limits)

    def resolve(self, source: GitSource | None) -> str:
        """See ports.Workspace. A ref that is a full commit id is not asked for again once it is here."""
        if source is None:
            return self._clones.empty_commit()
        sources.check(source, allow_loopback_http=self._loopback)
        if sources.COMMIT.fullmatch(source.ref):
            return self._at(source, source.ref, ask_ref=False)[1]
        return self._at(source, self._clones.advertised(source), ask_ref=True)[1]

    def snapshot(self, source: GitSource | None, commit: str) -> Snapshot:
        """See ports.Workspace."""
        objects, commit = self._at(source, commit)
        return snapshot(objects, commit, limits=self._limits)

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
        commit = objects.commit_of(oid)
        if commit is None:
            self._get(source, oid, ask_ref=ask_ref)
            commit = objects.commit_of(oid)
        if commit is None:
            raise Unavailable(f"the source's ref has moved away from {oid}, which its server does not give any more")
        return objects, commit

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
