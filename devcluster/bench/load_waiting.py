"""10,000 plans that wait for people: what they cost while nothing happens, and what a controller that starts or looks again needs."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import psycopg

from devcluster.bench.copies import copy_rows, create, four_kib_fixtures
from devcluster.bench.crowd import crowd
from devcluster.bench.evidence import log_events, metric, peak_mib
from devcluster.bench.people import Timed
from devcluster.errors import DevclusterError
from devcluster.stack import Controller, Stack
from devcluster.trial.api import RESOURCES, Api
from devcluster.trial.costs import Meter, Spent
from devcluster.trial.numbers import Row, grown, percentile, rate
from devcluster.trial.progress import say

NAMESPACE = "load-waiting"
GOAL_MIB = 400
PATIENCE = 600.0
BACKLOG, LOOKS = "sisukodo_reconcile_backlog", "sisukodo_resync_duration_seconds_count"
LACKING = "SELECT count(*) FROM app.runs WHERE status <> 'waiting_input' OR approval_uid IS NULL"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many wait, how many of them the product plans itself, how long it is watched, how many are approved meanwhile."""

    waiting: int = 10_000
    planned: int = 200
    idle_seconds: float = 60.0
    votes: int = 20
    resync_seconds: int = 300

    def with_counts(self, *, waiting: int | None, planned: int | None) -> Sizes:
        """Other counts where they are given."""
        total = waiting or self.waiting
        return replace(self, waiting=total, planned=min(planned or self.planned, total))


QUICK = Sizes(waiting=500, planned=50, idle_seconds=15.0, votes=6, resync_seconds=60)


def measure(stack: Stack, *, sizes: Sizes, settings: Mapping[str, str]) -> tuple[str, list[Row], dict[str, Any]]:
    """Heading, rows and details. Raises where an outcome was wrong."""
    fixtures = four_kib_fixtures(stack.state / "fixtures")
    wanted = {
        "OC_FIXTURES": str(fixtures),
        "LOG_FORMAT": "json",
        "RESYNC_SECONDS": str(sizes.resync_seconds),
        **settings,
    }
    stack.kubectl("create", "namespace", NAMESPACE)
    rows = _fill(stack, sizes, wanted)
    vote = asyncio.run(_waiting_names(stack, sizes.waiting))
    starting = _Starting(stack, {**wanted, "POD_NAME": "controller"}, sizes)
    try:
        rows += starting.rows(vote.pop())
        meter = Meter(stack, starting.controller)
        try:
            rest = asyncio.run(_rest(stack, meter, sizes))
            rows += rest.rows
            rows += asyncio.run(_votes(stack, sizes, vote))
            rows += _resync(starting.controller, meter, sizes, rest.spent)
        finally:
            meter.close()
        rows.append(_memory("waiting_rss_peak_mib", "controller, peak: memory (RSS)", peak_mib(starting.controller)))
    finally:
        starting.controller.stop()
    events = log_events(starting.controller.log, "ERROR", "WARNING", "CRITICAL")
    return f"{sizes.waiting} waiting intents, plans of 4 KiB", rows, {"log": dict(events)}


# ------------------------------------------------------------------ getting them there


def _fill(stack: Stack, sizes: Sizes, settings: Mapping[str, str]) -> list[Row]:
    """The first ones as people and product make them; for the rest, rows are copied and the controller does what is its own."""
    say(f"  {sizes.planned} intents are applied and planned")
    controller = stack.controller(name="filling", **{**settings, "POD_NAME": "controller"})
    try:
        took = asyncio.run(_plan(stack, sizes.planned))
    finally:
        controller.stop()
    seconds = max(t.waiting for t in took) - min(t.applied for t in took)
    rows = [
        Row(
            key="waiting_planned_per_s",
            what="apply → WaitingInput, all at once",
            value=rate(len(took), seconds),
            unit="/s",
        )
    ]
    rest = sizes.waiting - sizes.planned
    if rest == 0:
        return rows
    began = time.monotonic()
    uids = asyncio.run(create(stack, NAMESPACE, [f"copy{n}" for n in range(rest)]))
    created = time.monotonic() - began
    copy_rows(stack.database, took[0].uid, uids)
    say(
        f"  {rest} intents created in {created:.0f} s, rows copied; the controller makes their PlanApprovals and statuses"
    )
    began = time.monotonic()
    controller = stack.controller(name="catching-up", **{**settings, "POD_NAME": "controller"})
    try:
        _until_recorded(stack, controller, sizes.waiting)
        _until_drained(controller)
        per_s = rate(rest, time.monotonic() - began)
    finally:
        controller.stop()
    note = (
        f"{rest} of {sizes.waiting}: their rows are copies, their PlanApprovals and statuses the controller's own work"
    )
    return [
        *rows,
        Row(key="waiting_caught_up_per_s", what="PlanApproval and statuses made", value=per_s, unit="/s", note=note),
    ]


