"""1,000 Intents at once: status lag from inside and from outside, throughput, memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

from devcluster.bench.crowd import crowd
from devcluster.bench.evidence import bucket, exactly_once, log_events, peak_mib
from devcluster.bench.people import Timed
from devcluster.errors import DevclusterError
from devcluster.stack import Controller, Stack
from devcluster.trial.api import Phases
from devcluster.trial.costs import Meter
from devcluster.trial.numbers import Row, percentile, rate
from devcluster.trial.progress import say

NAMESPACE = "load-many"
PATIENCE = 600.0
LAG = "sisukodo_status_lag_seconds"
# When each run first reached a phase that people wait for: the moment that its Intent's status should show.
REACHED = """
SELECT i.name, t.status, extract(epoch FROM min(t.at))::float FROM app.run_transitions t
  JOIN app.runs r ON r.id = t.run_id JOIN app.intents i ON i.id = r.intent_id
 WHERE t.status IN ('waiting_input','succeeded') GROUP BY 1, 2"""
PHASES = {"waiting_input": "WaitingInput", "succeeded": "Succeeded"}


def measure(stack: Stack, *, intents: int, settings: Mapping[str, str]) -> tuple[str, list[Row], dict[str, Any]]:
    """Heading, rows and details. Raises where an outcome was wrong."""
    starts = stack.state / "starts"
    controller = stack.controller(**{"SBX_START_LOG": str(starts), "LOG_FORMAT": "json", **settings})
    meter = Meter(stack, controller)
    try:
        stack.kubectl("create", "namespace", NAMESPACE)
        rest, before = meter.memory_mib(), meter.read()
        took, lags, told = asyncio.run(_all(stack, intents))
        busy = meter.read().minus(before)
        exactly_once(stack.database, starts, runs=intents)
        if not controller.child.alive():
            raise DevclusterError("the controller ended")
        end = meter.memory_mib()
        rows = [*_lag_rows(lags, controller), *_rate_rows(took, told), *_memory_rows(controller, rest, end)]
        cpu = 1000 * sum(busy.cpu.values()) / intents
        rows.append(Row(key="many_cpu_ms", what="processor time per intent", value=cpu, unit="ms", note=busy.shares))
        return f"{intents} intents at once", rows, {"log": log_events(controller.log, "ERROR", "WARNING", "CRITICAL")}
    finally:
        meter.close()
        controller.stop()


async def _all(stack: Stack, intents: int) -> tuple[list[Timed], dict[str, list[float]], list[float]]:
    """Everybody's moments, the lags by phase, and how long each new Intent had no status at all."""
    async with crowd(stack, NAMESPACE, patience=PATIENCE) as people:
        say(f"{intents} intents at once, each approved as soon as it is seen waiting")
        telling = asyncio.create_task(_tell(stack, intents))
        took = await asyncio.gather(*(people.story(f"many{n}") for n in range(intents)))
        telling.cancel()
        return took, _lags(stack, people.seen), [people.seen.told(t.name) - t.applied for t in took]


async def _tell(stack: Stack, intents: int) -> None:
    while True:
        await asyncio.sleep(20)
        with psycopg.connect(stack.database, autocommit=True) as c:
            found = c.execute("SELECT status, count(*) FROM app.runs GROUP BY 1 ORDER BY 1").fetchall()
        say("  " + ", ".join(f"{n} {status}" for status, n in found) + f" of {intents}")


def _lags(stack: Stack, seen: Phases) -> dict[str, list[float]]:
    """Seconds from a run's transition in the database to the first sight of that phase, by phase."""
    lags: dict[str, list[float]] = {phase: [] for phase in PHASES.values()}
    with psycopg.connect(stack.database, autocommit=True) as c:
        for name, status, at in c.execute(REACHED):
            shown = seen.first(name, PHASES[status])
            if shown is None:
                raise DevclusterError(f"{name} was never seen as {PHASES[status]}")
            lags[PHASES[status]].append(shown - at)
    return lags


def _lag_rows(lags: Mapping[str, Sequence[float]], controller: Controller) -> list[Row]:
    both = [lag for found in lags.values() for lag in found]
    rows = [
        Row(key="many_lag_p50_s", what="status lag seen by a watch, p50", value=percentile(both, 50), unit="s"),
        Row(key="many_lag_p99_s", what="status lag seen by a watch, p99", value=percentile(both, 99), unit="s", goal=5),
    ]
    for phase, found in lags.items():
        key = f"many_lag_{phase.lower()}"
        rows.append(Row(key=f"{key}_p99_s", what=f"  of {phase}, p99", value=percentile(found, 99), unit="s"))
        rows.append(Row(key=f"{key}_max_s", what=f"  of {phase}, longest", value=max(found), unit="s"))
    for percent in (50, 99):
        rows.append(
            Row(
                key=f"many_metric_p{percent}_s",
                what=f"  {LAG}, p{percent} at most",
                value=bucket(controller, LAG, percent),
                unit="s",
                note="upper bound of its bucket; from the run's last change, every status write",
            )
        )
    return rows


def _rate_rows(took: Sequence[Timed], told: Sequence[float]) -> list[Row]:
    seconds = max(t.done for t in took) - min(t.applied for t in took)
    parts = {
        "told": ("apply → first status (Queued)", told),
        "apply": ("apply → WaitingInput", [t.waiting - t.applied for t in took]),
        "approve": ("approve patch → Succeeded", [t.done - t.voted for t in took]),
    }
    rows = [Row(key="many_per_s", what="end to end", value=rate(len(took), seconds), unit="/s")]
    for key, (what, values) in parts.items():
        rows.append(Row(key=f"many_{key}_p50_s", what=f"  {what}, p50", value=percentile(values, 50), unit="s"))
        rows.append(Row(key=f"many_{key}_max_s", what=f"  {what}, longest", value=max(values), unit="s"))
    return rows


def _memory_rows(controller: Controller, rest: float, end: float) -> list[Row]:
    return [
        Row(key="many_rss_rest_mib", what="controller, before: memory (RSS)", value=rest, unit="MiB"),
        Row(key="many_rss_peak_mib", what="controller, peak: memory (RSS)", value=peak_mib(controller), unit="MiB"),
        Row(key="many_rss_end_mib", what="controller, after: memory (RSS)", value=end, unit="MiB"),
    ]
