"""The command `python -m devcluster.bench load`: what the product does under load, and when what it stands on is restarted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from devcluster.bench import load_many, load_restarts, load_waiting, report
from devcluster.bench.load_waiting import Sizes
from devcluster.trial.command import after, own_stack
from devcluster.trial.numbers import Row
from devcluster.trial.progress import say


class Part(StrEnum):
    """What can be measured by itself; each part has a stack of its own, from nothing."""

    many = "many"
    restarts = "restarts"
    waiting = "waiting"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for. `settings` are the controller's."""

    wanted: frozenset[Part]
    many: int = 1000
    restarts: int = 300
    waiting: Sizes = field(default_factory=Sizes)
    settings: Mapping[str, str] = field(default_factory=dict)


def main(
    only: Annotated[list[Part] | None, typer.Option(help="Measure just this; may repeat. Default: everything.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: three minutes; no goal is judged by it.")
    ] = False,
    waiting: Annotated[int | None, typer.Option(min=20, help="Intents that wait for people.")] = None,
    planned: Annotated[
        int | None, typer.Option(min=10, help="How many of them the product plans; the rows of the rest are copies.")
    ] = None,
    many: Annotated[int | None, typer.Option(min=10, help="Intents at once.")] = None,
    restarts: Annotated[int | None, typer.Option(min=30, help="Intents in flight during the restarts.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One of the controller's settings; may repeat.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there, too.")] = None,
) -> None:
    """Measure 10,000 waiting Intents, 1,000 at once, and restarts of API server and PostgreSQL under load."""
    base = load_waiting.QUICK if quick else Sizes()
    choice = Choice(
        wanted=frozenset(only or Part),
        many=many or (100 if quick else 1000),
        restarts=restarts or (60 if quick else 300),
        waiting=base.with_counts(waiting=waiting, planned=planned),
        settings=dict(one.split("=", 1) for one in setting or ()),
    )
    report.run(partial(_measure, choice), to)


def _measure(choice: Choice, facts: dict[str, str]) -> report.Result:
    facts |= choice.settings
    sections: dict[str, list[Row]] = {}
    details: dict[str, Any] = {}
    for part in Part:
        if part not in choice.wanted:
            continue
        say(f"{part}: control plane and PostgreSQL (fsync on), from nothing")
        with own_stack() as stack:
            if part is Part.many:
                name, rows, more = load_many.measure(stack, intents=choice.many, settings=choice.settings)
            elif part is Part.restarts:
                name, rows, more = load_restarts.measure(stack, intents=choice.restarts, settings=choice.settings)
            else:
                name, rows, more = load_waiting.measure(stack, sizes=choice.waiting, settings=choice.settings)
            say("stopping")
        sections[name] = rows
        details[part.value] = more
    facts |= after()
    return report.Result(sections, details)
