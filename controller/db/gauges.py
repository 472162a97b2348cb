"""Numbers for Prometheus that only SQL knows. Asked at scrape time, by the leader alone."""

from __future__ import annotations

from dataclasses import dataclass

from controller.db.pool import Pool, rows


@dataclass(frozen=True, kw_only=True)
class Gauges:
    """(queue, status) → depth; queue → oldest seconds; status → runs and oldest seconds; version → stranded workflows."""

    depth: dict[tuple[str, str], int]
    oldest: dict[str, float]
    runs: dict[str, int]
    run_age: dict[str, float]
    stranded: dict[str, int]


def read(pool: Pool, *, app_version: str) -> Gauges:
    """One round trip per kind."""
    queues = rows(pool, "gauge_queues")
    runs = rows(pool, "gauge_runs")
    waiting = [r for r in queues if r["status"] == "ENQUEUED"]
    return Gauges(
        depth={(r["queue"], r["status"]): r["depth"] for r in queues},
        oldest={r["queue"]: r["oldest"] for r in waiting},
        runs={r["status"]: r["n"] for r in runs},
        run_age={r["status"]: r["oldest"] for r in runs},
        stranded={r["version"]: r["n"] for r in rows(pool, "gauge_stranded", version=app_version)},
    )
