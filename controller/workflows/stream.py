"""A task's output on its way to PostgreSQL: batched by 250 ms or 16 KiB, numbered, ended by `stream_closed`.

What has not been flushed when the task ends travels in the outcome's transaction. No thread: the provider asks `canceled()`
several times a second, and that is when due batches are written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from controller.core.model import Artifact, Chunk

FLUSH_SECONDS = 0.25
FLUSH_BYTES = 16 * 1024


class ChunkStream:
    """`write(chunks, base)` stores a batch; `now` is a monotonic clock in seconds. Safe for several threads."""

    def __init__(self, *, write: Callable[[Sequence[Chunk], int], None], now: Callable[[], float]) -> None:
        self._write, self._now = write, now
        self._lock = threading.Lock()
        self._pending: list[Chunk] = []
        self._bytes = 0
        self._since = 0.0
        self._seq = 0
        self._all: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    def emit(self, chunk: Chunk) -> None:
        """Take one piece of output."""
        with self._lock:
            if not self._pending:
                self._since = self._now()
            if self._pending and self._pending[-1].kind == chunk.kind:
                self._pending[-1] = Chunk(kind=chunk.kind, data=self._pending[-1].data + chunk.data)
            else:
                self._pending.append(chunk)
            self._bytes += len(chunk.data)
            self._all[chunk.kind].append(chunk.data)
        self.flush_due()

    def flush_due(self) -> None:
        """Write what is old or large enough."""
        with self._lock:
            if not self._pending or (self._bytes < FLUSH_BYTES and self._now() - self._since < FLUSH_SECONDS):
                return
            batch, base = self._pending, self._seq
            self._seq += len(batch)
            self._pending, self._bytes = [], 0
            self._write(batch, base)

    def close(self) -> tuple[Sequence[Chunk], int]:
        """The rest and the terminal mark, and the sequence number of its first chunk."""
        with self._lock:
            return [*self._pending, Chunk(kind="stream_closed", data=b"")], self._seq

    def artifacts(self) -> list[Artifact]:
        """Everything that was said, one artifact per stream that said anything."""
        return [
            Artifact(name=f"{kind}.txt", kind=kind, content=b"".join(parts))
            for kind, parts in self._all.items()
            if parts
        ]
