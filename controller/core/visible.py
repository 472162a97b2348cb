"""What people are shown is exact: characters that hide or reorder text are spelled out (law 13)."""

from __future__ import annotations

import unicodedata

_PLAIN = frozenset("\n\t")
# Unicode's Default_Ignorable_Code_Point where the category does not say so, and the empty Braille pattern: letters and marks that
# are drawn as nothing. Fillers can name variables in code, and a run of variation selectors can carry a whole program.
_UNSEEN = (
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x2800, 0x2800)),
    *((0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF)),
)
_UNSEEN_CHARACTERS = frozenset(chr(code) for first, last in _UNSEEN for code in range(first, last + 1))


def hidden(character: str) -> bool:
    """Control, format (bidirectional marks, zero-width), surrogate, private-use, odd separator and invisible characters."""
    if character in _PLAIN:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in _UNSEEN_CHARACTERS


def visible(text: str) -> str:
    """The text with every hidden character as `<U+202E>`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"<U+{ord(c):04X}>" if hidden(c) else c for c in text)


def first_hidden(text: str) -> str | None:
    """The first hidden character as `<U+202E>`, or None."""
    return next((visible(c) for c in text if hidden(c)), None)
