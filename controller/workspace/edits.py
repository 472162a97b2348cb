"""A plan's edits as new file contents: pure rules about what an edit may touch. git turns the result into a diff (patch.py).

Errors are InvalidPlan, name the edit by index and path, and say what was found: they are quoted to the model for one repair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controller.core.contract import DeleteFile, Edit, ReplaceText, WriteFile
from controller.core.errors import InvalidPlan
from controller.workspace.tree import REGULAR, SUBMODULE, SYMLINK, Entry, covered, fault, visible

QUOTE = 120


@dataclass(frozen=True, kw_only=True)
class Content:
    """A file's content after the edits; `data` None means that it is gone."""

    mode: str
    data: bytes | None


def apply(
    edits: Sequence[Edit], *, entries: Mapping[str, Entry], read: Callable[[Entry], bytes], max_bytes: int
) -> dict[str, Content]:
    """The edits in order, each on the result of those before. Paths that are touched, with their content."""
    changed: dict[str, Content] = {}
    for index, edit in enumerate(edits):
        where = f"edit {index} ({edit.op} {visible(edit.path)})"
        if (wrong := fault(edit.path)) is not None:
            raise InvalidPlan(
                f"{where}: the path {wrong}; right would be a path relative to the repository, such as src/a.py"
            )
        paths = (entries.keys() | changed.keys()) - {p for p, content in changed.items() if content.data is None}
        _check_place(where, edit.path, paths, entries)
        old = _current(where, edit.path, changed=changed, entries=entries, read=read, max_bytes=max_bytes)
        changed[edit.path] = _edited(where, edit, old)
        if len(changed[edit.path].data or b"") > max_bytes:
            raise InvalidPlan(f"{where}: the file would have more than {max_bytes} bytes")
    return changed


def _check_place(where: str, path: str, paths: set[str], entries: Mapping[str, Entry]) -> None:
    if (above := covered(path, paths)) is not None:
        kind = {SYMLINK: "a symbolic link", SUBMODULE: "a submodule"}.get(
            entries[above].mode if above in entries else "", "a file"
        )
        raise InvalidPlan(f"{where}: {visible(above)} is {kind}, so nothing can be edited below it")
    if any(other.startswith(f"{path}/") for other in paths):
        raise InvalidPlan(f"{where}: is a directory")
    entry = entries.get(path)
    if entry is not None and entry.mode not in REGULAR:
        raise InvalidPlan(f"{where}: is a symbolic link or a submodule; only plain files can be edited")


def _current(
    where: str,
    path: str,
    *,
    changed: Mapping[str, Content],
    entries: Mapping[str, Entry],
    read: Callable[[Entry], bytes],
    max_bytes: int,
) -> Content:
    """The file as the edits before left it. Only text that people can review may be edited."""
    if path in changed:
        return changed[path]
    entry = entries.get(path)
    if entry is None:
        return Content(mode=REGULAR[0], data=None)
    if entry.size > max_bytes:
        raise InvalidPlan(f"{where}: the file has {entry.size} bytes; at most {max_bytes} can be edited")
    data = read(entry)
    _text(where, data)
    return Content(mode=entry.mode, data=data)


def _text(where: str, data: bytes) -> str:
    if b"\0" in data:
        raise InvalidPlan(f"{where}: is a binary file, which cannot be edited")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidPlan(f"{where}: is not UTF-8 text, which alone can be edited") from e


def _edited(where: str, edit: Edit, old: Content) -> Content:
    match edit:
        case WriteFile():
            return Content(mode=old.mode, data=_encoded(where, edit.content))
        case DeleteFile():
            if old.data is None:
                raise InvalidPlan(f"{where}: there is no such file")
            return Content(mode=old.mode, data=None)
        case ReplaceText():
            if old.data is None:
                raise InvalidPlan(f"{where}: there is no such file")
            return Content(mode=old.mode, data=_encoded(where, _replaced(where, edit, _text(where, old.data))))


def _replaced(where: str, edit: ReplaceText, text: str) -> str:
    first = text.find(edit.search)
    quoted = repr(edit.search[:QUOTE]) + ("…" if len(edit.search) > QUOTE else "")
    if first < 0:
        hint = "; the file's lines end in CR LF" if "\r\n" in text and "\n" in edit.search else ""
        raise InvalidPlan(f"{where}: search text occurs 0 times, must occur exactly once{hint}: {quoted}")
    if text.find(edit.search, first + 1) >= 0:
        times = sum(text.startswith(edit.search, at) for at in range(len(text)))
        raise InvalidPlan(f"{where}: search text occurs {times} times, must occur exactly once: {quoted}")
    return text[:first] + edit.replace + text[first + len(edit.search) :]


def _encoded(where: str, text: str) -> bytes:
    if "\0" in text:
        raise InvalidPlan(f"{where}: the new text holds a NUL")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InvalidPlan(f"{where}: the new text cannot be encoded as UTF-8") from e
