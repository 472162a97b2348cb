"""The CRDs and the pydantic models say the same: names, types, enums, required fields, limits. All fields are explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from controller.core import settings as core_settings
from controller.core.phases import Status
from controller.core.settings import Policy, Recipe
from controller.kube import crd
from controller.kube.crd import DEFAULTS, IntentSpec, IntentStatus
from controller.kube.crd_approval import PlanApprovalSpec, PlanApprovalStatus

CRDS = Path(__file__).parents[2] / "crds"
COMPARED = (
    "type",
    "enum",
    "format",
    "required",
    "pattern",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "maxProperties",
)
PAIRS: list[tuple[str, str, type[BaseModel]]] = [
    ("intents", "spec", IntentSpec),
    ("intents", "status", IntentStatus),
    ("planapprovals", "spec", PlanApprovalSpec),
    ("planapprovals", "status", PlanApprovalStatus),
]


def schema_of(plural: str) -> dict[str, Any]:
    document = yaml.safe_load((CRDS / f"{plural}.yaml").read_text())
    schema: dict[str, Any] = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def flat(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """One schema node without references and without pydantic's `or null`; int-or-string becomes one node."""
    node = dict(schema)
    if "$ref" in node:
        node = {**definitions[node.pop("$ref").rsplit("/", 1)[1]], **node}
    choices = [flat(c, definitions) for c in node.pop("anyOf", ()) if c.get("type") != "null"]
    if {c.get("type") for c in choices} == {"integer", "string"}:
        node["x-kubernetes-int-or-string"] = True
        choices = [{k: v for k, v in c.items() if k != "type"} for c in choices]
    for choice in choices:
        node.update(choice)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    return node


def differences(
    path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[str]:
    model = flat(theirs, definitions)
    for key in (*COMPARED, "x-kubernetes-int-or-string"):
        left, right = ours.get(key), model.get(key)
        if key in ("required", "enum"):
            left, right = sorted(left or ()), sorted(right or ())
        if key == "format" and left in ("int32", "int64"):
            left = None
        if left != right:
            yield f"{path}: {key} is {left!r} in the CRD, {right!r} in the model"
    mine, its = ours.get("properties", {}), model.get("properties", {})
    for name in sorted(set(mine) ^ set(its)):
        yield f"{path}.{name} is only in the {'CRD' if name in mine else 'model'}"
    for name in sorted(set(mine) & set(its)):
        yield from differences(f"{path}.{name}", mine[name], its[name], definitions)
    if "items" in ours and "items" in model:
        yield from differences(f"{path}[]", ours["items"], model["items"], definitions)


def nodes(path: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(f"{path}.{name}", child)
    if "items" in schema:
        yield from nodes(f"{path}[]", schema["items"])


ALL_NODES = [(path, node) for plural in ("intents", "planapprovals") for path, node in nodes(plural, schema_of(plural))]


@pytest.mark.parametrize(("plural", "part", "model"), PAIRS)
def test_crd_and_model_are_equal(plural: str, part: str, model: type[BaseModel]) -> None:
    theirs = model.model_json_schema(by_alias=True)
    found = list(differences(part, schema_of(plural)["properties"][part], theirs, theirs.get("$defs", {})))
    assert found == []


def test_the_comparison_sees_a_difference() -> None:
    ours = schema_of("intents")["properties"]["spec"]
    theirs = IntentSpec.model_json_schema(by_alias=True)
    ours["properties"]["goal"]["maxLength"] = 1
    ours["properties"]["sandbox"]["properties"]["egress"]["properties"]["mode"]["enum"].append("Some")
    del ours["properties"]["retry"]
    found = list(differences("spec", ours, theirs, theirs["$defs"]))
    assert [f.split(" ")[0].rstrip(":") for f in found] == ["spec.retry", "spec.goal", "spec.sandbox.egress.mode"]


@pytest.mark.parametrize(("path", "node"), ALL_NODES, ids=[path for path, _ in ALL_NODES])
def test_every_field_is_explained_and_bounded(path: str, node: Mapping[str, Any]) -> None:
    assert len(node.get("description", "")) >= 9, f"{path} needs a description"
    assert node["description"].endswith("."), f"{path}: a sentence ends with a full stop"
    assert "{{" not in node["description"], "the chart renders the CRDs as templates"
    kind = node.get("type")
    if kind == "string":
        assert "maxLength" in node or "enum" in node or node.get("format") == "date-time", f"{path} needs maxLength"
    if kind == "array":
        assert "maxItems" in node, f"{path} needs maxItems"
        assert "x-kubernetes-list-type" in node, f"{path} needs a list type"
    if kind == "object" and "properties" not in node:
        assert "maxProperties" in node, f"{path} needs maxProperties"
    assert "default" not in node, f"{path}: a default would be written into people's objects"


def test_descriptions_name_the_defaults() -> None:
    spec = schema_of("intents")["properties"]["spec"]["properties"]
    sandbox, limits, approval = (spec[part]["properties"] for part in ("sandbox", "limits", "approval"))
    said = {
        "template": sandbox["template"],
        "egress_mode": sandbox["egress"]["properties"]["mode"],
        "cpu": sandbox["cpu"],
        "memory": sandbox["memory"],
        "task_timeout_seconds": sandbox["taskTimeoutSeconds"],
        "max_tasks": limits["maxTasks"],
        "parallelism": limits["parallelism"],
        "timeout_seconds": limits["timeoutSeconds"],
        "max_tokens": limits["maxTokens"],
        "max_sandbox_minutes": limits["maxSandboxMinutes"],
        "required": approval["required"],
        "expires_after_seconds": approval["expiresAfterSeconds"],
        "priority": spec["priority"],
        "recipe": spec["recipe"],
        "ref": spec["workspace"]["properties"]["git"]["properties"]["ref"],
    }
    assert set(said) == set(crd.Defaults.__dataclass_fields__)
    for name, node in said.items():
        value = str(getattr(DEFAULTS, name))
        text = node["description"].replace('"', "")
        assert any(f"bsent means {value}{end}" in text for end in (".", ",", " ")), (
            f"{name} does not say that absent means {value}"
        )


def test_defaults_are_what_the_core_assumes() -> None:
    policy = Policy(
        required=1,
        allow_requester=True,
        templates=(DEFAULTS.template,),
        egress=("None",),
        max_priority=0,
        recipes={DEFAULTS.recipe: Recipe()},
        max_executions=3,
        sha256="0" * 64,
    )
    got = core_settings.effective({"goal": "g"}, namespace="n", policy=policy)
    assert got.template == DEFAULTS.template
    assert got.egress_mode == DEFAULTS.egress_mode
    assert got.cpu_millis == core_settings.cpu_millis(DEFAULTS.cpu)
    assert got.memory_mb == core_settings.memory_mb(DEFAULTS.memory)
    same = ("task_timeout_seconds", "max_tasks", "parallelism", "timeout_seconds", "max_tokens", "max_sandbox_minutes")
    for name in (*same, "required", "expires_after_seconds", "priority", "recipe"):
        assert getattr(got, name) == getattr(DEFAULTS, name), name


def test_phases_are_the_statuses_of_a_run() -> None:
    spelled = schema_of("intents")["properties"]["status"]["properties"]["phase"]["enum"]
    assert spelled == [status.phase for status in Status]


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("intents.spec.workspace.git.url", crd.GIT_URL),
        ("intents.spec.workspace.git.ref", crd.GIT_REF),
        ("intents.spec.queuePartitionKey", crd.PARTITION_KEY),
        ("intents.spec.sandbox.template", crd.TEMPLATE),
        ("intents.spec.sandbox.egress.allow[]", crd.HOST),
    ],
)
def test_rules_in_cel_are_the_models_patterns(path: str, pattern: str) -> None:
    rule = dict(ALL_NODES)[path]["x-kubernetes-validations"][0]["rule"]
    assert rule.startswith(f"self.matches(r'{pattern}')")


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("https://github.com/x/y.git", True),
        ("https://git.example.com:8443/a/b", True),
        ("https://[2001:db8::1]:443/a", True),
        ("http://127.0.0.1:8080/a.git", True),
        ("http://localhost/a", True),
        ("http://[::1]:99/a", True),
        ("http://github.com/x/y", False),
        ("http://localhost.evil.com/x", False),
        ("http://127.0.0.1@evil.com/x", False),
        ("https://user:secret@github.com/x", False),
        ("https://token@github.com/x", False),
        ("https://github.com/x?private_token=t", False),
        ("https://github.com/x#y", False),
        ("ssh://git@github.com/x", False),
        ("file:///etc", False),
        ("ext::sh -c id", False),
        ("https://github.com/x\n", False),
        ("-oProxyCommand=id", False),
    ],
)
def test_git_urls(url: str, fine: bool) -> None:
    assert _valid({"workspace": {"git": {"url": url}}}) is fine


