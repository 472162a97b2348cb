"""What people are shown is exact: characters that hide or reorder text are spelled out (law 13)."""

from __future__ import annotations

import unicodedata

_PLAIN = frozenset("\n\t")


def hidden(character: str) -> bool:
    """Control, format (bidirectional marks, zero-width), surrogate, private-use and odd separator characters."""
    return character not in _PLAIN and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def visible(text: str) -> str:
    """The text with every hidden character as `<U+202E>`."""
    if text.isprintable():
        return text
    return "".join(f"<U+{ord(c):04X}>" if hidden(c) else c for c in text)


def first_hidden(text: str) -> str | None:
    """The first hidden character as `<U+202E>`, or None."""
    return next((visible(c) for c in text if hidden(c)), None)
