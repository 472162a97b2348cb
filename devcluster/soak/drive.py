"""One run: carol applies, alice approves, faults happen when enough is done, and it ends when everything has, or at its limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from devcluster.soak import judge
from devcluster.soak.crew import Crew
from devcluster.soak.evidence import Store
from devcluster.soak.places import Place
from devcluster.soak.plan import Planned
from devcluster.stack import Stack
from devcluster.trial.api import RESOURCES, Api, Phases
from devcluster.trial.progress import say

NAMESPACE = "soak"
TICK = 0.1
TELL_SECONDS = 5.0
PLAN_SECONDS = 120.0
SETTLE_SECONDS = 90.0
CANCEL = "an Intent is canceled in the middle"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One Intent. `cancel_at` is the part of the first Intent's tasks that must be done before it is canceled; 0: it is not."""

    name: str
    goal: str
    plan: Sequence[Planned]
    parallelism: int
    phase: str
    cancel_at: float = 0.0
    sandbox: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """A partition of its own, so that one Intent's tasks do not wait for another's."""
        limits = {"maxTasks": len(self.plan), "parallelism": self.parallelism}
        more = {"sandbox": dict(self.sandbox)} if self.sandbox else {}
        return {"goal": self.goal, "limits": limits, "queuePartitionKey": self.name, **more}


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is to happen when this part of the first Intent's tasks is done. `do` says False when it cannot happen yet."""

    at: float
    what: str
    do: Callable[[], bool]


@dataclass(kw_only=True)
class Course:
    """What became of a job. `at_cancel` are its sandboxes with a command that lived when it was shown as Canceled.

    An empty one may be there, if it was made after its worker had died: nobody can know of it, and the reaper ends it.
    """

    job: Job
    uid: str = ""
    approval: str = ""
    phase: str = ""
    shown: Mapping[str, int] = field(default_factory=dict)
    largest: int = 0
    canceled: bool = False
    at_cancel: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Drive:
    """`unsettled` is what was not over when everything should have been.

    Seen in the course of it: `contested` tasks with two open attempts, `doubled` sandboxes that lived beside a newer one's start.
    """

    stack: Stack
    store: Store
    crew: Crew
    place: Place
    seconds: float
    happened: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)
    looks: int = 0
    seen_alive: int = 0
    contested: set[str] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)

    async def run(self, jobs: Sequence[Job], dues: Sequence[Due]) -> list[Course]:
        """To the end, or to the limit. Raises DevclusterError when an Intent is not even planned."""
        async with (
            Api(self.stack.kubeconfig("carol")) as carol,
            Api(self.stack.kubeconfig("alice")) as alice,
            Phases(carol, NAMESPACE) as seen,
        ):
            courses = [Course(job=job) for job in jobs]
            for one in courses:
                one.uid = (await carol.create_intent(NAMESPACE, one.job.name, one.job.spec))["metadata"]["uid"]
            for one in courses:
                sight = await seen.wait(one.job.name, "WaitingInput", seconds=PLAN_SECONDS)
                one.approval = sight.status["plan"]["approvalName"]
            for one in courses:
                await alice.approve(NAMESPACE, one.approval)
            await self._follow(courses, list(dues), seen, carol)
            await self._settle()
            for one in courses:
                self._see(one, seen)
            return courses

    async def _follow(self, courses: list[Course], dues: list[Due], seen: Phases, carol: Api) -> None:
        deadline, told = time.monotonic() + self.seconds, time.monotonic()
        total = len(courses[0].job.plan)
        while not all(one.phase for one in courses) and time.monotonic() < deadline:
            await asyncio.sleep(TICK)
            self._tick()
            done, running = self.store.progress(courses[0].uid)
            for due in [due for due in dues if done >= due.at * total]:
                if due.do():
                    dues.remove(due)
                    self.happened.append(due.what)
            for one in courses:
                if one.job.cancel_at and not one.canceled and done >= one.job.cancel_at * total:
                    await self._cancel(one, carol)
                if not one.phase:
                    self._see(one, seen)
            if time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                say(f"  {done} of {total} done, {running} running")

    async def _cancel(self, one: Course, carol: Api) -> None:
        done, running = self.store.progress(one.uid)
        if not done or not running:
            return
        say(f"  {one.job.name} is canceled: {done} of {len(one.job.plan)} done, {running} running")
        path = f"{RESOURCES}/namespaces/{NAMESPACE}/intents/{one.job.name}"
        kind = "application/merge-patch+json"
        await carol.send("PATCH", path, body={"spec": {"cancel": True}}, content_type=kind)
        one.canceled = True
        self.happened.append(CANCEL)

    def _see(self, one: Course, seen: Phases) -> None:
        one.largest = seen.largest(one.job.name)
        sight = seen.ended(one.job.name)
        if sight is None:
            return
        if not one.phase and sight.phase == "Canceled":
            run_id, started = self.store.run_id(one.uid), {start.fence for start in self.store.starts()}
            mine = [owner for owner in self.place.alive() if owner.run_id == run_id]
            one.at_cancel = [str(owner) for owner in mine if owner.fence in started]
        one.phase, one.shown = sight.phase, sight.status.get("tasks", {})

    async def _settle(self) -> None:
        """Replacements come, zombies end, the reaper reaps."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self._tick()
            left = [*self.store.open(), *self.place.left(), *self.crew.sandboxes()]
            if self.crew.settled() and not left:
                return
            if time.monotonic() > deadline:
                crew = [] if self.crew.settled() else ["not every worker came back, or a stopped one did not end"]
                self.unsettled = [*crew, *left]
                return
            await asyncio.sleep(5 * TICK)

    def _tick(self) -> None:
        self.crew.tick()
        self.place.look()
        starts = self.store.starts()  # before the look: a box that lives now lived when they were written, too
        alive = self.place.alive()
        self.looks += 1
        self.seen_alive += len(alive)
        self.contested |= set(self.store.contested())
        self.doubled |= {str(owner) for owner in judge.doubled(starts, alive)}
