"""What is done with what was measured: percentiles, rates, rows with goals. Pure; tests/unit/test_bench_math.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)(?: \d+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of the table. `goal` is DESIGN section 7's; None where there is none. `note` is for people."""

    key: str
    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """`ok` or `short`; empty without a goal. What is not a number falls short."""
        if self.goal is None:
            return ""
        reached = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "ok" if reached else "short"

    @property
    def shown_goal(self) -> str:
        """`≤ 150 ms`, or nothing."""
        return "" if self.goal is None else f"{'≥' if self.at_least else '≤'} {self.goal:g} {self.unit}".rstrip()

    @property
    def shown_value(self) -> str:
        """Three digits that matter; whole numbers from a hundred on."""
        return f"{significant(self.value)} {self.unit}".rstrip()


def significant(value: float) -> str:
    """1234 → 1234, 123.4 → 123, 12.34 → 12.3, 1.234 → 1.23, 0.0123 → 0.01."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest measured value that at least `percent` of all values do not exceed.

    Raises ValueError without values, or for a percent outside 0 < percent ≤ 100.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, not {percent}")
    # Rounded first: 0.07 * 100 is 7.000000000000001 in binary, and would skip a rank.
    rank = math.ceil(round(percent * len(values) / 100, 9))
    return sorted(values)[rank - 1]


def latency_rows(
    key: str, what: str, seconds: Sequence[float], *, goals: tuple[float, float] | None = None
) -> list[Row]:
    """p50 and p95 in milliseconds."""
    p50, p95 = goals or (None, None)
    note = f"n={len(seconds)}"
    return [
        Row(
            key=f"{key}_p50_ms",
            what=f"{what}, p50",
            value=percentile(seconds, 50) * 1000,
            unit="ms",
            goal=p50,
            note=note,
        ),
        Row(
            key=f"{key}_p95_ms",
            what=f"{what}, p95",
            value=percentile(seconds, 95) * 1000,
            unit="ms",
            goal=p95,
            note=note,
        ),
    ]


def rate(count: float, seconds: float) -> float:
    """Per second. Raises ValueError for a span that is not positive: nothing was measured."""
    if seconds <= 0:
        raise ValueError(f"a rate needs a positive span, not {seconds} s")
    return count / seconds


def net(total: float, *, idle_rate: float, seconds: float) -> float:
    """What work cost beyond what an idle process would have cost in that time; never below zero."""
    return max(0.0, total - idle_rate * seconds)


def counters(text: str, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
    """The samples of one metric in Prometheus' text format: labels and value."""
    for line in text.splitlines():
        if line.startswith(name) and (found := _SAMPLE.match(line)) and found["name"] == name:
            yield dict(_LABEL.findall(found["labels"] or "")), float(found["value"])


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was added to each counter; those that did not move are left out."""
    moved = {key: value - before.get(key, 0.0) for key, value in after.items()}
    return {key: value for key, value in moved.items() if value > 0}
