"""Decide on bytes: the canonical form is RFC 8785's, and a digest changes with every byte of the record.

The expected hashes were computed with Node's own JSON.stringify and crypto, not with the library under test.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core import digest as digests
from tests.support.builders import DIFF, execution, mutants, plan, planned_run, shown, task

quick = hypothesis(max_examples=200, deadline=None)
EURO = "\u20ac"
VECTORS: list[tuple[Any, str, str]] = [
    (
        {
            "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
            "string": f'{EURO}$\x0f\nA\'B"\\\\"/',
            "literals": [None, True, False],
        },
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"' + EURO + '$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}',
        "2d5e01a318d0f0879ab568c4be289c8b1f64ef8921a53c6277d5e069978baacb",
    ),
    (  # keys in the order of their UTF-16 code units: the emoji before the Hebrew letter
        {
            EURO: "Euro Sign",
            "\r": "Carriage Return",
            "\ufb33": "Hebrew Letter Dalet With Dagesh",
            "1": "One",
            "\U0001f600": "Emoji: Grinning Face",
            "\x80": "Control",
            "\xf6": "Latin Small Letter O With Diaeresis",
        },
        '{"\\r":"Carriage Return","1":"One","\x80":"Control","\xf6":"Latin Small Letter O With Diaeresis",'
        f'"{EURO}":"Euro Sign","\U0001f600":"Emoji: Grinning Face","\ufb33":"Hebrew Letter Dalet With Dagesh"}}',
        "5e321556d22018a9656991a9e94f77ec175fa193e52a2429d312f8419ec8b08c",
    ),
    (
        [56, {"d": True, "10": None, "1": []}],
        '[56,{"1":[],"10":null,"d":true}]',
        "099601b171cafed97c333f8878d68e7f8c8f795412adb34b2fdcf0e7c7beac42",
    ),
    ({}, "{}", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
    (
        {"a": "\x7f\u2028 \xe5 a\u030a"},  # nothing is escaped that need not be, nothing is normalised
        '{"a":"\x7f\u2028 \xe5 a\u030a"}',
        "227c9b4a0874f9763edfa6e3e98a8429f5792f55e9836fd0d7e7246f65979646",
    ),
    (
        [0, -0.0, 1e21, 1e-7, 9007199254740991, -1.5],
        "[0,0,1e+21,1e-7,9007199254740991,-1.5]",
        "67a5c3a09e7982d7d6b2376813cc09d62e9657738e7c350d008c0b74a42dbbfd",
    ),
]


@pytest.mark.parametrize(("value", "form", "sha"), VECTORS)
def test_the_canonical_form_is_that_of_rfc_8785(value: Any, form: str, sha: str) -> None:
    assert digests.canonical(value) == form.encode()
    assert digests.sha256_json(value) == sha


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, -(2**53), {"a": "\ud800"}, {1: "a"}, object()])
def test_what_json_cannot_carry_exactly_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        digests.canonical(value)


def test_the_digest_of_a_record_is_the_one_that_node_computes() -> None:
    record = digests.execution_record(
        goal="median() is wrong", tasks=[task()], patch_sha256=digests.sha256(DIFF), execution=execution()
    )
    assert digests.plan_digest(record) == "sha256:608845d0f31a33dacfdb7446e610dba7cfe1ee0e5e7202a82d842077178a28cc"


def test_names_derived_from_digest_and_uid_never_change() -> None:
    assert digests.run_id("11111111-2222-3333-4444-555555555555") == "run-666ff6ccaa5b3c07feaa3a95d3a4bd2c"
    assert digests.approval_name("fix", "sha256:3f9c2a1b77d0e4c5" + "0" * 48) == "fix-3f9c2a1b77d0e4c5"


@pytest.mark.parametrize("count", [1, 3, 400])
def test_what_people_are_shown_has_the_digest_of_the_run(count: int) -> None:
    started = planned_run(plan_json=plan([task(n) for n in range(count)]))
    spec = shown(started).spec
    assert started.record is not None
    record = digests.record_of_approval(spec["plan"], started.record["tasks"])
    assert digests.plan_digest(record) == started.digest == spec["plan"]["digest"]


def test_a_default_that_somebody_writes_into_a_task_changes_nothing() -> None:
    bare = {k: v for k, v in task().items() if k != "dependsOn"}
    assert digests.task_record(bare) == digests.task_record({**task(), "dependsOn": [], "note": "unknown"})


def test_every_change_of_a_record_changes_its_digest() -> None:
    record = digests.execution_record(
        goal="g", tasks=[task(0), task(1, dependsOn=["t0"])], patch_sha256="a" * 64, execution=execution()
    )
    digest = digests.plan_digest(record)
    changed = [digests.plan_digest(one) for one in mutants(record)]
    assert digest not in changed and len(changed) > 100


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@given(TEXTS, TEXTS, st.sampled_from(["goal", "command", "title", "template", "patch"]))
@quick
def test_other_bytes_anywhere_give_another_digest(one: str, other: str, where: str) -> None:
    def digest(text: str) -> str:
        tasks = [task(**({where: text} if where in ("command", "title") else {}))]
        more = execution(**({where: text} if where == "template" else {}))
        goal, patch = (text if where == name else "x" for name in ("goal", "patch"))
        return digests.plan_digest(digests.execution_record(goal=goal, tasks=tasks, patch_sha256=patch, execution=more))

    assert (digest(one) == digest(other)) == (one == other)


@given(st.dictionaries(TEXTS, st.integers(-9, 9) | TEXTS | st.booleans(), max_size=5))
@quick
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert digests.sha256_json(dict(reversed(value.items()))) == digests.sha256_json(value)
