"""The contracts with model and sandbox, as JSON Schema: a change is a decision, so it shows in a diff of tests/unit/golden/.

REFRESH_GOLDEN=1 (or `make golden-refresh`) writes the files anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from controller.core.contract import CompileTurn, ErrCode, Metrics, PlanOutput, SBXReq, SBXRes
from controller.core.prompt import turn_schema
from tests.support.builders import plan, request, response, task

GOLDEN = Path(__file__).parent / "golden"
MODELS: list[type[BaseModel]] = [PlanOutput, CompileTurn, SBXReq, SBXRes]


def same_as_golden(name: str, value: Any) -> None:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("REFRESH_GOLDEN") == "1":
        path.write_text(text)
    assert path.exists(), f"{path} is missing; write it with REFRESH_GOLDEN=1"
    assert json.loads(text) == json.loads(path.read_text()), f"{name} differs; if that is meant: REFRESH_GOLDEN=1"


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_the_schema_is_the_golden_one(model: type[BaseModel]) -> None:
    same_as_golden(model.__name__, model.model_json_schema(by_alias=True))


def test_the_schema_that_the_model_is_given_is_the_golden_one() -> None:
    """Its hash is part of every recorded turn's key: a change makes all recordings miss."""
    same_as_golden("turn_schema", turn_schema())


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == {*(m.__name__ for m in MODELS), "turn_schema"}


@pytest.mark.parametrize("code", list(ErrCode))
def test_only_infrastructure_is_tried_again(code: ErrCode) -> None:
    assert code.retryable == (code.value in ["BOOT_FAIL", "NET_FAIL", "UPLOAD_FAIL", "DOWNLOAD_FAIL", "LOST"])


def test_the_wire_is_camel_case_and_closed() -> None:
    wire = request().model_dump(mode="json", by_alias=True)
    assert {"intentId", "runId", "stepId", "taskId", "envRef", "filesIn", "timeoutMs"} <= set(wire)
    assert Metrics(wall_ms=1, mem_peak_mb=2).model_dump(by_alias=True) == {"wallMs": 1, "cpuMs": None, "memPeakMB": 2}
    for model, value in ((SBXReq, wire), (SBXRes, response().model_dump(mode="json", by_alias=True))):
        assert model.model_validate(value).model_dump(mode="json", by_alias=True) == value
        with pytest.raises(ValidationError, match="extra"):
            model.model_validate({**value, "extra": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": []},
        {"tasks": [task(id="Not A Name")]},
        {"tasks": [task(id="a" * 64)]},
        {"tasks": [task(command="")]},
        {"tasks": [task(command="c" * 4097)]},
        {"tasks": [task(timeoutSeconds=0)]},
        {"design": ["d"] * 26},
        {"files": ["f"] * 31},
        {"risks": ["r"] * 16},
        {"tests": ["t"] * 101},
        {"summary": ""},
        {"edits": [{"op": "move", "path": "a"}]},
        {"edits": [{"op": "replace", "path": "a", "search": "", "replace": ""}]},
        {"note": "unknown"},
    ],
)
def test_a_plan_outside_its_bounds_is_refused(change: dict[str, Any]) -> None:
    good = {k: v for k, v in plan().items() if k != "patch"}
    PlanOutput.model_validate(good)
    with pytest.raises(ValidationError):
        PlanOutput.model_validate({**good, **change})
