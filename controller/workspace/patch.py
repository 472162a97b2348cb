"""Edited files as a diff in git's format, made by git from objects and proven by git: applying it gives exactly the new tree.

Works on scratch index files; the clone's own refs and index are never touched.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from controller.core.contract import Edit
from controller.core.errors import InvalidPlan
from controller.core.model import Patch
from controller.workspace import edits as rules
from controller.workspace.edits import Content
from controller.workspace.limits import Limits
from controller.workspace.objects import Objects

STAT_BYTES = 256 * 1024  # at most 200 edits, each with a path of at most 1 KiB
NO_OBJECT = "0" * 40
DIFF = ("diff-tree", "-r", "--no-renames", "--no-ext-diff", "--no-textconv")
AS_PATCH = (
    "--numstat",
    "-p",
    "-z",
    "--text",
    "--full-index",
    "--no-color",
    "--unified=3",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)
EXACT = ("--diff-algorithm=myers", "--indent-heuristic", "--inter-hunk-context=0")


def diff(objects: Objects, commit: str, edits: Sequence[Edit], *, limits: Limits) -> Patch:
    """Raises InvalidPlan naming the edit that breaks a rule; an empty patch when nothing changes."""
    if not edits:
        return _patch(b"", b"")
    entries = {entry.path: entry for entry in objects.listing(commit)}
    changed = rules.apply(
        edits,
        entries=entries,
        read=lambda entry: objects.blob(entry, max_bytes=limits.edit_bytes),
        max_bytes=limits.edit_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="sisu-index-") as folder:
        new, proof = Path(folder, "new"), Path(folder, "proof")
        objects.run(["read-tree", commit], env={"GIT_INDEX_FILE": str(new)})
        shutil.copyfile(new, proof)
        after = _write_tree(objects, new, changed)
        most = limits.patch_bytes + STAT_BYTES
        out = objects.run([*DIFF, *AS_PATCH, *EXACT, commit, after], max_output=most, may_cut=True)
        numstat, _, patch = out.partition(b"\0\0")
        if len(patch) > limits.patch_bytes or len(out) == most:
            raise InvalidPlan(f"the edits make a patch of more than {limits.patch_bytes} bytes")
        if patch:
            _prove(objects, proof, patch, after)
    return _patch(patch, numstat)


def _write_tree(objects: Objects, index: Path, changed: Mapping[str, Content]) -> str:
    lines = []
    for path, content in changed.items():
        gone = content.data is None
        oid = NO_OBJECT if content.data is None else objects.write_blob(content.data)
        lines.append(f"{'0' if gone else content.mode} {oid}\t{path}\0".encode())
    lines.sort(key=lambda line: not line.startswith(b"0 "))  # removals first: a file may become a directory
    env = {"GIT_INDEX_FILE": str(index)}
    if lines:
        objects.run(["update-index", "-z", "--index-info"], stdin=b"".join(lines), env=env)
    return objects.run(["write-tree"], env=env).decode().strip()


def _prove(objects: Objects, index: Path, patch: bytes, after: str) -> None:
    """git applies the patch's bytes to the commit and gets the same tree: what is approved is what will be there."""
    env = {"GIT_INDEX_FILE": str(index)}
    objects.run(["apply", "--cached", "--whitespace=nowarn", "-"], stdin=patch, env=env)
    if objects.run(["write-tree"], env=env).decode().strip() != after:
        raise InvalidPlan("the patch does not apply to the commit exactly")


def _patch(patch: bytes, numstat: bytes) -> Patch:
    rows = [row.decode().split("\t") for row in numstat.split(b"\0") if row]
    return Patch(
        sha256=hashlib.sha256(patch).hexdigest(),
        files=tuple(path for _, _, path in rows),
        additions=sum(int(added) for added, _, _ in rows if added != "-"),
        deletions=sum(int(deleted) for _, deleted, _ in rows if deleted != "-"),
        diff=patch,
    )
