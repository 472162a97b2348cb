"""Content by hash. A later object store takes this module's place."""

from __future__ import annotations

from controller.core.digest import sha256
from controller.core.errors import DigestMismatch
from controller.db.pool import Pool, one


def read_blob(pool: Pool, sha: str) -> bytes:
    """The bytes with this hash, checked. Raises DigestMismatch when they are missing or were altered."""
    row = one(pool, "blob", sha256=sha)
    if row is None:
        raise DigestMismatch(f"blob {sha} is missing")
    content = bytes(row["content"])
    if sha256(content) != sha:
        raise DigestMismatch(f"blob {sha} was altered")
    return content
