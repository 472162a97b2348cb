"""What a task prints: streamed on as it comes, cut at a documented total per stream, its end kept for the record.

Shared by every provider, so that the cut and its mark are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

from controller.core.model import Chunk

STREAM_LIMIT = 1 << 20  # bytes per stream that are passed on; the rest is read and thrown away
TAIL = 16 << 10  # bytes per stream that SBXRes keeps


class Capture:
    """Not thread-safe: one run, one thread."""

    def __init__(self, emit: Callable[[Chunk], None], *, limit: int = STREAM_LIMIT) -> None:
        self._emit = emit
        self._limit = limit
        self._seen = {"stdout": 0, "stderr": 0}
        self._tails = {"stdout": bytearray(), "stderr": bytearray()}

    def feed(self, kind: str, data: bytes) -> None:
        """Passes on what fits under the limit, and once the mark."""
        if self.full(kind) or not data:
            return
        room = self._limit - self._seen[kind]
        self._seen[kind] += len(data)
        if len(data) <= room:
            self._pass(kind, data)
            return
        if room:
            self._pass(kind, data[:room])
        self._pass(kind, f"\n[sisu-kodo: output cut at {self._limit} bytes]\n".encode())

    def note(self, text: str) -> None:
        """A line of our own on stderr, also after the cut."""
        self._pass("stderr", f"[sisu-kodo: {text}]\n".encode())

    def full(self, kind: str) -> bool:
        """Whether the stream was cut, so that nothing more of it is wanted."""
        return self._seen[kind] > self._limit

    def tail(self, kind: str) -> str:
        """The last 16 KiB as text that PostgreSQL can hold: broken UTF-8 and NUL become U+FFFD."""
        text = bytes(self._tails[kind]).decode(errors="replace").replace("\x00", "\ufffd")
        return text.encode()[-TAIL:].decode(errors="ignore")

    def _pass(self, kind: str, data: bytes) -> None:
        tail = self._tails[kind]
        tail += data[-TAIL:]
        del tail[:-TAIL]
        self._emit(Chunk(kind=kind, data=data))
