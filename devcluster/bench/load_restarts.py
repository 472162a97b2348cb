"""API server and PostgreSQL are killed and started again while Intents are in flight: what it costs, and that nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from devcluster.bench.crowd import crowd
from devcluster.bench.evidence import exactly_once, log_events, peak_mib
from devcluster.bench.faults import restart_api_server, restart_postgres
from devcluster.bench.people import Timed
from devcluster.errors import DevclusterError
from devcluster.processes import tail
from devcluster.stack import Controller, Stack
from devcluster.trial.api import now
from devcluster.trial.numbers import Row
from devcluster.trial.progress import say

NAMESPACE = "load-restarts"
PATIENCE = 300.0
MOVED = """
SELECT extract(epoch FROM min(at) FILTER (WHERE at > to_timestamp(%(back)s)))::float,
       count(*) FILTER (WHERE at BETWEEN to_timestamp(%(began)s) AND to_timestamp(%(back)s)) FROM app.run_transitions"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One restart: seconds since 1970, and what of the Intents had succeeded when it began."""

    what: str
    began: float
    back: float
    done_before: int


def measure(stack: Stack, *, intents: int, settings: Mapping[str, str]) -> tuple[str, list[Row], dict[str, Any]]:
    """Heading, rows and details. Raises where an outcome was wrong, or the controller had to be started again."""
    starts = stack.state / "starts"
    controller = stack.controller(**{"SBX_START_LOG": str(starts), "LOG_FORMAT": "json", **settings})
    try:
        stack.kubectl("create", "namespace", NAMESPACE)
        faults, news, seconds = asyncio.run(_run(stack, controller, intents))
        repeated = exactly_once(stack.database, starts, runs=intents)
        events = log_events(controller.log, "ERROR", "CRITICAL", "WARNING")
        rows = [row for fault in faults for row in _fault_rows(stack, fault, news)]
        rows += [
            Row(key="restarts_total_s", what="first apply → last Succeeded", value=seconds, unit="s"),
            Row(
                key="restarts_repeated",
                what="starts whose outcome did not count",
                value=repeated,
                note="fenced off by a newer attempt",
            ),
            *_log_rows(events),
            Row(
                key="restarts_rss_peak_mib",
                what="controller, peak: memory (RSS)",
                value=peak_mib(controller),
                unit="MiB",
            ),
        ]
        return f"{intents} intents in flight, two restarts", rows, {"log": dict(events)}
    except Exception:
        say(f"the end of the controller's log:\n{tail(controller.log, 15)}")
        raise
    finally:
        controller.stop()


async def _run(stack: Stack, controller: Controller, intents: int) -> tuple[list[Fault], list[float], float]:
    """Two thirds are applied at once, the last third while the API server is away; each is approved as soon as it is seen waiting."""
    done: list[Timed] = []
    late = asyncio.Event()
    async with crowd(stack, NAMESPACE, patience=PATIENCE) as people:

        async def story(n: int) -> None:
            if n % 3 == 0:
                await late.wait()
            done.append(await people.story(f"restart{n}"))

        say(f"{intents} intents, each approved as soon as it is seen waiting")
        began = now()
        stories = asyncio.gather(*(story(n) for n in range(intents)))
        running = asyncio.ensure_future(_unless_it_ends(controller, stories))
        await _until(done, intents // 5, running)
        first = _fault(stack, done, "API server", restart_api_server)
        late.set()
        await _until(done, intents * 7 // 10, running)
        second = _fault(stack, done, "PostgreSQL", restart_postgres)
        await running
        return [first, second], people.seen.news(), now() - began


async def _unless_it_ends(controller: Controller, stories: asyncio.Future[Any]) -> None:
    """Nothing would move any more, and everybody wait in vain."""
    while not stories.done():
        if not controller.child.alive():
            stories.cancel()
            raise DevclusterError("the controller ended")
        await asyncio.wait([stories], timeout=1.0)
    stories.result()


async def _until(done: Sequence[Timed], count: int, running: asyncio.Future[Any]) -> None:
    while len(done) < count:
        if running.done():
            running.result()
        await asyncio.sleep(0.05)


def _fault(stack: Stack, done: Sequence[Timed], what: str, restart: Callable[[Stack], float]) -> Fault:
    """The event loop, and so the people, stand still meanwhile."""
    before, began = len(done), now()
    say(f"  {before} seen as succeeded; {what} is killed")
    away = restart(stack)
    say(f"  {what} is back after {away:.1f} s")
    return Fault(what=what, began=began, back=began + away, done_before=before)


def _fault_rows(stack: Stack, fault: Fault, news: list[float]) -> list[Row]:
    key = fault.what.lower().replace(" ", "_")
    with psycopg.connect(stack.database, autocommit=True) as c:
        row = c.execute(MOVED, {"began": fault.began, "back": fault.back}).fetchone()
    shown = [at for at in news if at > fault.back]
    if row is None or row[0] is None or not shown:
        raise DevclusterError(f"nothing moved after the restart of {fault.what}")
    return [
        Row(
            key=f"{key}_away_s",
            what=f"{fault.what}: killed → answers again",
            value=fault.back - fault.began,
            unit="s",
            note=f"with {fault.done_before} succeeded; {row[1]} transitions committed meanwhile",
        ),
        Row(key=f"{key}_moved_s", what="  answers → next transition committed", value=row[0] - fault.back, unit="s"),
        Row(key=f"{key}_shown_s", what="  answers → next phase seen by a watch", value=shown[0] - fault.back, unit="s"),
    ]


def _log_rows(events: Mapping[str, int]) -> list[Row]:
    errors = {name: n for name, n in events.items() if not name.startswith("WARNING")}
    most = sorted(events.items(), key=lambda item: -item[1])[:4]
    note = "; ".join(f"{n} × {name}" for name, n in most)
    return [
        Row(key="restarts_errors", what="log lines: ERROR", value=sum(errors.values())),
        Row(
            key="restarts_warnings",
            what="log lines: WARNING",
            value=sum(events.values()) - sum(errors.values()),
            note=note,
        ),
    ]
