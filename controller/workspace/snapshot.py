"""One commit's tree as a tar archive that is the same on every machine: git archives a commit without history at a fixed date.

Refuses trees that could not be unpacked safely; submodules are left out (they come out as empty directories).
"""

from __future__ import annotations

import hashlib

from controller.core.errors import WorkspaceRefused
from controller.core.model import Snapshot
from controller.workspace import tree
from controller.workspace.limits import Limits
from controller.workspace.objects import Objects
from controller.workspace.tree import Entry

MAX_LINK = 4096
BLOCK = 512


def snapshot(objects: Objects, commit: str, *, limits: Limits) -> Snapshot:
    """Raises WorkspaceRefused for an unsafe entry (named), or over the caps on files and bytes."""
    entries = objects.listing(commit)
    need = sum(BLOCK + -(-entry.size // BLOCK) * BLOCK for entry in entries)
    if need > limits.archive_bytes:
        raise WorkspaceRefused(
            f"the repository takes {need} bytes as an archive; at most {limits.archive_bytes} are taken"
        )

    def target(link: Entry) -> str:
        return objects.blob(link, max_bytes=MAX_LINK).decode("utf-8", "surrogateescape")

    tree.check(entries, target=target)
    root = objects.run(["rev-parse", "--verify", "--end-of-options", f"{commit}^{{tree}}"]).decode().strip()
    archive = objects.run(["archive", "--format=tar", objects.commit_tree(root)], max_output=limits.archive_bytes)
    return Snapshot(commit=commit, sha256=hashlib.sha256(archive).hexdigest(), size=len(archive), archive=archive)
