"""One commit's tree as a listing, and the rules about what in it may be carried. Pure: works on the output of `git ls-tree`.

git itself would refuse most hostile trees at checkout; nothing is ever checked out here, so the rules are spelled out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from controller.core.errors import WorkspaceRefused

REGULAR = ("100644", "100755")
SYMLINK = "120000"
SUBMODULE = "160000"
MAX_HOPS = 40  # as the kernel's limit of links in one path
MAX_PATH = 4095  # bytes; the kernel takes no longer one, so neither could whoever unpacks it
MAX_STEPS = 5_000_000  # of following all links of one tree: well over 100 for each of its 20,000 files at most


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry. `size` is in bytes, 0 for what has none."""

    path: str
    mode: str
    oid: str
    size: int


def parse(listing: bytes) -> tuple[Entry, ...]:
    """The output of `git ls-tree -z -l [-r]`."""
    return tuple(_entry(line) for line in listing.split(b"\0") if line)


def _entry(line: bytes) -> Entry:
    facts, _, path = line.partition(b"\t")
    mode, _, oid, size = facts.split()
    return Entry(
        path=path.decode("utf-8", "surrogateescape"),
        mode=mode.decode(),
        oid=oid.decode(),
        size=0 if size == b"-" else int(size),
    )


def visible(text: str) -> str:
    """Text with control, bidirectional and other invisible characters spelled out, so that one line stays one honest line."""
    return "".join(
        f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text
    )


def fault(path: str) -> str | None:
    """What is wrong with a path as the name of a file below some root, or None."""
    parts = path.split("/")
    if path.startswith("/"):
        return "is absolute"
    if visible(path) != path:
        return "holds control or invisible characters"
    if "" in parts:
        return "has an empty component"
    if "." in parts or ".." in parts:
        return "has a component . or .."
    if any(_is_dot_git(part) for part in parts):
        return "leads into .git"
    if any(len(part.encode()) > 255 for part in parts):
        return "has a component longer than 255 bytes"
    if len(path.encode()) > MAX_PATH:
        return f"is longer than {MAX_PATH} bytes"
    return None


def _is_dot_git(part: str) -> bool:
    """`.git` as any file system may spell it (case, trailing dots and spaces, streams, short names)."""
    plain = part.split(":")[0].rstrip(". ").lower()
    return plain in (".git", "git~1")


def check(entries: Iterable[Entry], *, target: Callable[[Entry], str]) -> None:
    """Every entry can be unpacked below a root without touching anything outside it, or WorkspaceRefused naming the path.

    `target` gives a symbolic link's text.
    """
    listed = list(entries)
    files = {entry.path for entry in listed}
    if len(files) != len(listed):
        raise WorkspaceRefused("the tree lists a path twice")
    links = {entry.path: target(entry) for entry in listed if entry.mode == SYMLINK}
    for entry in listed:
        if (wrong := fault(entry.path)) is not None:
            raise WorkspaceRefused(f"{visible(entry.path)}: the path {wrong}")
        if entry.mode not in (*REGULAR, SYMLINK, SUBMODULE):
            raise WorkspaceRefused(f"{entry.path}: has mode {entry.mode}, which is neither a file nor a link")
        if (above := covered(entry.path, files)) is not None:
            raise WorkspaceRefused(f"{entry.path}: lies below {above}, which is not a directory")
    steps = Steps(left=MAX_STEPS)
    for path, text in links.items():
        if escapes(path, links, steps=steps):
            raise WorkspaceRefused(f"{path}: is a symbolic link to '{visible(text)[:200]}', outside the repository")


def covered(path: str, files: Iterable[str] | Mapping[str, object]) -> str | None:
    """The listed entry (a file, link or submodule) that is a proper prefix of `path`, if there is one."""
    parts = path.split("/")
    return next((above for n in range(1, len(parts)) if (above := "/".join(parts[:n])) in files), None)


@dataclass
class Steps:
    """What following links may still cost: links of links multiply, and nothing else would end it before hours."""

    left: int

    def take(self, cost: int) -> None:
        """Raises WorkspaceRefused when nothing is left."""
        self.left -= cost
        if self.left < 0:
            raise WorkspaceRefused("the repository's symbolic links lead through each other too often to be followed")


def escapes(link: str, links: Mapping[str, str], *, steps: Steps) -> bool:
    """Whether following `link` can leave the root, through other links of the tree too. Loops do not leave it."""
    at: list[str] = []
    todo = link.split("/")[::-1]
    hops = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not at:
                return True
            at.pop()
            continue
        steps.take(len(at) + 1)
        text = links.get("/".join((*at, part)))
        if text is None:
            at.append(part)
            continue
        hops += 1
        if text.startswith("/"):
            return True
        if hops > MAX_HOPS:
            return False
        todo.extend(text.split("/")[::-1])
    return False
