"""The product's own numbers: one Intent at a time, many at once, one with many tasks, and none at all."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devcluster.bench.people import HELLO, NAMESPACE, Timed, moments, people
from devcluster.errors import DevclusterError
from devcluster.stack import Stack
from devcluster.trial.api import Api, now
from devcluster.trial.costs import CPUS, Meter, Spent
from devcluster.trial.numbers import Row, grown, latency_rows, net, percentile, rate
from devcluster.trial.progress import say

IDLE_SECONDS = 8.0

# ------------------------------------------------------------------ nothing to do


@dataclass(frozen=True)
class Idle:
    """What a controller with nothing to do costs."""

    rows: list[Row]
    commits_per_s: float


def idle(meter: Meter) -> Idle:
    """Processor and commits over some seconds, after start-up has settled."""
    before = meter.settled()
    time.sleep(IDLE_SECONDS)
    spent = meter.read().minus(before)
    commits = rate(spent.commits, spent.at)
    note = f"{IDLE_SECONDS:.0f} s with no Intent"
    cpu = 100 * rate(spent.cpu["controller"], spent.at)
    return Idle(
        [
            Row(key="idle_cpu_percent", what="idle controller: processor", value=cpu, unit="%", note=note),
            Row(
                key="idle_commits_per_s", what="idle controller: database commits", value=commits, unit="/s", note=note
            ),
            Row(
                key="idle_rss_mib",
                what="idle controller: memory (RSS)",
                value=meter.memory_mib(),
                unit="MiB",
                note=note,
            ),
        ],
        commits,
    )


# ------------------------------------------------------------------ one at a time


def latency(stack: Stack, *, runs: int, seed: int) -> list[Row]:
    """apply → WaitingInput and approve → Succeeded, with a random pause before each, as people leave."""
    took = asyncio.run(_one_at_a_time(stack, runs, random.Random(seed)))
    db = moments(stack, took)
    pairs = list(zip(took, db, strict=True))
    return [
        *latency_rows("apply", "apply → WaitingInput", [t.waiting - t.applied for t in took], goals=(150, 400)),
        _part("apply_row", "create → the run's row and first workflow", [d.queued - t.applied for t, d in pairs]),
        _part("apply_dequeue", "→ RunIntentWF dequeued", [d.begun - d.queued for d in db]),
        _part("apply_plan", "→ planned (three steps)", [d.planned - d.begun for d in db]),
        _part("apply_show", "→ PlanApproval created, status seen", [t.waiting - d.planned for t, d in pairs]),
        *latency_rows("approve", "approve patch → Succeeded", [t.done - t.voted for t in took], goals=(200, 500)),
        _part("approve_consume", "patch → quorum checked and consumed", [d.approved - t.voted for t, d in pairs]),
        _part(
            "approve_start", "→ ExecutePlanWF, TaskWF dequeued, task begins", [d.first_task - d.approved for d in db]
        ),
        _part("approve_task", "→ task done (mock)", [d.last_task - d.first_task for d in db]),
        _part("approve_finish", "→ FinishWF dequeued, run closed", [d.closed - d.last_task for d in db]),
        _part("approve_show", "→ status seen", [t.done - d.closed for t, d in pairs]),
        Row(
            key="kubectl_apply_ms", what="kubectl apply by itself, once", value=_kubectl_apply(stack) * 1000, unit="ms"
        ),
    ]


def _part(key: str, what: str, seconds: Sequence[float]) -> Row:
    return Row(key=f"{key}_p50_ms", what=f"  {what}, p50", value=percentile(seconds, 50) * 1000, unit="ms")


async def _one_at_a_time(stack: Stack, runs: int, chance: random.Random) -> list[Timed]:
    took = []
    async with people(stack) as p:
        await p.approve(await p.apply("warm-up"))
        for n in range(runs):
            await asyncio.sleep(chance.random())
            one = await p.apply(f"single{n}")
            await asyncio.sleep(chance.random())
            took.append(await p.approve(one))
            if (n + 1) % 10 == 0:
                say(f"  {n + 1} of {runs}")
    return took


def _kubectl_apply(stack: Stack) -> float:
    body = {
        "apiVersion": "sisukodo.dev/v1alpha1",
        "kind": "Intent",
        "metadata": {"name": "kubectl"},
        "spec": {"goal": HELLO},
    }
    stack.kubectl("get", "intents", "-n", NAMESPACE, user="carol")  # its discovery cache is there from now on
    began = now()
    stack.kubectl("apply", "-n", NAMESPACE, "-f", "-", user="carol", stdin=json.dumps(body))
    return now() - began


# ------------------------------------------------------------------ many at once


@dataclass(frozen=True)
class Measured:
    """Rows for the table, and details for --json."""

    rows: list[Row]
    details: Mapping[str, Any]


def throughput(stack: Stack, meter: Meter, *, intents: int, idle_commits: float) -> Measured:
    """All applied at once, each approved as soon as it is seen waiting."""
    before = meter.settled()
    took, requests = asyncio.run(_all_at_once(stack, intents))
    loaded = meter.read().minus(before)
    spent = meter.settled().minus(before)
    moments(stack, took)
    per_s = rate(intents, max(t.done for t in took) - min(t.applied for t in took))
    commits = net(spent.commits, idle_rate=idle_commits, seconds=spent.at) / intents
    ids, calls = spent.transaction_ids / intents, sum(requests.values()) / intents
    ceiling = CPUS * intents / sum(loaded.cpu.values())
    note = "net of idle; reads count, subtransactions do not"
    title, allowed = f"{intents} intents, end to end", "  what these processors allow at that cost"
    rows = [
        Row(key="intents_per_s", what=title, value=per_s, unit="/s", goal=15, at_least=True),
        Row(key="commits_per_intent", what="  database commits per intent", value=commits, goal=40, note=note),
        Row(
            key="xids_per_intent",
            what="  transaction ids per intent",
            value=ids,
            note="writes and their subtransactions",
        ),
        Row(key="requests_per_intent", what="  API requests per intent", value=calls, note="2 are the people's"),
        *_cpu_rows(loaded, intents, per="intent", key="intents"),
        Row(key="intents_ceiling_per_s", what=allowed, value=ceiling, unit="/s", note="nobody else on the machine"),
    ]
    per = {kind: round(n / intents, 2) for kind, n in sorted(requests.items(), key=lambda item: -item[1])}
    return Measured(rows, {"requests_per_intent": per})


def _cpu_rows(spent: Spent, count: int, *, per: str, key: str) -> list[Row]:
    """Processor time of all of it, and of each process that matters."""
    total = sum(spent.cpu.values())
    rows = [
        Row(
            key=f"{key}_cpu_ms",
            what=f"  processor time per {per}",
            value=1000 * total / count,
            unit="ms",
            note=spent.shares,
        )
    ]
    for name, used in sorted(spent.cpu.items(), key=lambda item: -item[1]):
        if used > 0.05 * total:
            cpu = f"{key}_cpu_{name.replace(' ', '_')}_ms"
            rows.append(Row(key=cpu, what=f"    {name}", value=1000 * used / count, unit="ms"))
    return rows


async def _all_at_once(stack: Stack, intents: int) -> tuple[list[Timed], dict[str, float]]:
    async with Api(stack.kubeconfig("admin")) as admin, people(stack) as p:
        before = await admin.requests()

        async def one(name: str) -> Timed:
            return await p.approve(await p.apply(name))

        took = await asyncio.gather(*(one(f"many{n}") for n in range(intents)))
        await asyncio.sleep(1)  # the last finalizers and approval statuses
        return took, grown(before, await admin.requests())


# ------------------------------------------------------------------ one with many tasks


def fan_out(stack: Stack, meter: Meter, *, tasks: int, parallelism: int, idle_commits: float, bare: float) -> list[Row]:
    """One Intent of many tasks, from its approval to its end. `bare` is the one-step queue rate of the same run."""
    one, shown, loaded, spent = asyncio.run(_fan_out(stack, meter, tasks, parallelism))
    (at,) = moments(stack, [one])
    if at.tasks != tasks:
        raise DevclusterError(f"{one.name}: {at.tasks} of {tasks} tasks count once")
    key, per_s = f"fanout_{parallelism}", rate(tasks, at.closed - at.approved)
    commits = net(spent.commits, idle_rate=idle_commits, seconds=spent.at) / tasks
    executing, seen = rate(tasks, at.last_task - at.first_task), rate(tasks, one.done - one.voted)
    ratio, title = per_s / bare, f"fan-out of {tasks}, parallelism {parallelism}"
    return [
        Row(key=f"{key}_per_s", what=title, value=per_s, unit="tasks/s", note="approved → closed, by SQL"),
        Row(key=f"{key}_ratio", what="  ratio to the bare one-step rate", value=ratio, unit="×", goal=2, at_least=True),
        Row(key=f"{key}_execution_per_s", what="  first task begun → last task done", value=executing, unit="tasks/s"),
        Row(key=f"{key}_wall_per_s", what="  approve patch → Succeeded seen", value=seen, unit="tasks/s"),
        Row(key=f"{key}_commits", what="  database commits per task", value=commits, goal=2, note="net of idle"),
        Row(key=f"{key}_versions", what="  versions of the Intent meanwhile", value=shown),
        *_cpu_rows(loaded, tasks, per="task", key=key),
    ]


async def _fan_out(stack: Stack, meter: Meter, tasks: int, parallelism: int) -> tuple[Timed, int, Spent, Spent]:
    """Its moments, how often its status was written, what was spent until the end, and again with every commit reported."""
    async with people(stack) as p:
        # More minutes than all slots could use up: nobody has to count them.
        limits = {"maxTasks": tasks, "parallelism": parallelism, "maxSandboxMinutes": 1000}
        one = await p.apply(f"fan-out-{parallelism}", f"run {tasks} small checks", limits=limits)
        before = await asyncio.to_thread(meter.settled)
        shown = p.versions(one)
        await p.approve(one)
        shown, loaded = p.versions(one) - shown, meter.read().minus(before)
        return one, shown, loaded, (await asyncio.to_thread(meter.settled)).minus(before)
