"""What JSON from outside may hold so that files, commands and the database can carry it. Pure, and without recursion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 64  # whoever walks, prints or stores it later may use a call for each level


def problem(value: Any) -> str | None:
    """Why this JSON value of a model's answer cannot be taken; None when it can."""
    for one, depth in _walk(value):
        if depth > MAX_DEPTH:
            return f"the answer is nested more than {MAX_DEPTH} levels deep"
        if isinstance(one, str) and ("\0" in one or any("\ud800" <= char <= "\udfff" for char in one)):
            return "the answer holds a NUL or half a surrogate pair, which no file, command or database can carry"
    return None


def deeper_than(most: int, value: Any) -> bool:
    """Whether anything in this JSON value lies more than so many levels deep."""
    return any(depth > most for _, depth in _walk(value))


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value and key with its depth; what is looked for ends it early."""
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        yield one, depth
        if isinstance(one, Mapping):
            todo += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list | tuple):
            todo += [(inner, depth + 1) for inner in one]
