"""A provider's limits over all workers: sandboxes created per second, and at the same time (app.admit_sandbox)."""

from __future__ import annotations

from dataclasses import dataclass

from controller.db.pool import Pool, one


@dataclass(frozen=True, kw_only=True)
class PgAdmission:
    """`per_second` and `concurrent` 0: without that limit."""

    pool: Pool
    provider: str
    per_second: float
    concurrent: int

    def wait(self, fence: int) -> float:
        """See ports.Admission."""
        if not self.per_second and not self.concurrent:
            return 0.0
        row = one(
            self.pool,
            "admit_sandbox",
            provider=self.provider,
            fence=fence,
            per_second=self.per_second,
            concurrent=self.concurrent,
        )
        assert row is not None
        return float(row["seconds"])
