"""The command line: `python -m devcluster.soak fanout`, `… sandbox`. Exit 0: every effect counted once; 1: the rows that show otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from devcluster.soak import report, soak
from devcluster.soak.report import Part
from devcluster.trial.command import after, command, titled

Kills = Annotated[int, typer.Option(min=0, help="Workers that are SIGKILLed while tasks run.")]
Stops = Annotated[int, typer.Option(min=0, help="Workers that are stopped for longer than their lease, then go on.")]
Zombies = Annotated[int, typer.Option(min=0, help="Workers that go on without knowing that their lease has run out.")]
Workers = Annotated[int, typer.Option(min=2, help="Worker processes; each that is lost is replaced.")]
Seconds = Annotated[float, typer.Option(min=10, help="Limit of each run, from its approval on.")]
Seed = Annotated[int, typer.Option(help="Of the durations, and of what happens when.")]
Setting = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of the product's settings; may repeat.")
]
To = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the verdict there, too.")]


class Provider(StrEnum):
    """Where sandboxes can be made."""

    local = "local"
    e2b = "e2b"
    kubernetes = "kubernetes"


app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def fanout(
    tasks: Annotated[int, typer.Option(min=10, max=10_000, help="Tasks of the Intent, 0 to 250 ms each.")] = 1000,
    parallelism: Annotated[int, typer.Option(min=1, max=64)] = 50,
    kills: Kills = 2,
    stops: Stops = 0,
    zombies: Zombies = 1,
    workers: Workers = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, one after the other, with other kill times.")] = 1,
    seed: Seed = 1,
    seconds: Seconds = 300,
    setting: Setting = None,
    to: To = None,
) -> None:
    """One Intent of 1,000 mock tasks while workers are killed: each counts once, the run closes once, every start is explained."""
    sizes = _sizes(tasks, kills, stops, zombies, workers, parallelism, seconds, seed, setting)
    _judge("fanout-soak", lambda: soak.fan_out(sizes, seeds=seeds), to)


@app.command()
def sandbox(
    provider: Annotated[
        list[Provider] | None,
        typer.Option(help="May repeat. Default: local and e2b, one after the other. kubernetes needs root."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=16, max=1000, help="Tasks of the Intent that is not canceled.")] = 120,
    parallelism: Annotated[int, typer.Option(min=2, max=20)] = 10,
    kills: Kills = 2,
    stops: Stops = 1,
    zombies: Zombies = 1,
    workers: Workers = 3,
    seed: Seed = 1,
    seconds: Seconds = 600,
    setting: Setting = None,
    to: To = None,
) -> None:
    """Real sandboxes of all kinds while workers are killed and stopped, the provider fails, and an Intent is canceled."""
    sizes = _sizes(tasks, kills, stops, zombies, workers, parallelism, seconds, seed, setting)
    _judge(
        "sandbox-soak",
        lambda: [soak.sandboxes(sizes, one.value) for one in provider or (Provider.local, Provider.e2b)],
        to,
    )


def _sizes(
    tasks: int,
    kills: int,
    stops: int,
    zombies: int,
    workers: int,
    parallelism: int,
    seconds: float,
    seed: int,
    setting: list[str] | None,
) -> soak.Sizes:
    return soak.Sizes(
        tasks=tasks,
        kills=kills,
        stops=stops,
        zombies=zombies,
        workers=workers,
        parallelism=parallelism,
        seconds=seconds,
        seed=seed,
        settings=dict(one.split("=", 1) for one in setting or ()),
    )


def _judge(name: str, run: Callable[[], Sequence[Part]], to: Path | None) -> None:
    with command(name) as facts:
        parts = run()
    facts |= after()
    report.show(parts, title=titled(facts))
    if to is not None:
        report.write(to, parts, facts)
    if any(part.violations for part in parts):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
