"""The people of the bench and what became of their Intents, as their watch and as the database saw it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from devcluster.errors import DevclusterError
from devcluster.stack import Stack
from devcluster.trial.api import Api, Phases, now

NAMESPACE = "bench"
IN_FLIGHT = 16
HELLO = "say hello"
# When the run's row came to be, was dequeued, was planned, was approved, ran its first and last task, was closed: seconds since 1970.
MOMENTS = """
SELECT extract(epoch FROM r.created_at)::float, extract(epoch FROM r.started_at)::float, extract(epoch FROM r.waiting_at)::float,
       (SELECT extract(epoch FROM min(t.at))::float FROM app.run_transitions t WHERE t.run_id = r.id AND t.stage = 'execute'),
       (SELECT extract(epoch FROM min(s.started_at))::float FROM app.sbx_runs s WHERE s.run_id = r.id),
       (SELECT extract(epoch FROM max(s.finished_at))::float FROM app.sbx_runs s WHERE s.run_id = r.id),
       extract(epoch FROM r.finished_at)::float,
       (SELECT count(*) FROM app.sbx_runs s WHERE s.run_id = r.id AND s.outcomes = 1 AND s.status = 'succeeded')
  FROM app.runs r WHERE r.intent_id = %s"""


@dataclass(kw_only=True)
class Timed:
    """One Intent's moments as its people saw them: seconds since 1970. `approval` is the PlanApproval's name."""

    name: str
    uid: str = ""
    approval: str = ""
    applied: float = 0.0
    waiting: float = 0.0
    voted: float = 0.0
    done: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The same Intent as the database saw it."""

    queued: float
    begun: float
    planned: float
    approved: float
    first_task: float
    last_task: float
    closed: float
    tasks: int


class People:
    """carol applies, alice approves, a watch shows what becomes of it."""

    def __init__(self, carol: Api, alice: Api, seen: Phases) -> None:
        self._carol, self._alice, self._seen = carol, alice, seen
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    async def apply(self, name: str, goal: str = HELLO, **spec: Any) -> Timed:
        """Create, and wait until the watch shows it waiting."""
        one = Timed(name=name)
        async with self._slots:
            one.applied = now()
            created = await self._carol.create_intent(NAMESPACE, name, {"goal": goal, **spec})
        sight = await self._seen.wait(name, "WaitingInput", seconds=90)
        one.uid, one.waiting, one.approval = created["metadata"]["uid"], sight.at, sight.status["plan"]["approvalName"]
        return one

    def versions(self, one: Timed) -> int:
        """How many versions of this Intent they have been shown so far."""
        return self._seen.versions(one.name)

    async def approve(self, one: Timed) -> Timed:
        """Vote, and wait until the watch shows it succeeded."""
        async with self._slots:
            one.voted = now()
            await self._alice.approve(NAMESPACE, one.approval)
        one.done = (await self._seen.wait(one.name, "Succeeded", seconds=90)).at
        return one


@asynccontextmanager
async def people(stack: Stack) -> AsyncIterator[People]:
    """Connections and watch of one section."""
    async with (
        Api(stack.kubeconfig("carol")) as carol,
        Api(stack.kubeconfig("alice")) as alice,
        Phases(carol, NAMESPACE) as seen,
    ):
        yield People(carol, alice, seen)


def moments(stack: Stack, intents: Sequence[Timed]) -> list[Moments]:
    """Of each Intent. Raises where one did not end with every task done exactly once."""
    names = ("queued", "begun", "planned", "approved", "first_task", "last_task", "closed", "tasks")
    found = []
    with psycopg.connect(stack.database, autocommit=True) as c:
        for one in intents:
            row = c.execute(MOMENTS, (one.uid,)).fetchone()
            if row is None or None in row:
                raise DevclusterError(f"{one.name} left no complete trace in the database: {row}")
            found.append(Moments(**dict(zip(names, row, strict=True))))
    return found
