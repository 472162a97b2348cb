"""LeaseStore over PostgreSQL: executor leases on the database's clock, and the repair pass of the sweeper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import psycopg
from psycopg.rows import DictRow

from controller.db.pool import SQL, Pool, change, rows, transaction


class PgLeaseStore:
    """The sweep runs under a transaction-level advisory lock, so one process at a time repairs."""

    def __init__(self, pool: Pool, *, app_version: str) -> None:
        self._pool = pool
        self._version = app_version

    def take(self, executor: str, *, ttl: float) -> None:
        change(self._pool, "take_lease", executor=executor, ttl=ttl)

    def renew(self, executor: str, *, ttl: float) -> bool:
        return change(self._pool, "renew_lease", executor=executor, ttl=ttl) == 1

    def release(self, executor: str) -> None:
        change(self._pool, "release", executor=executor)

    def sweep(self, recover: Callable[[Sequence[str]], None]) -> Mapping[str, int]:
        def body(c: psycopg.Connection[DictRow]) -> Mapping[str, int]:
            locked = c.execute(SQL["try_sweep_lock"]).fetchone()
            if locked is None or not locked["ok"]:
                return {}
            dead = [str(r["executor_id"]) for r in c.execute(SQL["dead_executors"]).fetchall()]
            if dead:
                recover(dead)
            return self._repair()

        return transaction(self._pool, body)

    def live_attempts(self, fences: Sequence[int]) -> frozenset[int]:
        found = rows(self._pool, "live_attempts", fences=list(fences))
        return frozenset(int(row["fence"]) for row in found)

    def _repair(self) -> Mapping[str, int]:
        did = {"coordinators": 0, "tasks": 0, "topped_up": 0, "closed": 0, "canceled": 0}

        def body(c: psycopg.Connection[DictRow]) -> None:
            for row in c.execute(SQL["repairable"]).fetchall():
                p = {"run_id": row["run_id"], "version": self._version}
                with c.transaction():
                    run = c.execute(SQL["lock_run"], p).fetchone()
                    did["coordinators"] += _n(c, "redispatch_coordinator", p)
                    did["tasks"] += _n(c, "redispatch_lost", p)
                    if run is not None and run["total"] > 0:  # before ExecutePlanWF has hashed the bytes nothing begins
                        did["topped_up"] += _n(c, "top_up", p, column="enqueued")
                    did["closed"] += _n(c, "close_empty", p, column="closed")

        # Own connection: the sweep's transaction only holds the lock, and each run is repaired and committed by itself.
        with self._pool.connection() as c:
            body(c)
        return did


def _n(c: psycopg.Connection[DictRow], name: str, params: Mapping[str, object], *, column: str = "n") -> int:
    row = c.execute(SQL[name], params).fetchone()
    return 0 if row is None else int(row[column])
