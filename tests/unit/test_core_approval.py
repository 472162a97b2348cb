"""What people are shown is the stored plan and nothing else, and it fits into the object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core import approval as approvals
from controller.core import digest as digests
from controller.core.contract import PlanOutput
from controller.core.errors import InvalidIntent, InvalidPlan
from controller.core.visible import hidden
from controller.kube import objects, spec
from controller.kube.crd_approval import PlanApprovalSpec
from controller.workflows.compile import validate
from tests.support.builders import DIFF, POLICY, intent, mutants, plan, planned_run, shown, task

KIB = 1024
BIDI = "access \u202e// nimda\u202c\u200b\x1b[2J"


def big(tasks: int, diff: bytes = DIFF, **changes: Any) -> approvals.Shown:
    return shown(planned_run(plan_json=plan([task(n) for n in range(tasks)], **changes), diff=diff), diff)


def live(expected: approvals.Shown, **other: Any) -> dict[str, Any]:
    return {"spec": {**expected.spec, "decisions": [{"approver": "a", "verdict": "Approve"}], **other}}


def answered(tasks: list[dict[str, Any]], **changes: Any) -> PlanOutput:
    """The plan of a model's answer. Raises InvalidPlan, which is quoted back to the model."""
    answer = {k: v for k, v in plan(tasks, **changes).items() if k != "patch"}
    turn = validate({"kind": "plan", "plan": answer}, max_tasks=10_000)
    assert turn.plan is not None
    return turn.plan


def bytes_of(expected: approvals.Shown) -> int:
    return len(json.dumps(objects.plan_approval(intent(), expected, store_id="store-1"), ensure_ascii=False).encode())


# ------------------------------------------------------------------ exact


def test_the_object_as_it_was_made_has_no_problem() -> None:
    for expected in (big(1), big(1000, DIFF * 1000)):
        assert approvals.problem(live(expected), expected, parts=dict(expected.parts)) is None


def test_every_change_of_what_is_shown_is_detected() -> None:
    expected = big(2)
    found = 0
    for part in ("intent", "plan", "policy"):
        for other in mutants(expected.spec[part]):
            assert approvals.problem(live(expected, **{part: other}), expected, parts={}) is not None, (part, other)
            found += 1
    assert found > 150


def test_a_missing_part_of_the_spec_is_a_problem_too() -> None:
    expected = big(1)
    for part in ("intent", "plan", "policy"):
        rest = {k: v for k, v in expected.spec.items() if k != part}
        assert approvals.problem({"spec": rest}, expected, parts={}) is not None


@pytest.mark.parametrize("change", [lambda text: None, lambda text: text + "\n", lambda text: text[:-1]])
@pytest.mark.parametrize("which", [0, 1], ids=["tasks", "diff"])
def test_a_changed_or_missing_config_map_is_detected(change: Any, which: int) -> None:
    expected = big(1000, DIFF * 1000)
    name = sorted(expected.parts, reverse=True)[which]
    parts = {**expected.parts, name: change(expected.parts[name])}
    assert name in str(approvals.problem(live(expected), expected, parts=parts))


def test_a_run_whose_digest_is_not_of_its_plan_is_a_problem_though_it_is_shown_as_stored() -> None:
    started = planned_run(digest="sha256:" + "0" * 64)
    expected = shown(started)
    assert "digest" in str(approvals.problem(live(expected), expected, parts={}))


# ------------------------------------------------------------------ size


def test_small_plans_are_shown_whole() -> None:
    expected = big(3)
    assert expected.parts == {} and len(expected.spec["plan"]["tasks"]) == 3
    assert expected.spec["plan"]["patch"]["diff"] == DIFF.decode()
    assert expected.spec["plan"]["taskCount"] == 3


def test_what_does_not_fit_goes_to_config_maps_named_after_the_approval() -> None:
    diff = DIFF * 1000
    expected = big(1000, diff)
    name = objects.plan_approval(intent(), expected, store_id="store-1")["metadata"]["name"]
    assert sorted(expected.parts) == [f"{name}-diff", f"{name}-tasks"]
    refs = [expected.spec["plan"]["tasksRef"], expected.spec["plan"]["patch"]["moreRef"]]
    for ref in refs:
        assert digests.sha256(expected.parts[ref["name"]].encode()) == ref["sha256"]
    assert "tasks" not in expected.spec["plan"] and expected.spec["plan"]["taskCount"] == 1000
    assert expected.parts[f"{name}-diff"] == diff.decode()
    assert "[the whole diff is in the ConfigMap of moreRef]" in expected.spec["plan"]["patch"]["diff"]
    assert all(map_["immutable"] for map_ in objects.config_maps(intent(), expected))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_limit_of_what_stands_in_the_object_is_exact(extra: int) -> None:
    diff = b"+" * (approvals.INLINE_BYTES - 1 + extra) + b"\n"
    assert bool(big(1, diff).parts) == bool(extra)


def test_the_object_stays_under_64_kib_with_a_thousand_tasks() -> None:
    assert bytes_of(big(1000, DIFF * 5000)) < 64 * KIB


