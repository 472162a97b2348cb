"""The verdict as people see it, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from devcluster.soak.rows import Check
from devcluster.trial.numbers import significant

ROWS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run: its checks, its figures (name → value, unit) and what was done to it."""

    name: str
    checks: Sequence[Check]
    figures: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    faults: Sequence[str] = ()

    @property
    def violations(self) -> int:
        """How many rows show that something was wrong."""
        return sum(len(one.violations) for one in self.checks)


def show(parts: Sequence[Part], *, title: str) -> None:
    """The table on stdout, and under it the rows of whatever was wrong."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    plain = Console(highlight=False, markup=False, soft_wrap=True)
    plain.print(title)
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("check")
    table.add_column("looked at", justify="right", no_wrap=True)
    table.add_column("wrong", justify="right", no_wrap=True)
    for part in parts:
        table.add_section()
        table.add_row(f"[bold]{part.name}[/]")
        for one in part.checks:
            color = "red" if one.violations else "green"
            table.add_row(f"  {one.name}", str(one.looked_at), f"[{color}]{len(one.violations)}[/]")
        for what, n in Counter(part.faults).items():
            table.add_row(f"  [dim]done to it: {n} × {what}[/]")
        for what, (value, unit) in part.figures.items():
            table.add_row(f"  [dim]{what}: {significant(value)} {unit}[/]")
    console.print(table)
    for part in parts:
        for one in part.checks:
            for row in one.violations[:ROWS_SHOWN]:
                plain.print(f"WRONG {part.name}: {one.name}: {row}")
            if len(one.violations) > ROWS_SHOWN:
                plain.print(f"WRONG {part.name}: {one.name}: and {len(one.violations) - ROWS_SHOWN} more")
    plain.print(verdict(parts))


def verdict(parts: Sequence[Part]) -> str:
    """The last line."""
    wrong = sum(part.violations for part in parts)
    return f"verdict: {f'WRONG, {wrong} violations' if wrong else 'every effect counted once'}"


def write(to: Path, parts: Sequence[Part], facts: Mapping[str, str]) -> None:
    """All of it, every violation included."""
    body: dict[str, Any] = {
        "facts": dict(facts),
        "violations": sum(part.violations for part in parts),
        "parts": [asdict(part) for part in parts],
    }
    to.write_text(json.dumps(body, indent=1) + "\n")
