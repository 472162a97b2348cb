"""A task's key is the hash of all that is asked: equal commands of two intents, tasks or plans never share one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core.contract import Egress, FileIn, Limits, SBXReq
from controller.core.taskkey import task_key
from tests.support.builders import mutants, request

NAMES = st.text("ab-:/", min_size=1, max_size=4)


def test_the_key_is_the_one_that_node_computes() -> None:
    assert task_key(request()) == "1dea5c88f4f8df201e8c7470f70a531bb14eff11e703b1386275401feaa1a3b4"


@pytest.mark.parametrize(
    "change",
    [
        {"intent_id": "other"},
        {"run_id": "other"},
        {"step_id": "CompileST"},
        {"task_id": "t1"},
        {"generation": 2},
        {"env_ref": "local:python@2"},
        {"cmd": "echo  0"},
        {"files_in": ()},
        {"files_in": (FileIn(kind="patch", sha256="a" * 64),)},
        {"env": {"A": "1"}},
        {"workdir": "/"},
        {"timeout_ms": 300_001},
        {"limits": Limits(pids=255)},
        {"egress": Egress(mode="Public")},
    ],
)
def test_every_field_is_part_of_the_key(change: dict[str, Any]) -> None:
    assert task_key(request(**change)) != task_key(request())


def test_no_field_of_a_request_is_left_out() -> None:
    whole = request(env={"A": "1"}, egress=Egress(mode="Allow", allow=("a.example",)))
    wire = whole.model_dump(mode="json", by_alias=True)
    keys = set()
    for one in mutants(wire):
        try:
            keys.add(task_key(SBXReq.model_validate(one)))
        except ValueError:
            continue
    # What is left out or written as a string of digits means the default or the number: the same request.
    assert len(keys - {task_key(whole)}) > 20


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(1, 3), NAMES), min_size=2, max_size=8, unique=True))
@hypothesis(max_examples=100, deadline=None)
def test_two_intents_tasks_or_generations_never_share_a_key(asked: list[tuple[str, str, int, str]]) -> None:
    keys = {
        task_key(request(intent_id=intent, task_id=task, generation=number, cmd=command))
        for intent, task, number, command in asked
    }
    assert len(keys) == len(asked)


def test_the_key_survives_the_way_through_the_database() -> None:
    stored = SBXReq.model_validate(request().model_dump(mode="json", by_alias=True))
    assert task_key(stored) == task_key(request())
