"""What a task prints is passed on in order, cut once and visibly, and kept as text that a database can hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.core.model import Chunk
from controller.sbx.output import TAIL, Capture

pieces = st.lists(st.binary(max_size=40), max_size=20)


@given(pieces, st.integers(0, 200))
def test_what_is_passed_on_is_the_beginning_then_one_mark(data: list[bytes], limit: int) -> None:
    chunks: list[Chunk] = []
    capture = Capture(chunks.append, limit=limit)
    for piece in data:
        capture.feed("stdout", piece)
    whole, passed = b"".join(data), b"".join(chunk.data for chunk in chunks)
    mark = b"" if len(whole) <= limit else f"\n[sisu-kodo: output cut at {limit} bytes]\n".encode()
    assert passed == whole[:limit] + mark
    assert capture.full("stdout") == bool(mark)
    assert not capture.full("stderr")


@given(st.binary(max_size=3 * TAIL))
def test_the_tail_is_bounded_text(data: bytes) -> None:
    capture = Capture(lambda _: None)
    capture.feed("stderr", data)
    tail = capture.tail("stderr")
    assert len(tail.encode()) <= TAIL
    assert "\x00" not in tail


def test_the_tail_is_the_end() -> None:
    capture = Capture(lambda _: None)
    capture.feed("stdout", b"a" * TAIL)
    capture.feed("stdout", "ö".encode() * 3)
    assert capture.tail("stdout") == "a" * (TAIL - 6) + "ööö"


def test_a_note_is_seen_also_after_the_cut() -> None:
    chunks: list[Chunk] = []
    capture = Capture(chunks.append, limit=1)
    capture.feed("stderr", b"xyz")
    capture.note("killed")
    assert chunks[-1] == Chunk(kind="stderr", data=b"[sisu-kodo: killed]\n")
