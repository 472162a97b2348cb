"""What a command says while it works, and the bench's table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from devcluster.trial.numbers import Row

_BEGAN = time.monotonic()
_out = Console(highlight=False, soft_wrap=True, stderr=True)
COLORS = {"ok": "green", "short": "red", "": "default"}


def elapsed() -> float:
    """Seconds since the command began."""
    return time.monotonic() - _BEGAN


def say(text: str) -> None:
    """One line of progress, on stderr."""
    _out.print(f"[dim]{elapsed():6.1f}s[/] {text}")


def show(sections: Mapping[str, Sequence[Row]], *, title: str) -> None:
    """The table, on stdout."""
    table = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("what", no_wrap=True)
    for heading in ("measured", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("note", style="dim")
    for name, rows in sections.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for row in rows:
            verdict = f"[{COLORS[row.verdict]}]{row.verdict}[/]"
            table.add_row(row.what, row.shown_value, row.shown_goal, verdict, row.note)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    console.print(table)
