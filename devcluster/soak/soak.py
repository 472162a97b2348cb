"""Both soaks from their parts: a stack of its own, a controller, a crew, faults, and what is asked of each Intent afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from devcluster.soak import judge, plan
from devcluster.soak.crew import Crew
from devcluster.soak.drive import CANCEL, NAMESPACE, Course, Drive, Due, Job
from devcluster.soak.evidence import Store, failures
from devcluster.soak.places import PLACES, STACKS, Mock, Place
from devcluster.soak.report import Part
from devcluster.soak.rows import Causes, Check, Evidence
from devcluster.stack import Controller, Stack
from devcluster.trial.command import own_stack
from devcluster.trial.costs import Meter
from devcluster.trial.numbers import net, rate
from devcluster.trial.progress import say

TTL_SECONDS = 6.0
GRACE_SECONDS = (
    10.0  # so long that the reaper does not do what a successor has to: end the older sandbox before its own command
)
IDLE_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of what. `seconds` limits each run, from its approval on; `settings` are the product's."""

    tasks: int
    kills: int
    stops: int
    zombies: int
    workers: int
    parallelism: int
    seconds: float
    seed: int
    settings: Mapping[str, str]


@dataclass(kw_only=True)
class Scene:
    """What a run happens in."""

    stack: Stack
    place: Place
    controller: Controller
    crew: Crew
    store: Store
    chance: random.Random

    def drive(self, seconds: float) -> Drive:
        """A run."""
        return Drive(stack=self.stack, store=self.store, crew=self.crew, place=self.place, seconds=seconds)

    def causes(self) -> Causes:
        """All that was done so far."""
        logs = failures(one.log for one in self.crew.all)
        return Causes(
            interruptions=tuple(self.crew.interruptions), failures=tuple(logs), windows=tuple(self.place.windows)
        )


@contextmanager
def scene(make: Callable[[Stack], Place], sizes: Sizes, record: Callable[[Path], None], **more: Any) -> Iterator[Scene]:
    """From nothing, and nothing is left. `record` writes the plans; `more` is the stack's."""
    say("control plane and PostgreSQL (fsync on), from nothing")
    with own_stack(**more) as stack:
        fixtures, starts = stack.state / "fixtures", stack.state / "starts"
        record(fixtures)
        stack.kubectl("create", "namespace", NAMESPACE)
        store, place = Store(stack.database, start_log=starts), make(stack)
        settings = {"OC_FIXTURES": str(fixtures), "LOG_FORMAT": "json", **sizes.settings}
        chance = random.Random(sizes.seed)
        crew = Crew(
            stack,
            {
                "SBX_START_LOG": str(starts),
                "SBX_ORPHAN_GRACE_SECONDS": f"{GRACE_SECONDS:g}",
                **place.settings(),
                **settings,
            },
            ttl=TTL_SECONDS,
            chance=chance,
            store=store,
        )
        controller = None
        try:
            controller = stack.controller(name="controller", role="controller", **settings)
            say(f"{sizes.workers} workers")
            crew.open(sizes.workers)
            yield Scene(stack=stack, place=place, controller=controller, crew=crew, store=store, chance=chance)
            say("stopping")
        finally:
            crew.close()
            if controller is not None:
                controller.stop()
            place.close()
            store.close()


def fan_out(sizes: Sizes, *, seeds: int) -> list[Part]:
    """One Intent of many mock tasks for each seed, one after the other, on the same workers and their replacements."""
    plans = {seed: plan.waits(sizes.tasks, seed=seed) for seed in range(sizes.seed, sizes.seed + seeds)}

    def record(fixtures: Path) -> None:
        for seed, tasks in plans.items():
            plan.record(fixtures, _goal(seed), tasks)

    with scene(Mock, sizes, record) as it:
        meter = Meter(it.stack, it.controller)
        say("what idle workers commit")
        before = meter.settled()
        asyncio.run(asyncio.sleep(IDLE_SECONDS))
        spent = meter.read().minus(before)
        idle = rate(spent.commits, spent.at)
        parts = [_one_fan_out(it, replace(sizes, seed=seed), tasks, meter, idle) for seed, tasks in plans.items()]
        meter.close()
    return parts


def _goal(seed: int) -> str:
    return f"soak: short waits of seed {seed}"


def _one_fan_out(it: Scene, sizes: Sizes, tasks: Sequence[plan.Planned], meter: Meter, idle: float) -> Part:
    say(f"{sizes.tasks} tasks, parallelism {sizes.parallelism}, seed {sizes.seed}")
    job = Job(
        name=f"fan-out-{sizes.seed}",
        goal=_goal(sizes.seed),
        plan=tasks,
        parallelism=sizes.parallelism,
        phase="Succeeded",
    )
    dues, drive, before = _dues(it, sizes), it.drive(sizes.seconds), meter.settled()
    it.crew.worked()
    (course,) = asyncio.run(drive.run([job], dues))
    spent, there = meter.settled().minus(before), it.crew.worked()
    found, causes = it.store.gather(course.uid, shown=course.shown, largest=course.largest), it.causes()
    closing, executing = it.store.pace(course.uid)
    figures = {
        "approved → closed": (len(tasks) / closing if closing else 0.0, "tasks/s"),
        "first begun → last done": (len(tasks) / executing if executing else 0.0, "tasks/s"),
        "commits per task, net of what idle workers commit": (
            net(spent.commits, idle_rate=idle / sizes.workers, seconds=there) / len(tasks),
            "",
        ),
        "the Intent's JSON at its largest": (course.largest, "bytes"),
        "attempts that did not count": (judge.spoiled(found, causes), ""),
    }
    checks = [*_asked(course, found, causes), *_around(it, drive, [due.what for due in dues])]
    return Part(name=f"seed {sizes.seed}", checks=checks, figures=figures, faults=drive.happened)


