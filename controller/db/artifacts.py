"""Artifacts by reference: `artifact://run/<runId>/step/<stepId>[/task/<taskKey>]/<name>`.

Served are those of a task's accepted attempt, the newest with an outcome, and of a step's newest attempt.
"""

from __future__ import annotations

from collections.abc import Sequence

from controller.db.blobs import read_blob
from controller.db.pool import Pool, one, rows


def artifact_uri(run_id: str, step_id: str, task_key: str, name: str) -> str:
    """The reference of an artifact; later attempts of the same task have the same."""
    task = f"/task/{task_key}" if task_key else ""
    return f"artifact://run/{run_id}/step/{step_id}{task}/{name}"


def read(pool: Pool, uri: str) -> bytes | None:
    """The artifact's content, checked by its hash; None when the attempt that counts has no such artifact. Raises DigestMismatch."""
    row = one(pool, "artifact", uri=uri)
    return None if row is None else read_blob(pool, row["sha256"])


def below(pool: Pool, uri: str) -> Sequence[tuple[str, int]]:
    """(reference, bytes) of all served artifacts whose reference begins with this one and a slash."""
    return [(row["uri"], row["size"]) for row in rows(pool, "artifacts_below", folder=uri.rstrip("/") + "/")]
