"""What both commands of the bench share: a stack of their own, the machine's facts, the table, and what happens on Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import typer

from devcluster.bench.numbers import Row
from devcluster.bench.progress import elapsed, say, show
from devcluster.errors import DevclusterError
from devcluster.stack import Stack


@dataclass(frozen=True)
class Result:
    """Sections in the order of the table, and details for --json."""

    sections: Mapping[str, Sequence[Row]]
    details: Mapping[str, Any] = field(default_factory=dict)


def run(measure: Callable[[dict[str, str]], Result], to: Path | None) -> None:
    """Measure and show. `measure` may add to the facts, which are the table's title. Nothing is shown when it raises."""
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **_machine(), "load before": _load()}
    try:
        done = measure(facts)
    except KeyboardInterrupt:
        say("interrupted; everything that was started is stopped")
        raise typer.Exit(130) from None
    except DevclusterError as e:
        say(f"bench: {e}")
        raise typer.Exit(1) from e
    show(done.sections, title=", ".join(f"{name} {value}" for name, value in facts.items()))
    if to is not None:
        to.write_text(json.dumps(_json(done, facts), indent=1) + "\n")


def after() -> dict[str, str]:
    """The facts of the end."""
    return {"load after": _load(), "took": f"{elapsed():.0f} s"}


@contextmanager
def own_stack() -> Iterator[Stack]:
    """A stack in a temporary directory, fsync on; both are gone afterwards."""
    state = Path(tempfile.mkdtemp(prefix="sisu-kodo-bench-"))
    stack = Stack(state, fsync=True)
    try:
        with stack:
            yield stack
    finally:
        if stack.postgres is not None and not stack.postgres.running:
            stack.postgres.wipe()
        shutil.rmtree(state, ignore_errors=True)


def _machine() -> dict[str, str]:
    return {
        "CPUs": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "Python": sys.version.split()[0],
    }


def _load() -> str:
    return " ".join(f"{x:.1f}" for x in os.getloadavg())


def _json(done: Result, facts: dict[str, str]) -> dict[str, Any]:
    fields = ("key", "value", "unit", "goal", "verdict", "note")
    rows = [
        {"section": name, **{f: getattr(row, f) for f in fields}}
        for name, rows in done.sections.items()
        for row in rows
    ]
    return {"facts": facts, "rows": rows, **done.details}
