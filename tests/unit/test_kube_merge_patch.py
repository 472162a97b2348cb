"""merge_patch: applying it by RFC 7386 turns old into new, and it says nothing more than that takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.kube.client import merge_patch

scalars = st.integers(-3, 3) | st.text("ab", max_size=2) | st.booleans()
keys = st.text("abc", min_size=1, max_size=2)
# No null inside objects: a merge patch cannot write one, and our statuses have none (test_core_status).
trees = st.recursive(
    scalars | st.lists(scalars | st.none(), max_size=2), lambda inner: st.dictionaries(keys, inner, max_size=3)
)
objects = st.dictionaries(keys, trees, max_size=4)


def applied(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2, word for word."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = applied(result.get(name), value)
    return result


def typed(value: Any) -> Any:
    """True and 1 are equal in Python, and two things in JSON."""
    if isinstance(value, Mapping):
        return {k: typed(v) for k, v in value.items()}
    return [typed(v) for v in value] if isinstance(value, list) else (type(value).__name__, value)


@given(objects, objects)
@hypothesis(max_examples=150, deadline=None)
def test_applying_the_patch_gives_the_new_object(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert applied(old, merge_patch(old, new)) == new


@given(objects)
@hypothesis(max_examples=100, deadline=None)
def test_there_is_nothing_to_say_when_nothing_changed(same: dict[str, Any]) -> None:
    assert merge_patch(same, same) == {}


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, {"b": None}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}, {"a": {"y": None}}),
        ({"a": [1, 2]}, {"a": [2]}, {"a": [2]}),
        ({"a": {"x": 1}}, {"a": "text"}, {"a": "text"}),
        ({"a": "text"}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": {"x": 1}}, {"a": {}}, {"a": {"x": None}}),
        ({}, {"a": {}}, {"a": {}}),
    ],
)
def test_patches_are_minimal(old: Any, new: Any, patch: Any) -> None:
    assert typed(merge_patch(old, new)) == typed(patch)