async def _plan(stack: Stack, count: int) -> list[Timed]:
    async with crowd(stack, NAMESPACE, patience=PATIENCE) as people:

        async def one(name: str) -> Timed:
            return await people.planned(await people.apply(name))

        return await asyncio.gather(*(one(f"planned{n}") for n in range(count)))


def _until_recorded(stack: Stack, controller: Controller, total: int) -> None:
    began = said = time.monotonic()
    with psycopg.connect(stack.database, autocommit=True) as c:
        while lacking := (c.execute(LACKING).fetchone() or (0,))[0]:
            if not controller.child.alive() or time.monotonic() - began > 2 * PATIENCE:
                raise DevclusterError(f"{lacking} of {total} runs still lack their PlanApproval; see {controller.log}")
            if time.monotonic() - said > 20:
                said = time.monotonic()
                say(f"    {total - lacking} of {total}")
            time.sleep(0.5)


def _until_drained(controller: Controller, looks: float = 1) -> None:
    """Until everything was listed so many times, and nothing waits to be looked at."""
    deadline = time.monotonic() + PATIENCE
    quiet = 0
    while quiet < 3:
        done = metric(controller, LOOKS) >= looks and metric(controller, BACKLOG) == 0
        quiet = quiet + 1 if done else 0
        if time.monotonic() > deadline:
            raise DevclusterError("the controller does not come to rest")
        time.sleep(0.25)


async def _waiting_names(stack: Stack, expected: int) -> list[tuple[str, str]]:
    """(name, PlanApproval) of all, shuffled by a fixed seed. Raises unless every Intent shows that it waits."""
    found, phases = [], Counter[str]()
    async with Api(stack.kubeconfig("admin")) as admin:
        async for page in admin.pages(f"{RESOURCES}/namespaces/{NAMESPACE}/intents"):
            for obj in page["items"]:
                status = obj.get("status") or {}
                phases[status.get("phase", "none")] += 1
                found.append((obj["metadata"]["name"], str((status.get("plan") or {}).get("approvalName"))))
    if phases != {"WaitingInput": expected}:
        raise DevclusterError(f"instead of {expected} waiting Intents there are {dict(phases)}")
    random.Random(42).shuffle(found)
    return found


# ------------------------------------------------------------------ a controller starts


class _Starting:
    """A new controller on all of them, and a vote at that moment."""

    def __init__(self, stack: Stack, settings: Mapping[str, str], sizes: Sizes) -> None:
        self._stack, self._sizes = stack, sizes
        say("  a new controller starts on them")
        self._began = time.monotonic()
        self.controller = stack.controller(**settings)
        self._ready = time.monotonic() - self._began

    def rows(self, voted: tuple[str, str]) -> list[Row]:
        """How long until it is ready, until one vote was carried out, until it has looked at everything; its memory then."""
        (took,) = asyncio.run(_approve(self._stack, [voted]))
        _until_drained(self.controller)
        whole = time.monotonic() - self._began
        cpu = sum(_cpu(self.controller))
        return [
            Row(key="waiting_start_ready_s", what="a controller starts: /readyz", value=self._ready, unit="s"),
            Row(key="waiting_start_vote_s", what="  a vote then → Succeeded", value=took, unit="s"),
            Row(key="waiting_start_pass_s", what="  start → everything looked at", value=whole, unit="s"),
            Row(key="waiting_start_cpu_s", what="  processor time of the controller", value=cpu, unit="s"),
        ]


