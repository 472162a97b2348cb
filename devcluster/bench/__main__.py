"""The command line: `python -m devcluster.bench`. Brings up a stack of its own, measures, shows one table, leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from devcluster.bench import bare, load, machine, product, report
from devcluster.bench.people import NAMESPACE
from devcluster.processes import tail
from devcluster.stack import Stack
from devcluster.trial.command import after, own_stack
from devcluster.trial.costs import Meter
from devcluster.trial.numbers import Row
from devcluster.trial.progress import say


class Section(StrEnum):
    """What can be measured by itself. The idle controller always is: commits are net of it."""

    machine = "machine"
    latency = "latency"
    throughput = "throughput"
    fanout = "fanout"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each."""

    probes: int = 100
    bare: int = 1000
    runs: int = 30
    intents: int = 200
    tasks: int = 1000


QUICK = Sizes(probes=30, bare=300, runs=6, intents=40, tasks=100)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for. `settings` are the controller's."""

    sizes: Sizes
    wanted: frozenset[Section]
    parallelism: tuple[int, ...]
    seed: int
    settings: Mapping[str, str]


@dataclass
class Bench:
    """One run: sections in the order of the table, and details for --json."""

    stack: Stack
    choice: Choice
    sections: dict[str, list[Row]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """The machine first, while no controller runs; then the product."""
        self._machine()
        say("controller (SBX_MODE=mock, OC_MODE=replay)")
        controller = self.stack.controller(name="controller", role="all", program=(), **self.choice.settings)
        try:
            self.stack.kubectl("create", "namespace", NAMESPACE)
            meter = Meter(self.stack, controller)
            self._product(meter)
            meter.close()
        except Exception:
            say(f"the end of the controller's log:\n{tail(controller.log, 15)}")
            raise
        finally:
            controller.stop()

    def _machine(self) -> None:
        rows: list[Row] = []
        if Section.machine in self.choice.wanted:
            say("machine: API server and PostgreSQL")
            rows += machine.api_server(self.stack, count=self.choice.sizes.probes)
            rows += machine.postgres(self.stack, count=5 * self.choice.sizes.probes)
        if self.choice.wanted & {Section.machine, Section.fanout}:
            say("machine: bare DBOS queue")
            rows += bare.measure(self.stack, count=self.choice.sizes.bare)
        if rows:
            self.sections["the machine, without the product"] = rows

    def _product(self, meter: Meter) -> None:
        say("idle controller")
        nothing = product.idle(meter)
        if Section.latency in self.choice.wanted:
            say(f"{self.choice.sizes.runs} intents, one at a time")
            rows = product.latency(self.stack, runs=self.choice.sizes.runs, seed=self.choice.seed)
            self.sections["one intent at a time"] = rows
        if Section.throughput in self.choice.wanted:
            say(f"{self.choice.sizes.intents} intents at once")
            many = product.throughput(
                self.stack, meter, intents=self.choice.sizes.intents, idle_commits=nothing.commits_per_s
            )
            self.sections["many intents at once"] = many.rows
            self.details |= many.details
        if Section.fanout in self.choice.wanted:
            self.sections["fan-out"] = self._fan_out(meter, nothing.commits_per_s)
        end = Row(key="end_rss_mib", what="controller at the end: memory (RSS)", value=meter.memory_mib(), unit="MiB")
        self.sections["nothing to do"] = [*nothing.rows, end]

    def _fan_out(self, meter: Meter, idle_commits: float) -> list[Row]:
        measured = self.sections["the machine, without the product"]
        one_step = next(row.value for row in measured if row.key == "bare_one_step_per_s")
        rows: list[Row] = []
        for parallelism in self.choice.parallelism:
            say(f"fan-out of {self.choice.sizes.tasks} tasks, parallelism {parallelism}")
            rows += product.fan_out(
                self.stack,
                meter,
                tasks=self.choice.sizes.tasks,
                parallelism=parallelism,
                idle_commits=idle_commits,
                bare=one_step,
            )
        return rows


app = typer.Typer(add_completion=False)
app.command("load")(load.main)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    only: Annotated[
        list[Section] | None, typer.Option(help="Measure just this; may repeat. Default: everything.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: a minute and a half, and noisy.")] = False,
    runs: Annotated[int | None, typer.Option(min=1, help="Intents of the latency section.")] = None,
    intents: Annotated[int | None, typer.Option(min=1, help="Intents at once.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Tasks of the fan-out: 100 or 1000, as recorded.")] = None,
    parallelism: Annotated[list[int] | None, typer.Option(min=1, help="May repeat. Default: 10 and 50.")] = None,
    bare_workflows: Annotated[int | None, typer.Option(min=1, help="Workflows of the bare DBOS queue.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random pauses.")] = 42,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of the controller's settings; may repeat.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there, too.")] = None,
) -> None:
    """Measure latency, throughput and fan-out beside the machine's own limits, on a stack of its own."""
    if context.invoked_subcommand is not None:
        return
    base = QUICK if quick else Sizes()
    sizes = Sizes(
        probes=base.probes,
        bare=bare_workflows or base.bare,
        runs=runs or base.runs,
        intents=intents or base.intents,
        tasks=tasks or base.tasks,
    )
    if sizes.tasks not in (100, 1000):
        raise typer.BadParameter("there are recorded plans of 100 and of 1000 tasks", param_hint="--tasks")
    choice = Choice(
        sizes=sizes,
        wanted=frozenset(only or Section),
        parallelism=tuple(parallelism or (10, 50)),
        seed=seed,
        settings=dict(one.split("=", 1) for one in setting or ()),
    )
    report.run(partial(_measure, choice), to)


def _measure(choice: Choice, facts: dict[str, str]) -> report.Result:
    facts |= choice.settings
    say("control plane and PostgreSQL (fsync on), from nothing")
    with own_stack() as stack:
        done = Bench(stack, choice)
        done.run()
        facts |= after()
        say("stopping")
    return report.Result(done.sections, done.details)


if __name__ == "__main__":
    app()
