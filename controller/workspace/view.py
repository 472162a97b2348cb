"""What of a repository is shown to a model: the map, one file, one search. Text out, every cut visible, links never followed."""

from __future__ import annotations

import unicodedata

from controller.core.errors import WorkspaceRefused
from controller.workspace.git import TimedOut
from controller.workspace.objects import Objects
from controller.workspace.tree import REGULAR, SUBMODULE, SYMLINK, Entry, visible

BINARY_PROBE = 8000  # git's own rule: a NUL among the first bytes
MAX_LINE = 400


def repository_map(objects: Objects, commit: str, *, max_bytes: int) -> str:
    """One line per entry: path and size; links and submodules are named as such."""
    lines = [_map_line(entry) for entry in objects.listing(commit)]
    if not lines:
        return "(no files)\n"[:max_bytes]
    return _cut_lines(lines, max_bytes, "files")


def _map_line(entry: Entry) -> str:
    note = {SYMLINK: "symbolic link", SUBMODULE: "submodule, left out"}.get(entry.mode, f"{entry.size} bytes")
    return f"{visible(entry.path)} ({note})\n"


def file_text(objects: Objects, commit: str, path: str, *, max_bytes: int) -> str:
    """A regular file's text. Raises WorkspaceRefused for anything else."""
    entry = objects.entry(commit, path)
    if entry is None:
        raise WorkspaceRefused(f"{visible(path)}: is not a file of the commit")
    if entry.mode not in REGULAR:
        kind = {SYMLINK: "a symbolic link", SUBMODULE: "a submodule"}.get(entry.mode, "a directory")
        raise WorkspaceRefused(f"{visible(path)}: is {kind}, not a plain file")
    data = objects.blob(entry, max_bytes=max_bytes, may_cut=True)
    if b"\0" in data[:BINARY_PROBE]:
        raise WorkspaceRefused(f"{visible(path)}: is a binary file of {entry.size} bytes")
    if entry.size <= max_bytes:
        return data.decode("utf-8", "replace")
    mark = f"\n[cut: the file has {entry.size} bytes]\n"
    return data[: max(0, max_bytes - len(mark))].decode("utf-8", "ignore") + mark


def matches(objects: Objects, commit: str, pattern: str, *, max_bytes: int) -> str:
    """`path:line:text` of every match of an extended regular expression in text files. Raises WorkspaceRefused."""
    if any(unicodedata.category(c) in ("Cc", "Cs") and c != "\t" for c in pattern):
        raise WorkspaceRefused("the pattern holds control characters")
    args = [
        "grep",
        "-n",
        "-I",
        "--no-textconv",
        "--no-color",
        "--full-name",
        "--threads=1",
        "-E",
        "-e",
        pattern,
        commit,
    ]
    try:
        ran = objects.search(args, max_output=4 * max_bytes)
    except TimedOut as e:
        raise WorkspaceRefused(f"the search for {visible(pattern)!r} took too long and was stopped") from e
    if ran.code == 1 and not ran.err and not ran.cut:
        return "(no matches)\n"[:max_bytes]
    if ran.code not in (0, 1) and not ran.cut:
        why = visible(ran.err)[-200:] or "it needs too much memory"
        raise WorkspaceRefused(f"{visible(pattern)!r} cannot be searched as an extended regular expression: {why}")
    found = ran.out.decode("utf-8", "replace").split("\n")[:-1]
    lines = ["\t".join(map(visible, line.removeprefix(f"{commit}:").split("\t")))[:MAX_LINE] + "\n" for line in found]
    return _cut_lines(lines, max_bytes, "matches", more=ran.cut)


def _cut_lines(lines: list[str], max_bytes: int, what: str, *, more: bool = False) -> str:
    """As many whole lines as fit, with a mark that says how many do not."""
    if not more and sum(len(line.encode()) for line in lines) <= max_bytes:
        return "".join(lines)
    room = max_bytes - len(f"[cut: {len(lines)} of more than {len(lines)} {what}]\n")
    kept, used = 0, 0
    for line in lines:
        used += len(line.encode())
        if used > room:
            break
        kept += 1
    return "".join(lines[:kept]) + f"[cut: {kept} of {'more than ' if more else ''}{len(lines)} {what}]\n"
