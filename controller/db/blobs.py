"""Content by hash. A later object store takes this module's place."""

from __future__ import annotations

from collections.abc import Sequence

from controller.core.digest import sha256
from controller.core.errors import DigestMismatch
from controller.db.pool import Pool, rows


def read_blobs(pool: Pool, shas: Sequence[str]) -> dict[str, bytes]:
    """The bytes with these hashes, checked. Raises DigestMismatch when some are missing or were altered."""
    found = {row["sha256"]: bytes(row["content"]) for row in rows(pool, "blobs", shas=list(shas))}
    for sha in shas:
        if sha not in found:
            raise DigestMismatch(f"blob {sha} is missing")
        if sha256(found[sha]) != sha:
            raise DigestMismatch(f"blob {sha} was altered")
    return found


def read_blob(pool: Pool, sha: str) -> bytes:
    """One of them."""
    return read_blobs(pool, [sha])[sha]