def _cpu(controller: Controller) -> tuple[float, float]:
    spent = psutil.Process(controller.child.pid).cpu_times()
    return spent.user, spent.system


# ------------------------------------------------------------------ nothing happens


@dataclass(frozen=True)
class _Rest:
    rows: list[Row]
    spent: Spent


async def _rest(stack: Stack, meter: Meter, sizes: Sizes) -> _Rest:
    say(f"  nothing happens for {sizes.idle_seconds:.0f} s")
    async with Api(stack.kubeconfig("admin")) as admin:
        before, asked = await asyncio.to_thread(meter.settled), await admin.requests()
        await asyncio.sleep(sizes.idle_seconds)
        answered = grown(asked, await admin.requests())
        spent = meter.read().minus(before)
    note = f"{sizes.idle_seconds:.0f} s"
    cpu, calls = 100 * rate(spent.cpu["controller"], spent.at), sum(answered.values())
    return _Rest(
        [
            _memory("waiting_rss_mib", "at rest, controller: memory (RSS)", meter.memory_mib(), goal=GOAL_MIB),
            Row(key="waiting_cpu_percent", what="  controller: processor", value=cpu, unit="%", note=note),
            Row(
                key="waiting_commits_per_s",
                what="  database commits",
                value=rate(spent.commits, spent.at),
                unit="/s",
                note=note,
            ),
            Row(
                key="waiting_requests_per_s",
                what="  API requests",
                value=rate(calls, spent.at),
                unit="/s",
                note=", ".join(f"{n:.0f} × {what}" for what, n in answered.items()) or "none but watches and leases",
            ),
        ],
        spent,
    )


def _memory(key: str, what: str, value: float, goal: float | None = None) -> Row:
    return Row(key=key, what=what, value=value, unit="MiB", goal=goal)


# ------------------------------------------------------------------ somebody votes


async def _votes(stack: Stack, sizes: Sizes, vote: list[tuple[str, str]]) -> list[Row]:
    say(f"  {sizes.votes} of them are approved, one after the other")
    took = await _approve(stack, [vote.pop() for _ in range(sizes.votes)])
    return [
        Row(
            key=f"waiting_vote_p{percent}_ms",
            what=f"approve patch → Succeeded, the others wait, p{percent}",
            value=1000 * percentile(took, percent),
            unit="ms",
            note=f"n={len(took)}",
        )
        for percent in (50, 95)
    ]


async def _approve(stack: Stack, which: Sequence[tuple[str, str]]) -> list[float]:
    took = []
    async with crowd(stack, NAMESPACE, patience=PATIENCE) as people:
        for name, approval in which:
            done = await people.approve(Timed(name=name, approval=approval))
            took.append(done.done - done.voted)
    return took


# ------------------------------------------------------------------ it looks at everything again


def _resync(controller: Controller, meter: Meter, sizes: Sizes, rest: Spent) -> list[Row]:
    say(f"  waiting for the periodic resync (every {sizes.resync_seconds} s)")
    before, looks, deadline = (
        meter.read(),
        metric(controller, LOOKS),
        time.monotonic() + sizes.resync_seconds + PATIENCE,
    )
    while metric(controller, LOOKS) == looks:  # counted when the listing is through
        if time.monotonic() > deadline:
            raise DevclusterError("no resync came")
        time.sleep(1)
    listed = time.monotonic()
    _until_drained(controller)
    drained = time.monotonic() - listed
    spent = meter.read().minus(before)
    cpu = max(0.0, spent.cpu["controller"] - spent.at * rate(rest.cpu["controller"], rest.at))
    listing = metric(controller, "sisukodo_resync_duration_seconds_sum") / metric(controller, LOOKS)
    return [
        Row(key="waiting_resync_list_s", what="resync: listing, mean", value=listing, unit="s"),
        Row(key="waiting_resync_pass_s", what="  listed → everything looked at", value=drained, unit="s"),
        Row(
            key="waiting_resync_cpu_s",
            what="  processor time of the controller",
            value=cpu,
            unit="s",
            note=f"beyond rest, while waiting for it; {100 * cpu / sizes.resync_seconds:.1f} % on average",
        ),
    ]
