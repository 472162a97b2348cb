"""What work costs besides time: commits from PostgreSQL's own statistics, processor seconds of every process involved."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import psycopg

from devcluster.stack import Controller, Stack

# PostgreSQL 15 and later: a backend reports its counters at most once per second while busy, and an idle one only
# after 10 s (PGSTAT_IDLE_INTERVAL); pg_stat_force_next_flush() reaches no backend but the caller's own.
SETTLE_SECONDS = 10.6
CPUS = len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Counters at one moment; `minus` is what happened between two. `cpu` is ours by process, `machine_cpu` everybody's."""

    at: float
    machine_cpu: float
    commits: float
    transaction_ids: float
    cpu: Mapping[str, float]

    def minus(self, before: Spent) -> Spent:
        """The difference, field by field."""
        return Spent(
            at=self.at - before.at,
            machine_cpu=self.machine_cpu - before.machine_cpu,
            commits=self.commits - before.commits,
            transaction_ids=self.transaction_ids - before.transaction_ids,
            cpu={name: seconds - before.cpu.get(name, 0.0) for name, seconds in self.cpu.items()},
        )

    @property
    def shares(self) -> str:
        """How busy the machine was, and by whom: a hundred percent is one processor."""
        ours = sum(self.cpu.values())
        others = max(0.0, self.machine_cpu - ours)
        return f"busy: ours {100 * ours / self.at:.0f} %, others {100 * others / self.at:.0f} % of {100 * CPUS} %"


class Meter:
    """Reads from the database `postgres`, so that its own transactions are not counted."""

    def __init__(self, stack: Stack, controller: Controller) -> None:
        assert stack.postgres is not None and stack.postgres.child is not None
        self._connection = psycopg.connect(stack.postgres.dsn_of("postgres"), autocommit=True)
        self._database = psycopg.conninfo.conninfo_to_dict(stack.database)["dbname"]
        self._processes = {
            "controller": psutil.Process(controller.child.pid),
            "PostgreSQL": psutil.Process(stack.postgres.child.pid),
            **{name: psutil.Process(child.pid) for name, child in stack.cluster.children.items()},
        }

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def settled(self) -> Spent:
        """Exact commits: waits until every backend has reported."""
        time.sleep(SETTLE_SECONDS)
        return self.read()

    def read(self) -> Spent:
        """Now; commits of idle backends may still be missing."""
        row = self._connection.execute(
            "SELECT xact_commit, pg_snapshot_xmax(pg_current_snapshot())::text::bigint FROM pg_stat_database WHERE datname = %s",
            (self._database,),
        ).fetchone()
        assert row is not None
        cpu = {name: _seconds(process) for name, process in self._processes.items()}
        own = psutil.Process().cpu_times()  # without its children, which are all of the above
        cpu["bench client"] = own.user + own.system
        everybody = psutil.cpu_times()
        return Spent(
            at=time.monotonic(),
            machine_cpu=everybody.user + everybody.nice + everybody.system + everybody.irq + everybody.softirq,
            commits=float(row[0]),
            transaction_ids=float(row[1]),
            cpu=cpu,
        )

    def memory_mib(self) -> float:
        """Resident memory of the controller."""
        return float(self._processes["controller"].memory_info().rss) / 2**20


def _seconds(process: psutil.Process) -> float:
    """Processor seconds of a process, its living children and those it has buried."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            spent = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total