def sandboxes(sizes: Sizes, provider: str) -> Part:
    """A mixed plan in real sandboxes, and an Intent that is canceled in the middle."""
    jobs = [
        Job(
            name="mixed",
            goal="soak: one of each kind",
            plan=plan.mixed(sizes.tasks, seed=sizes.seed),
            parallelism=sizes.parallelism,
            phase="Failed",
        ),
        Job(
            name="canceled",
            goal="soak: what will be canceled",
            plan=plan.lingering(max(12, sizes.tasks // 5), seed=sizes.seed),
            parallelism=max(4, sizes.parallelism // 2),
            phase="Canceled",
            cancel_at=0.4,
        ),
    ]

    def record(fixtures: Path) -> None:
        for job in jobs:
            plan.record(fixtures, job.goal, job.plan)

    with scene(PLACES[provider], sizes, record, **STACKS.get(provider, {})) as it:
        say(f"{provider}: {sizes.tasks} tasks, and {len(jobs[1].plan)} of which some are canceled")
        dues, drive = _dues(it, sizes), it.drive(sizes.seconds)
        sized = [replace(job, sandbox=it.place.sandbox) for job in jobs]
        courses = asyncio.run(drive.run(sized, dues))
        causes, checks, spoiled, lost = it.causes(), list[Check](), 0, 0
        for course in courses:
            found = it.store.gather(course.uid, shown=course.shown, largest=course.largest)
            checks += [replace(one, name=f"{course.job.name}: {one.name}") for one in _asked(course, found, causes)]
            spoiled += judge.spoiled(found, causes)
            lost += sum(one.err_code in judge.INFRASTRUCTURE for one in found.tasks)
        checks += _around(it, drive, [*(due.what for due in dues), CANCEL])
        title = "no sandbox lived on beside the start of a newer one"
        checks.append(judge.check(title, drive.seen_alive, judge.lines(sorted(drive.doubled))))
        closing, _ = it.store.pace(courses[0].uid)
        figures = {
            "mixed, approved → closed": (closing, "s"),
            "attempts that did not count": (spoiled, ""),
            "attempts that failed by the provider": (len(causes.failures), ""),
            "tasks that lost all their attempts to what was done": (lost, ""),
        }
    return Part(name=provider, checks=checks, figures=figures, faults=drive.happened)


def _dues(it: Scene, sizes: Sizes) -> list[Due]:
    """Kills, stops and the provider's own failures, in this seed's order, spread over most of the run."""
    it.chance.seed(sizes.seed)
    failures = list(it.place.failures(it.crew.kill).items())
    todo: list[tuple[str, Callable[[], bool]]] = [("a worker is killed", it.crew.kill)] * sizes.kills
    todo += [("a worker is stopped", it.crew.freeze)] * sizes.stops
    todo += [("a worker's lease is taken from it", it.crew.disown)] * sizes.zombies
    it.chance.shuffle(todo)
    turns = [todo] * len(todo) + [failures] * len(failures)  # the provider's own in their order
    it.chance.shuffle(turns)
    planned = [turn.pop(0) for turn in turns]
    part = 0.75 / max(1, len(planned))
    return [Due(at=0.08 + part * (n + it.chance.random()), what=what, do=do) for n, (what, do) in enumerate(planned)]


def _asked(course: Course, found: Evidence, causes: Causes) -> list[Check]:
    """Of one Intent."""
    job, tasks = course.job, course.job.plan
    lost = any(one.err_code in judge.INFRASTRUCTURE for one in found.tasks)  # whether rightly, `outcomes` says
    due = "RetriesExceeded" if lost and job.phase == "Succeeded" else job.phase
    ended = [] if course.phase == due else [f"{job.name} is {course.phase or 'not ended'}: {found.run}"]
    checks = [
        judge.check(f"it ended as {due}", 1, judge.lines(ended)),
        *judge.common(tasks, found, causes, canceled=course.canceled),
        judge.check("errCode, exit and JUnit as planned", len(found.tasks), judge.outcomes(tasks, found, causes)),
        judge.check("artifacts and their bytes as planned", len(found.kept), judge.kept(tasks, found)),
        judge.check("streams whole, each with one end", len(found.streams), judge.streamed(tasks, found)),
    ]
    if course.canceled:
        checks.append(judge.check("shown as Canceled when nothing of it was left", 1, judge.lines(course.at_cancel)))
    else:
        checks.append(judge.check("results in task order", len(found.run.result), judge.ordered(tasks, found)))
    return checks


def _around(it: Scene, drive: Drive, planned: Sequence[str]) -> list[Check]:
    """Of the whole run, to which this was to be done."""
    crew = it.crew
    return [
        judge.check("no task key twice in SQL", it.store.tasks(), judge.lines(it.store.doubles())),
        judge.check("no start of an unknown task", len(it.store.starts()), judge.lines(it.store.strangers())),
        judge.check("never two open attempts of one task", drive.looks, judge.lines(sorted(drive.contested))),
        judge.check("in the end nothing runs, waits or is left", 1, judge.lines(drive.unsettled)),
        judge.check("everything was done to it that should be", 1, judge.happened(planned, drive.happened)),
        judge.check("a worker ends by a kill or by its fence", 1, judge.ended(crew.codes, crew.interruptions)),
    ]
