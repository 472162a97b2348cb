"""The machine's own limits, in the same run: what one write to the API server and one commit of PostgreSQL take. No controller runs yet."""

from __future__ import annotations

import asyncio
import time

import psycopg

from devcluster.stack import Stack
from devcluster.trial.api import RESOURCES, Api, Phases, now
from devcluster.trial.numbers import Row, latency_rows, rate

NAMESPACE = "bench-machine"
IN_FLIGHT = 16


def api_server(stack: Stack, *, count: int) -> list[Row]:
    """Creating small Intents, which nobody looks at: one at a time, then 16 in flight."""
    stack.kubectl("create", "namespace", NAMESPACE)
    rows = asyncio.run(_creates(stack, count))
    stack.kubectl("delete", "namespace", NAMESPACE, "--wait=true", "--timeout=60s")
    return rows


async def _creates(stack: Stack, count: int) -> list[Row]:
    spec = {"goal": "measure the API server", "suspend": True}
    async with (
        Api(stack.kubeconfig("carol")) as carol,
        Api(stack.kubeconfig("admin")) as admin,
        Phases(admin, NAMESPACE) as seen,
    ):
        created, shown = [], []
        for n in range(-10, count):  # the first ten are to warm up
            began = now()
            await carol.create_intent(NAMESPACE, f"one{n + 10}", spec)
            took = now() - began
            sight = await seen.wait(f"one{n + 10}", "")
            if n >= 0:
                created.append(took)
                shown.append(sight.at - began)
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(name: str) -> None:
            async with slots:
                await carol.create_intent(NAMESPACE, name, spec)

        began = now()
        await asyncio.gather(*(one(f"many{n}") for n in range(3 * count)))
        many = now() - began
        await admin.send("DELETE", f"{RESOURCES}/namespaces/{NAMESPACE}/intents")
    return [
        *latency_rows("api_create", "API server: create of a small Intent", created),
        *latency_rows("api_watch", "API server: create → its watch event", shown),
        Row(
            key="api_creates_per_s",
            what=f"API server: creates, {IN_FLIGHT} in flight",
            value=rate(3 * count, many),
            unit="/s",
        ),
    ]


def postgres(stack: Stack, *, count: int) -> list[Row]:
    """Single-row INSERTs, each its own commit, one at a time; fsync is on."""
    assert stack.postgres is not None
    took = []
    with psycopg.connect(stack.postgres.create_database("bench_commit"), autocommit=True) as c:
        c.execute("CREATE TABLE one (n int)")
        for n in range(count + 20):
            began = time.perf_counter()
            c.execute("INSERT INTO one VALUES (%s)", (n,))
            took.append(time.perf_counter() - began)
        shown = c.execute("SHOW fsync").fetchone()
    assert shown == ("on",), "the numbers are worth nothing without fsync"
    return latency_rows("pg_commit", "PostgreSQL: single-row INSERT, committed", took[20:])