@pytest.mark.parametrize(
    ("ref", "fine"),
    [
        ("main", True),
        ("refs/heads/fix-1", True),
        ("v1.2.0+build", True),
        ("3f9c2a1b77d0e4c5", True),
        ("-main", False),
        ("--upload-pack=id", False),
        ("a..b", False),
        ("a b", False),
        ("main\n", False),
        ("/x", False),
    ],
)
def test_git_refs(ref: str, fine: bool) -> None:
    assert _valid({"workspace": {"git": {"url": "https://h/x", "ref": ref}}}) is fine


@pytest.mark.parametrize(
    ("egress", "fine"),
    [
        ({}, True),
        ({"mode": "None"}, True),
        ({"mode": "Public"}, True),
        ({"mode": "Allow", "allow": ["packages.example.com:443"]}, True),
        ({"mode": "Allow"}, False),
        ({"allow": ["packages.example.com"]}, False),
        ({"mode": "Public", "allow": ["packages.example.com"]}, False),
        ({"mode": "Allow", "allow": ["https://packages.example.com"]}, False),
    ],
)
def test_egress(egress: dict[str, Any], fine: bool) -> None:
    assert _valid({"sandbox": {"egress": egress}}) is fine


def test_unknown_fields_are_refused_in_a_spec_and_ignored_in_a_status() -> None:
    with pytest.raises(ValidationError):
        IntentSpec.model_validate({"goal": "g", "gaol": "h"})
    assert IntentStatus.model_validate({"phase": "Queued", "new": 1}).phase == "Queued"
    assert PlanApprovalStatus.model_validate({"decision": "Pending", "new": 1}).decision == "Pending"


def test_absent_stays_absent() -> None:
    assert IntentSpec.model_validate({"goal": "g", "sandbox": {"cpu": 1}}).to_json() == {
        "goal": "g",
        "sandbox": {"cpu": 1},
    }


def _valid(part: Mapping[str, Any]) -> bool:
    try:
        IntentSpec.model_validate({"goal": "g", **part})
    except ValidationError:
        return False
    return True
