"""What both commands of the bench share: the table, and all numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devcluster.trial.command import command, titled
from devcluster.trial.numbers import Row
from devcluster.trial.progress import show


@dataclass(frozen=True)
class Result:
    """Sections in the order of the table, and details for --json."""

    sections: Mapping[str, Sequence[Row]]
    details: Mapping[str, Any] = field(default_factory=dict)


def run(measure: Callable[[dict[str, str]], Result], to: Path | None) -> None:
    """Measure and show. `measure` may add to the facts, which are the table's title. Nothing is shown when it raises."""
    with command("bench") as facts:
        done = measure(facts)
    show(done.sections, title=titled(facts))
    if to is not None:
        to.write_text(json.dumps(_json(done, facts), indent=1) + "\n")


def _json(done: Result, facts: dict[str, str]) -> dict[str, Any]:
    fields = ("key", "value", "unit", "goal", "verdict", "note")
    rows = [
        {"section": name, **{f: getattr(row, f) for f in fields}}
        for name, rows in done.sections.items()
        for row in rows
    ]
    return {"facts": facts, "rows": rows, **done.details}
