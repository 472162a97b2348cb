"""Characters that hide or reorder text are spelled out; everything else stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core.visible import first_hidden, hidden, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\u00e5\u6f22\U0001f600", "\u00e5\u6f22\U0001f600"),
        ("a\u202eb", "a<U+202E>b"),  # right-to-left override
        ("a\u2066b\u2069", "a<U+2066>b<U+2069>"),  # isolates
        ("a\u200bb\u200d\ufeff", "a<U+200B>b<U+200D><U+FEFF>"),  # zero width
        ("\x1b[2J\x00\x7f\x9b", "<U+001B>[2J<U+0000><U+007F><U+009B>"),  # terminal control
        ("a\rb", "a<U+000D>b"),
        ("a\u2028b\u2029", "a<U+2028>b<U+2029>"),
        ("\ue000\ud800", "<U+E000><U+D800>"),
        ("\U000e0041", "<U+E0041>"),  # tag characters
        ("\xad", "<U+00AD>"),  # soft hyphen
        ("a\u3164\uffa0\u115fb", "a<U+3164><U+FFA0><U+115F>b"),  # Hangul fillers: letters, and names of variables
        ("a\ufe00\ufe0f\U000e0100\U000e01ef", "a<U+FE00><U+FE0F><U+E0100><U+E01EF>"),  # variation selectors carry bytes
        ("\u034f\u17b4\u180b\u2800", "<U+034F><U+17B4><U+180B><U+2800>"),
    ],
)
def test_hidden_characters_are_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(max_size=50))
@hypothesis(max_examples=200, deadline=None)
def test_nothing_hidden_is_left_and_doing_it_twice_changes_nothing(text: str) -> None:
    shown = visible(text)
    assert not any(hidden(c) for c in shown) and visible(shown) == shown
    assert (shown == text) == (first_hidden(text) is None)


def test_the_first_hidden_character_is_named() -> None:
    assert first_hidden("ab\u202ec\u200b") == "<U+202E>"
    assert first_hidden("ab\n\t") is None
