"""Law 13, nothing untrusted is believed: whatever a model or a sandbox says, a parser answers with a value or its documented error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.core import visible
from controller.core.contract import CompileTurn
from controller.core.digest import canonical
from controller.core.errors import InvalidPlan
from controller.core.junit import summary
from controller.main import RECURSION_LIMIT
from controller.workflows.compile import validate

TEXT = st.text(st.characters(), max_size=30)  # surrogates included: JSON can carry them
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=20
)
PLAN: dict[str, Any] = {
    "kind": "plan",
    "plan": {
        "goal": "g",
        "summary": "s",
        "design": [],
        "files": [],
        "risks": [],
        "edits": [],
        "tests": [],
        "tasks": [
            {"id": "a", "title": "t", "command": "true", "timeoutSeconds": 1},
            {"id": "b", "title": "t", "command": "true", "timeoutSeconds": 1, "dependsOn": ["a"]},
        ],
    },
}


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in inner for path in paths(one, (*at, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one place replaced."""
    if not path:
        return new
    copied = json.loads(json.dumps(value))
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return copied


def answer(structured: Any) -> CompileTurn | None:
    """The turn, or None for the documented refusal; any other exception is the bug."""
    said = ""
    try:
        return validate(structured, max_tasks=100)
    except InvalidPlan as e:
        said = str(e)
    assert said.encode(), "it is quoted to the model"
    return None


def test_the_plan_that_is_mutated_here_is_valid() -> None:
    assert answer(PLAN) is not None


@given(JSON)
@settings(max_examples=200)
def test_law_13_any_json_is_a_turn_or_an_invalid_plan(structured: Any) -> None:
    answer(structured)


@given(st.sampled_from(paths(PLAN)), JSON)
@settings(max_examples=400)
def test_law_13_any_place_of_a_plan_may_hold_anything(path: tuple[Any, ...], new: Any) -> None:
    turn = answer(put(PLAN, path, new))
    if turn is not None:
        canonical(turn.model_dump(mode="json", by_alias=True)).decode()  # what is valid can be hashed, stored and shown
        for task in turn.plan.tasks if turn.plan is not None else ():
            assert visible.first_hidden(task.title + task.command) is None


def nested(levels: int, *, objects: bool) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = {"a": value} if objects else [value]
    return value


@pytest.fixture
def as_deep_as_the_product() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    yield
    sys.setrecursionlimit(before)


HARD = {
    "300 lists": nested(300, objects=False),
    "5000 lists": nested(5000, objects=False),
    "25000 objects": nested(25_000, objects=True),
    "4000 digits": 10**4000,
    "minus 4000 digits": -(10**4000),
    "2^63": 2**63,
    "infinity": float("inf"),
    "no number": float("nan"),
    "a float that is whole": 1.0,
    "a truth": True,
    "a megabyte": "x" * 1_000_000,
    "a hidden megabyte": "\u202e" * 1_000_000,
    "50000 keys": {str(n): n for n in range(50_000)},
    "50000 items": list(range(50_000)),
    "an odd key": {"\ud800": 1},
    "a key with NUL": {"a\0b": 1},
}


@pytest.mark.usefixtures("as_deep_as_the_product")
@pytest.mark.parametrize("value", HARD.values(), ids=HARD.keys())
def test_law_13_a_hard_value_in_any_place_of_an_answer_is_refused_or_carried(value: Any) -> None:
    for path in (*paths(PLAN), ("plan", "more"), ("plan", "tasks", 0, "more")):
        turn = answer(put(PLAN, path, value))
        if turn is not None:
            canonical(turn.model_dump(mode="json", by_alias=True)).decode()


@given(
    st.integers(0, len(json.dumps(PLAN))),
    st.sampled_from(["", "}", ',"goal":"other"}', ',"plan":null}', "]}}", "\x00", "\\ud800"]),
)
@settings(max_examples=200)
def test_law_13_an_answer_that_was_cut_or_says_things_twice_is_one_turn_or_none(at: int, then: str) -> None:
    """A key that comes twice means its last value, everywhere: there is one decoder, and what it gives is checked, hashed and shown."""
    try:
        said = json.loads(json.dumps(PLAN)[:at] + then)
    except ValueError:
        return
    turn = answer(said)
    if turn is not None:
        assert turn.plan is not None and turn.plan.goal == said["plan"]["goal"]
        assert answer(json.loads(turn.model_dump_json(by_alias=True, exclude_none=True))) == turn


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.lists(st.sampled_from("abcdef"), max_size=3)), max_size=6))
def test_law_13_any_graph_of_tasks_has_an_order_or_is_refused(graph: list[tuple[str, list[str]]]) -> None:
    tasks = [{"id": i, "title": "t", "command": "true", "timeoutSeconds": 1, "dependsOn": d} for i, d in graph]
    turn = answer(put(PLAN, ("plan", "tasks"), tasks))
    done: set[str] = set()
    left = [(t.id, set(t.depends_on)) for t in turn.plan.tasks] if turn is not None and turn.plan is not None else []
    while left:
        ready = [one for one in left if one[1] <= done]
        assert ready, "an accepted plan that cannot be carried out"
        done |= {one[0] for one in ready}
        left = [one for one in left if one not in ready]


XML = st.sampled_from(
    [
        '<testsuite tests="3" failures="1" errors="1"/>',
        '<testsuites><testsuite tests="2" failures="0"/></testsuites>',
        '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><testsuite tests="&d;"/>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><testsuite tests="1"/>',
        '<?xml version="1.0" encoding="utf-16"?><testsuite tests="1"/>',
        '<?xml version="1.0" encoding="nonsense"?><testsuite tests="1"/>',
        "<a>" * 2000,
    ]
)


@given(
    st.binary(max_size=200)
    | XML.map(str.encode)
    | st.tuples(XML, st.binary(max_size=20), st.integers(0, 60)).map(
        lambda t: t[0].encode()[: t[2]] + t[1] + t[0].encode()[t[2] :]
    )
)
@settings(max_examples=400)
def test_law_13_any_junit_report_is_two_small_numbers_or_none(report: bytes) -> None:
    found = summary(report)
    if found is not None:
        assert set(found) == {"tests", "failures"}
        assert all(isinstance(n, int) and n >= 0 for n in found.values())


@given(TEXT, TEXT)
def test_law_13_counts_of_a_report_are_never_believed_beyond_reason(tests: str, failures: str) -> None:
    def attribute(text: str) -> str:
        return "".join(f"&#{ord(c)};" for c in text)

    report = f'<testsuite tests="{attribute(tests)}" failures="{attribute(failures)}"/>'
    found = summary(report.encode())
    assert found is None or all(0 <= n <= 20_000_000 for n in found.values())


@given(st.text(st.characters(), max_size=100))
@settings(max_examples=400)
def test_law_13_shown_text_hides_nothing(text: str) -> None:
    shown = visible.visible(text)
    assert visible.first_hidden(shown) is None
    assert visible.visible(shown) == shown, "showing twice changes nothing"
    shown.encode()
    assert (visible.first_hidden(text) is None) == (shown == text)
