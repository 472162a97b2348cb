"""The projection: equal input gives equal output, within bounds, in words of a closed list, in the shape of the CRD."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core import status as projection
from controller.core.phases import Stage, Status
from controller.core.run import Run, TaskFailure, Tasks
from controller.core.status import MAX_FAILURES, MAX_MESSAGE, REASONS
from tests.support.builders import NOW, STORE, approval, intent, plan, planned_run, run, task, vote

CRDS = Path(__file__).parents[2] / "crds"
quick = hypothesis(max_examples=60, deadline=None)
STAGES = [(s, g) for s in Status for g in Stage]
LATER = NOW + timedelta(hours=2)


def of(started: Run, *, old: Mapping[str, Any] | None = None, at: Any = NOW, **changes: Any) -> dict[str, Any]:
    given_: dict[str, Any] = {"approval": None, "store_id": STORE, "identity": None, **changes}
    return projection.of_run(intent(status=old or {}), started, now=at, **given_)


def full(status: Status = Status.FAILED, stage: Stage = Stage.FINISH, **changes: Any) -> Run:
    """A run that has something to say in every field."""
    failures = tuple(TaskFailure(task=f"t{n}", err_code="CMD_NONZERO", message="m" * 5000) for n in range(50))
    tasks = Tasks(
        total=1000, queued=1, running=2, succeeded=900, failed=97, unknown=3, sandbox_ms=1500, failures=failures
    )
    shown = plan([task(n) for n in range(1000)], summary="s" * 4096)
    more: dict[str, Any] = {
        "tasks": tasks,
        "error": "e" * 2048,
        "reason": "TaskFailed",
        "result": {"patchRef": "p", "artifactIndexRef": "i", "junit": {"tests": 3, "failures": 1}},
        "tokens": 7,
        "finished_at": NOW,
        **changes,
    }
    return planned_run(status, stage, plan_json=shown, **more)


def any_run(status: Status, stage: Stage) -> Run:
    return run(status, stage) if stage is Stage.PLAN else planned_run(status, stage)


# ------------------------------------------------------------------ the same again


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_a_written_status_is_built_again_byte_for_byte_whenever_that_is(status: Status, stage: Stage) -> None:
    started = any_run(status, stage)
    first = of(started)
    assert of(started, old=first, at=LATER) == first


@pytest.mark.parametrize("build", ["refused", "held", "stalled"])
def test_so_are_the_others(build: str) -> None:
    def make(old: Mapping[str, Any], at: Any) -> dict[str, Any]:
        if build == "refused":
            return projection.refused(intent(status=old), problem="no", now=at)
        if build == "held":
            return projection.held(intent(status=old), reason="Queued", store_id=STORE, now=at)
        return projection.stalled(intent(status=old), store_id=STORE, now=at)

    first = make({}, NOW)
    assert make(first, LATER) == first


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_so_is_the_status_of_an_approval(status: Status, stage: Stage) -> None:
    started = planned_run(status, stage, execution_no=1)
    seen = approval(started, vote())
    first = projection.of_approval(seen, started, identity=None, now=NOW)
    assert projection.of_approval(replace(seen, status=first), started, identity=None, now=LATER) == first


def test_a_condition_keeps_its_time_while_its_status_stays_and_gets_a_new_one_when_it_changes() -> None:
    waiting = of(planned_run())
    running = of(planned_run(Status.RUNNING, Stage.EXECUTE), old=waiting, at=LATER)
    times = {c["type"]: c["lastTransitionTime"] for c in running["conditions"]}
    assert times["Planned"] == projection.stamp(NOW)  # True as before, in other words
    assert times["Finished"] == projection.stamp(NOW)
    assert times["Approved"] == projection.stamp(LATER)  # False → True


# ------------------------------------------------------------------ bounds


def test_failures_are_at_most_ten_and_their_messages_short() -> None:
    found = of(full())["failures"]
    assert (MAX_FAILURES, MAX_MESSAGE) == (10, 256)
    assert [f["task"] for f in found] == [f"t{n}" for n in range(10)]
    assert all(len(f["message"]) == 256 for f in found)


def test_an_intent_stays_under_64_kib_with_a_thousand_tasks() -> None:
    spec = {"goal": "g" * 8192, "inputs": {"a": "x" * 16_000}, "constraints": {"a": "x" * 16_000}}
    whole = {"spec": spec, "status": of(full(), approval=approval(full(), vote()))}
    assert len(json.dumps(whole).encode()) < 64 * 1024


def test_whole_seconds_of_sandbox_time_and_finished_of_all_tasks() -> None:
    found = of(full())
    assert found["usage"] == {"tokens": 7, "sandboxSeconds": 2}
    assert found["tasks"]["display"] == "997/1000"


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_nothing_is_null_because_the_api_server_would_drop_it_and_the_next_look_would_differ(
    status: Status, stage: Stage
) -> None:
    started = any_run(status, stage)
    seen = approval(started, vote())
    whole = [of(started), of(full(status, stage)), projection.of_approval(seen, started, identity=None, now=NOW)]
    assert not [path for one in whole for path, value in _leaves(one) if value is None]


# ------------------------------------------------------------------ untrusted text


def test_what_models_and_tasks_wrote_is_shown_with_its_hidden_characters() -> None:
    """Law 13: kubectl describe prints these fields to a terminal."""
    failure = TaskFailure(task="t0", err_code="CMD_NONZERO", message="\x1b[2Jall green\u202e")
    started = full(tasks=Tasks(total=1, failed=1, failures=(failure,)), error="\x1b[2J\u202e")
    started = replace(started, plan=plan(summary="safe\u202eelif"))
    shown = json.dumps(of(started), ensure_ascii=False)
    assert "\u202e" not in shown and "\\u001b" not in shown


# ------------------------------------------------------------------ the closed list


def _reasons(status: Mapping[str, Any]) -> set[str]:
    return {status["reason"], *(c["reason"] for c in status["conditions"])}


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_the_reason_of_a_run_is_in_the_closed_list(status: Status, stage: Stage) -> None:
    for identity, problem in ((None, None), ("a policy is missing", None), (None, "tampered")):
        started = any_run(status, stage)
        found = of(started, approval=approval(started, vote(), problem=problem), identity=identity)
        assert found["reason"] in REASONS


def test_the_reasons_of_all_conditions_are_in_the_closed_list() -> None:
    found: set[str] = set()
    for status, stage in STAGES:
        found |= _reasons(of(any_run(status, stage)))
    found |= _reasons(projection.held(intent(), reason="Suspended", store_id=STORE, now=NOW))
    found |= _reasons(projection.refused(intent(), problem="no", now=NOW))
    found |= _reasons(projection.stalled(intent(), store_id=STORE, now=NOW))
    assert found <= set(REASONS), f"not in the list: {sorted(found - set(REASONS))}"


@pytest.mark.parametrize(
    ("started", "reason", "phase"),
    [
        (run(), "Queued", "Queued"),
        (run(Status.RUNNING), "Planning", "Running"),
        (planned_run(), "plan_not_approved", "WaitingInput"),
        (planned_run(Status.RUNNING, Stage.EXECUTE), "Executing", "Running"),
        (planned_run(Status.RUNNING, Stage.FINISH), "Finishing", "Running"),
        (planned_run(Status.CANCELING, Stage.EXECUTE), "Canceling", "Canceling"),
        (run(Status.REPAIRING), "Repairing", "Repairing"),
        (planned_run(Status.SUCCEEDED, Stage.FINISH), "Succeeded", "Succeeded"),
        (planned_run(Status.FAILED, Stage.FINISH, reason="TaskFailed"), "TaskFailed", "Failed"),
        (run(Status.FAILED, reason="PlanFailed"), "PlanFailed", "Failed"),
        (
            planned_run(Status.RETRIES_EXCEEDED, Stage.FINISH, reason="InfrastructureFailed"),
            "InfrastructureFailed",
            "RetriesExceeded",
        ),
        (planned_run(Status.REJECTED, reason="Rejected"), "Rejected", "Rejected"),
        (planned_run(Status.EXPIRED), "Expired", "Expired"),
        (run(Status.CANCELED, reason="Deleted"), "Deleted", "Canceled"),
    ],
)
def test_phase_and_reason_say_where_the_run_is_and_why(started: Run, reason: str, phase: str) -> None:
    found = of(started)
    assert (found["reason"], found["phase"]) == (reason, phase)


@pytest.mark.parametrize("status", list(Status))
def test_finished_is_true_exactly_when_the_run_has_ended(status: Status) -> None:
    found = {c["type"]: c["status"] for c in of(planned_run(status, Stage.FINISH))["conditions"]}
    assert found["Finished"] == ("True" if status.terminal else "False")
    assert (found["Succeeded"] == "True") == (status is Status.SUCCEEDED)


@pytest.mark.parametrize(
    ("status", "stage", "decision"),
    [
        (Status.WAITING_INPUT, Stage.APPROVE, "Pending"),
        (Status.RUNNING, Stage.EXECUTE, "Approved"),
        (Status.SUCCEEDED, Stage.FINISH, "Approved"),
        (Status.CANCELED, Stage.EXECUTE, "Approved"),
        (Status.REJECTED, Stage.APPROVE, "Rejected"),
        (Status.EXPIRED, Stage.APPROVE, "Expired"),
        (Status.CANCELED, Stage.APPROVE, "Canceled"),
        (Status.REPAIRING, Stage.PLAN, "Superseded"),
    ],
)
def test_the_decision_of_an_approval(status: Status, stage: Stage, decision: str) -> None:
    started = planned_run(status, stage, execution_no=2)
    found = projection.of_approval(approval(started, vote(), vote()), started, identity=None, now=NOW)
    assert found["decision"] == decision and found["received"] == 1
    assert ("consumedBy" in found) == (decision == "Approved")
    if decision == "Approved":
        assert found["consumedBy"]["workflowId"].endswith(":execute:2")


def test_an_approval_was_used_now_and_not_when_planning_began() -> None:
    started = planned_run(Status.RUNNING, Stage.EXECUTE, execution_no=1, started_at=NOW - timedelta(days=2))
    found = projection.of_approval(approval(started, vote()), started, identity=None, now=NOW)
    assert found["consumedBy"]["at"] == projection.stamp(NOW)


def test_who_consumed_an_approval_is_never_written_anew() -> None:
    before = {"consumedBy": {"workflowId": "u:execute:1", "at": "2026-01-01T00:00:00Z"}}
    started = planned_run(Status.RUNNING, Stage.EXECUTE, execution_no=2)
    found = projection.of_approval(approval(started, vote(), status=before), started, identity=None, now=NOW)
    assert found["consumedBy"] == before["consumedBy"]


# ------------------------------------------------------------------ the CRDs


def _schema(name: str) -> Mapping[str, Any]:
    crd = yaml.safe_load((CRDS / f"{name}.yaml").read_text())
    found: Mapping[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    return found


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path, value


def _misfits(schema: Mapping[str, Any], value: Any, path: str = "status") -> Iterator[str]:
    """Where the value is not what the schema says: what the API server would refuse, or drop without a word."""
    kind = {"object": Mapping, "array": list, "string": str, "integer": int}[schema["type"]]
    if not isinstance(value, kind):
        yield f"{path}: not a {schema['type']}"
    elif isinstance(value, Mapping):
        yield from _object_misfits(schema, value, path)
    elif isinstance(value, list):
        if len(value) > schema["maxItems"]:
            yield f"{path}: {len(value)} items"
        for inner in value:
            yield from _misfits(schema["items"], inner, f"{path}[]")
    else:
        yield from _scalar_misfits(schema, value, path)


def _object_misfits(schema: Mapping[str, Any], value: Mapping[str, Any], path: str) -> Iterator[str]:
    yield from (f"{path}.{k}: required" for k in schema.get("required", ()) if k not in value)
    for key, inner in value.items():
        if key in schema["properties"]:
            yield from _misfits(schema["properties"][key], inner, f"{path}.{key}")
        else:
            yield f"{path}.{key}: unknown, so it is dropped"


def _scalar_misfits(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    size = len(value) if isinstance(value, str) else value
    low, high = ("minLength", "maxLength") if isinstance(value, str) else ("minimum", "maximum")
    if not schema.get(low, size) <= size <= schema.get(high, size):
        yield f"{path}: {size}"
    if value not in schema.get("enum", [value]):
        yield f"{path}: {value!r} is not in the enumeration"


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_every_status_of_an_intent_fits_the_crd(status: Status, stage: Stage) -> None:
    schema = _schema("intents")
    for started in (any_run(status, stage), full(status, stage)):
        found = of(started, approval=approval(started, vote()), identity="i" * 5000)
        assert not list(_misfits(schema, found))


def test_the_other_statuses_of_an_intent_fit_the_crd_too() -> None:
    schema = _schema("intents")
    assert not list(_misfits(schema, projection.held(intent(), reason="Canceled", store_id=STORE, now=NOW)))
    assert not list(_misfits(schema, projection.refused(intent(), problem="x" * 5000, now=NOW)))
    stalled = projection.stalled(intent(status=of(full())), store_id=STORE, now=NOW)
    assert not list(_misfits(schema, stalled))


@pytest.mark.parametrize(("status", "stage"), STAGES)
def test_every_status_of_an_approval_fits_the_crd(status: Status, stage: Stage) -> None:
    started = planned_run(status, stage)
    seen = approval(started, *(vote(f"p{n}") for n in range(16)), problem="p" * 5000)
    assert not list(_misfits(_schema("planapprovals"), projection.of_approval(seen, started, identity=None, now=NOW)))


def test_the_schema_walk_finds_what_does_not_fit() -> None:
    schema = _schema("intents")
    wrong = {**of(full()), "phase": "Dancing", "extra": 1, "runId": "r" * 65, "observedRetry": -1}
    assert len(list(_misfits(schema, wrong))) == 4


@given(st.text(max_size=3000), st.text(max_size=3000), st.integers(0, 10**6))
@quick
def test_whatever_text_comes_in_the_status_fits(error: str, message: str, tokens: int) -> None:
    failure = TaskFailure(task="t0", err_code="OOM", message=message)
    started = full(error=error, tokens=tokens, tasks=Tasks(total=1, failed=1, failures=(failure,)))
    first = of(started)
    assert not list(_misfits(_schema_once(), first))
    assert of(started, old=first, at=LATER) == first


_CACHED: list[Mapping[str, Any]] = []


def _schema_once() -> Mapping[str, Any]:
    if not _CACHED:
        _CACHED.append(_schema("intents"))
    return _CACHED[0]
