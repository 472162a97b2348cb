"""What the bench does with what it measured: percentiles, rates, verdicts, and the API server's counters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devcluster.trial.numbers import Row, counters, grown, latency_rows, net, percentile, rate, significant

VALUES = st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [
        (1, 50, 1),
        (2, 50, 1),
        (3, 50, 2),
        (4, 50, 2),
        (30, 50, 15),
        (30, 95, 29),
        (20, 95, 19),
        (100, 95, 95),
        (100, 7, 7),
    ],
)
def test_a_percentile_is_the_value_of_the_nearest_rank(count: int, percent: float, expected: int) -> None:
    shuffled = [float(n) for n in range(count, 0, -1)]
    assert percentile(shuffled, percent) == expected
    assert shuffled[0] == count, "the caller's list is left as it was"


@given(VALUES, st.floats(min_value=0.1, max_value=100))
def test_a_percentile_was_measured_and_splits_the_values(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(v <= found for v in values) >= percent * len(values) / 100 - 1e-6
    assert sum(v < found for v in values) < percent * len(values) / 100


@given(VALUES)
def test_percentiles_grow_and_end_at_the_largest(values: list[float]) -> None:
    assert percentile(values, 50) <= percentile(values, 95) <= percentile(values, 100) == max(values)


@pytest.mark.parametrize("percent", [0, -1, 100.1, math.nan])
def test_a_percent_outside_the_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile([1.0], percent)


def test_nothing_measured_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)
    with pytest.raises(ValueError, match="positive span"):
        rate(10, 0)


def test_rates_and_net_costs() -> None:
    assert rate(200, 8) == 25
    assert net(1000, idle_rate=40, seconds=15) == 400
    assert net(10, idle_rate=40, seconds=15) == 0, "noise of the idle rate is not negative work"


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "verdict"),
    [
        (149, 150, False, "ok"),
        (150, 150, False, "ok"),
        (150.1, 150, False, "short"),
        (15, 15, True, "ok"),
        (14.9, 15, True, "short"),
        (math.nan, 15, True, "short"),
        (math.nan, 15, False, "short"),
        (1, None, False, ""),
    ],
)
def test_a_verdict_says_honestly_what_falls_short(
    value: float, goal: float | None, at_least: bool, verdict: str
) -> None:
    assert Row(key="k", what="w", value=value, goal=goal, at_least=at_least).verdict == verdict


def test_a_row_shows_value_and_goal_with_their_unit() -> None:
    row = Row(key="k", what="w", value=149.6, unit="ms", goal=150)
    assert (row.shown_value, row.shown_goal) == ("150 ms", "≤ 150 ms")
    rows = latency_rows("apply", "apply", [0.1, 0.2, 0.3], goals=(150, 400))
    assert [(r.key, round(r.value), r.verdict) for r in rows] == [
        ("apply_p50_ms", 200, "short"),
        ("apply_p95_ms", 300, "ok"),
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1234"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0, "0.00"), (math.inf, "–")],
)
def test_three_digits_that_matter(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_counters_are_read_from_prometheus_text() -> None:
    text = "\n".join(
        (
            "# HELP apiserver_request_total requests",
            'apiserver_request_total{code="200",resource="intents",verb="PATCH",note="a \\"b\\", c"} 12',
            'apiserver_request_total_more{verb="PATCH"} 99',
            "apiserver_request_total 3 1700000000000",
            'apiserver_request_total{verb="POST"} 1.5e+02',
        )
    )
    found = list(counters(text, "apiserver_request_total"))
    assert [value for _, value in found] == [12, 3, 150]
    assert found[0][0] == {"code": "200", "resource": "intents", "verb": "PATCH", "note": 'a \\"b\\", c'}
    assert found[1][0] == {}


def test_what_grew_between_two_readings() -> None:
    assert grown({"a": 1, "b": 2}, {"a": 1, "b": 5, "c": 4}) == {"b": 3, "c": 4}