@pytest.mark.parametrize("letter", ["a", "\u20ac", "\U0001f600"], ids=["ASCII", "three bytes", "four bytes"])
def test_the_object_stays_under_64_kib_when_everything_is_as_long_as_it_may_be(letter: str) -> None:
    """One byte more is spilled (tasks, diff, files), refused to the model (texts) or to the Intent's author (goal)."""
    width = len(letter.encode())
    tasks = [task(n, command=letter * (200 // width)) for n in range(approvals.INLINE_BYTES // 300)]
    long = plan(tasks, summary=letter * (approvals.TEXT_BYTES // width - 200))
    long["patch"] = {"files": [letter * (1000 // width)] * 200, "additions": 1, "deletions": 1}
    assert approvals.text_bytes(long) <= approvals.TEXT_BYTES
    diff = (letter * ((approvals.INLINE_BYTES - 8) // width)).encode()
    goal = letter * 8192
    try:
        spec.check(
            {"goal": goal}, namespace="team", policy=POLICY, allow_loopback_http=False, private_repositories=False
        )
    except InvalidIntent:
        goal = letter * (8192 // width)
    expected = shown(planned_run(plan_json=long, diff=diff, goal=goal), diff)
    assert expected.parts == {}
    assert bytes_of(expected) < 64 * KIB


def test_tasks_that_no_config_map_can_hold_never_become_a_plan() -> None:
    tasks = [task(n, command="c" * 4096) for n in range(1000)]
    with pytest.raises(InvalidPlan):
        answered(tasks)
    held = answered(tasks[:200])
    expected = shown(planned_run(plan_json=plan([t.model_dump(mode="json", by_alias=True) for t in held.tasks])))
    assert expected.parts and all(len(text.encode()) < KIB * KIB for text in expected.parts.values())


def test_as_many_short_tasks_as_a_plan_may_have_fit_into_a_config_map() -> None:
    """They are written with line feeds and spaces, for people: longer than the canonical form that is measured."""
    for count in (9_500, 7_000):
        tasks = [task(n) for n in range(count)]
        try:
            answered(tasks)
        except InvalidPlan:
            continue
        break
    expected = shown(planned_run(plan_json=plan(tasks)))
    assert all(len(text.encode()) < KIB * KIB for text in expected.parts.values())


# ------------------------------------------------------------------ visible


@pytest.mark.parametrize("field", ["summary", "design", "files", "risks", "tests"])
def test_hidden_characters_of_the_models_texts_are_spelled_out(field: str) -> None:
    text: Any = BIDI if field == "summary" else [BIDI]
    found = json.dumps(big(1, **{field: text}).spec["plan"][field], ensure_ascii=False)
    assert "<U+202E>" in found and "<U+001B>" in found and "\u202e" not in found


@pytest.mark.parametrize("lines", [1, 2000], ids=["inline", "spilled"])
def test_hidden_characters_of_the_diff_are_spelled_out(lines: int) -> None:
    diff = f"+if {BIDI}\n".encode() * lines + b"\xff\n"
    expected = big(1, diff)
    texts = [expected.spec["plan"]["patch"]["diff"], *expected.parts.values()]
    assert all("<U+202E>" in text and not any(hidden(c) for c in text) for text in texts)


@pytest.mark.parametrize("field", ["title", "command"])
def test_a_task_with_hidden_characters_never_becomes_a_plan(field: str) -> None:
    """Tasks are shown as they run, because the digest is recomputed from them: so they must have nothing to hide (law 13)."""
    with pytest.raises(InvalidPlan, match=r"U\+202E"):
        answered([task(**{field: BIDI})])


def test_texts_that_cannot_be_shown_never_become_a_plan() -> None:
    with pytest.raises(InvalidPlan, match="can be shown"):
        answered([task()], tests=["\x1b" * 100] * 100)
    assert answered([task()]).tasks[0].id == "t0"


# ------------------------------------------------------------------ the CRD


def _unknown(schema: Mapping[str, Any], value: Any, path: str) -> list[str]:
    """Fields that the API server would drop without a word; then nobody could rebuild the object."""
    if isinstance(value, Mapping):
        known = schema.get("properties", {})
        lost = [f"{path}.{k}" for k in value if k not in known]
        return lost + [p for k, v in value.items() if k in known for p in _unknown(known[k], v, f"{path}.{k}")]
    if isinstance(value, list):
        return [p for v in value for p in _unknown(schema["items"], v, f"{path}[]")]
    return []


@pytest.mark.parametrize("count", [1, 1000])
def test_the_spec_is_one_that_the_crd_keeps_whole(count: int) -> None:
    made = objects.plan_approval(intent(), big(count, DIFF * count), store_id="store-1")
    PlanApprovalSpec.model_validate(made["spec"])
    crd = yaml.safe_load((Path(__file__).parents[2] / "crds" / "planapprovals.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert _unknown(schema, made["spec"], "spec") == []


def test_file_names_that_are_long_when_spelled_out_are_ones_that_the_crd_takes() -> None:
    names = ["/".join(["\ue000" * 80] * 3), "a" * 1024, "b.py"]
    expected = shown(planned_run(plan_json=plan(patch={"files": names, "additions": 1, "deletions": 1})), DIFF)
    made = PlanApprovalSpec.model_validate(objects.plan_approval(intent(), expected, store_id="store-1")["spec"])
    assert made.plan.patch.files[0].endswith("[cut]") and made.plan.patch.files[1:] == ("a" * 1024, "b.py")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.binary(max_size=200))
@hypothesis(max_examples=60, deadline=None)
def test_any_plan_is_shown_so_that_its_votes_count(text: str, diff: bytes) -> None:
    expected = big(1, diff, summary=text, design=[text])
    assert approvals.problem(live(expected), expected, parts=dict(expected.parts)) is None
