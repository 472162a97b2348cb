"""The chart's files hang together: links resolve, values match their schema, every right has a caller, policies are whole.

Also the comparison of live policies with the shipped ones (controller.kube.identity), which reads the same files.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.kube import identity
from controller.kube.policy import Policies

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sisu-kodo"
ADMISSION = ROOT / "controller" / "kube" / "admission"
NAMESPACE, ACCOUNT = "system", "the-controller"
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}

Object = dict[str, Any]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def problems(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str = "values") -> Iterator[str]:
    """As much of JSON Schema as values.schema.json uses. Fails on a keyword that it does not know."""
    known = {"$schema", "title", "description", "definitions", "type", "additionalProperties", "required", "properties"}
    known |= {"allOf", "$ref", "enum", "pattern", "minimum", "maximum", "minItems", "uniqueItems", "items"}
    known |= {"minLength", "maxLength", "propertyNames", "if", "then", "oneOf", "const"}
    assert set(schema) <= known, f"{path}: teach this test {set(schema) - known}"
    for part in schema.get("allOf", ()):
        yield from problems(value, part, root, path)
    if "oneOf" in schema and sum(not list(problems(value, one, root, path)) for one in schema["oneOf"]) != 1:
        yield f"{path} is not exactly one of what it may be"
    if "if" in schema and not list(problems(value, schema["if"], root, path)):
        yield from problems(value, schema["then"], root, path)
    if "$ref" in schema:
        yield from problems(value, root["definitions"][schema["$ref"].rsplit("/", 1)[1]], root, path)
    kind = TYPES.get(schema.get("type", ""))
    if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        yield f"{path} is not of type {schema['type']}"
        return
    yield from _scalar_problems(value, schema, path)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{path} has too few items"
        for i, one in enumerate(value):
            yield from problems(one, schema.get("items", {}), root, f"{path}[{i}]")
    if isinstance(value, dict):
        yield from _object_problems(value, schema, root, path)


def _scalar_problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if value != schema.get("const", value):
        yield f"{path} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path} is none of {schema['enum']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path} does not match {schema['pattern']}"
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{path} is out of bounds"


def _object_problems(value: Object, schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}.{name} is missing"
    extra = schema.get("additionalProperties", True)
    for name, one in value.items():
        child = schema.get("properties", {}).get(name)
        if child is None and extra is False:
            yield f"{path}.{name} is unknown"
        elif child is not None or isinstance(extra, dict):
            yield from problems(one, child if child is not None else extra, root, f"{path}.{name}")


# --------------------------------------------------------------------------- links and values


@pytest.mark.parametrize(
    "path", ["files/admission", "files/sandboxes", "templates/crds/intents.yaml", "templates/crds/planapprovals.yaml"]
)
def test_links_lead_into_this_repository(path: str) -> None:
    link = CHART / path
    assert link.is_symlink(), "one copy only: the chart shows the same file"
    assert not link.readlink().is_absolute()
    assert link.resolve(strict=True).is_relative_to(ROOT)


def test_every_crd_is_in_the_chart() -> None:
    assert {p.name for p in (ROOT / "crds").glob("*.yaml")} == {
        p.name for p in (CHART / "templates" / "crds").iterdir()
    }


@pytest.mark.parametrize("path", sorted((ROOT / "crds").glob("*.yaml")), ids=lambda path: path.name)
def test_crds_stay_when_the_release_goes(path: Path) -> None:
    assert load(path)["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "{{" not in path.read_text(), "the chart renders CRDs as templates"


def without_controller() -> Object:
    """The default values with the Deployment switched off: with it, some values have no sensible default."""
    values = load(CHART / "values.yaml")
    return {**values, "controller": {**values["controller"], "enabled": False}}


def test_values_match_their_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert list(problems(without_controller(), schema, schema)) == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("policy", "default", "required"), 0, "values.policy.default.required is out of bounds"),
        (("policy", "default", "required"), "two", "values.policy.default.required is not of type integer"),
        (("policy", "default", "egress"), ["All"], "values.policy.default.egress[0] is none of"),
        (("policy", "default", "egress"), [], "values.policy.default.egress has too few items"),
        (("policy", "namespaces", "pay"), {"requird": 2}, "values.policy.namespaces.pay.requird is unknown"),
        (("admission", "mutating"), "always", "values.admission.mutating is none of"),
        (("serviceAccount", "name"), "No Such", "values.serviceAccount.name does not match"),
    ],
)
def test_wrong_values_are_found(path: tuple[str, ...], value: object, says: str) -> None:
    schema, values = json.loads((CHART / "values.schema.json").read_text()), without_controller()
    node = values
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    found = list(problems(values, schema, schema))
    assert len(found) == 1 and found[0].startswith(says), found


def test_the_default_policy_is_one_that_the_controller_reads(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(load(CHART / "values.yaml")["policy"]))
    policy = Policies(file).of("any")
    assert (policy.required, policy.allow_requester, policy.max_priority, policy.max_executions) == (1, True, 0, 3)
    assert (policy.templates, policy.egress, tuple(policy.recipes)) == (
        ("python",),
        ("None",),
        ("sandbox-default", "sandbox-fail-fast"),
    )


# --------------------------------------------------------------------------- rights


RBAC: dict[str, list[Object]] = load(CHART / "files" / "rbac.yaml")
ROWS = [(who, row) for who, rows in RBAC.items() for row in rows]
WRITES = {"create", "update", "patch", "delete", "deletecollection"}


@pytest.mark.parametrize(("who", "row"), ROWS, ids=[f"{who} {row['resource']}" for who, row in ROWS])
def test_every_right_has_a_caller(who: str, row: Object) -> None:
    assert set(row) == {"apiGroup", "resource", "verbs"}
    assert row["apiGroup"] != "*" and "*" not in row["resource"] and "*" not in row["verbs"]
    for verb, reason in row["verbs"].items():
        caller, _, why = reason.partition(" - ")
        assert why, f"{who} {row['resource']} {verb}: say who calls it and why"
        if caller.startswith("controller/"):
            folder = ROOT / caller if not caller.endswith(".py") else (ROOT / caller).parent
            assert folder.is_dir(), f"{caller} is not a place in this repository"
        else:
            assert caller.split(" ")[0] in ("people", "admission"), caller


def test_no_row_twice() -> None:
    keys = [(who, row["apiGroup"], row["resource"]) for who, row in ROWS]
    assert len(keys) == len(set(keys))


def verbs(who: str, resource: str) -> set[str]:
    return {verb for row in RBAC[who] if row["resource"] == resource for verb in row["verbs"]}


def test_the_controller_cannot_write_decisions() -> None:
    assert verbs("controller", "planapprovals") == {"get", "list", "watch", "create"}
    for resource in ("intents", "intents/status", "planapprovals/status", "configmaps"):
        assert "update" not in verbs("controller", resource)
    for resource in ("secrets", "roles", "clusterroles", "rolebindings"):
        assert verbs("controller", resource) == set()
    for resource in ("validatingadmissionpolicies", "validatingadmissionpolicybindings", "customresourcedefinitions"):
        assert not verbs("controller", resource) & WRITES


def test_who_runs_tasks_reaches_pods_only() -> None:
    assert {(row["resource"], *sorted(row["verbs"])) for row in RBAC["sandboxNamespace"]} == {
        ("pods", "create", "delete", "get", "list"),
        ("pods/exec", "create", "get"),
        ("networkpolicies", "get"),
    }


def test_nobody_reads_secrets_but_who_plans() -> None:
    assert {who: sorted(verbs(who, "secrets")) for who in RBAC if verbs(who, "secrets")} == {"gitSecrets": ["get"]}
    assert "gitSecrets" not in (CHART / "templates" / "rbac.yaml").read_text(), "never by a ClusterRole"


def test_only_approvers_approve() -> None:
    assert [who for who in RBAC if "approve" in verbs(who, "planapprovals")] == ["approver"]
    assert not any(verbs("viewer", row["resource"]) & WRITES for row in RBAC["viewer"])
    assert verbs("author", "planapprovals") == set()
    assert all("delete" not in verbs(who, "planapprovals") for who in RBAC)


# --------------------------------------------------------------------------- admission


FILES = sorted(ADMISSION.glob("*.yaml"))


def test_mutating_policies_are_in_files_of_their_own() -> None:
    for path in FILES:
        kinds = {one["kind"] for one in yaml.safe_load_all(path.read_text())}
        mutating = path.name.startswith("mutating-")
        assert kinds == (
            {f"MutatingAdmissionPolicy{x}" for x in ("", "Binding")}
            if mutating
            else {identity.POLICY, identity.BINDING}
        )


@pytest.mark.parametrize(
    "policy", [one for one in identity.shipped(NAMESPACE, ACCOUNT) if one["kind"] == identity.POLICY], ids=str
)
def test_policies_fail_closed_and_speak_to_people(policy: Object) -> None:
    assert policy["spec"]["failurePolicy"] == "Fail"
    for one in policy["spec"]["validations"]:
        assert one["message"] == one["message"].strip() != "", "where the message expression fails, this is shown"
        assert one["reason"] == "Forbidden"
    assert "__" not in json.dumps(policy)


def test_every_policy_is_bound_everywhere() -> None:
    ours = identity.shipped(NAMESPACE, ACCOUNT)
    policies = {one["metadata"]["name"] for one in ours if one["kind"] == identity.POLICY}
    bindings = [one["spec"] for one in ours if one["kind"] == identity.BINDING]
    assert policies == {"intent.sisukodo.dev", "planapproval.sisukodo.dev", "status.sisukodo.dev"}
    assert sorted(b["policyName"] for b in bindings) == sorted(policies)
    assert all(b == {"policyName": b["policyName"], "validationActions": ["Deny", "Audit"]} for b in bindings)


def test_the_controllers_name_is_filled_in() -> None:
    text = json.dumps(identity.shipped(NAMESPACE, ACCOUNT))
    assert text.count("system:serviceaccount:system:the-controller") == 4


# --------------------------------------------------------------------------- live against shipped


def test_equal_is_no_difference_whatever_the_server_adds() -> None:
    live = [_served(one) for one in identity.shipped(NAMESPACE, ACCOUNT)]
    assert identity.differences(identity.shipped(NAMESPACE, ACCOUNT), live) == []


def _served(one: Object) -> Object:
    metadata = {**one["metadata"], "uid": "u", "labels": {"team": "x"}, "generation": 3}
    # Key order is the server's.
    spec = dict(sorted(copy.deepcopy(one["spec"]).items()))
    return {**one, "metadata": metadata, "spec": spec, "status": {"observedGeneration": 3}}


def test_policies_of_others_do_not_matter() -> None:
    foreign = {"kind": identity.POLICY, "metadata": {"name": "other"}, "spec": {}}
    bound = {"kind": identity.BINDING, "metadata": {"name": "other"}, "spec": {"policyName": "other"}}
    ours = identity.shipped(NAMESPACE, ACCOUNT)
    assert identity.differences(ours, [*ours, foreign, bound]) == []


PA = "planapproval.sisukodo.dev"


def _edit(kind: str, change: Callable[[Object], object]) -> Callable[[list[Object]], None]:
    def apply(live: list[Object]) -> None:
        change(next(one for one in live if (one["kind"], one["metadata"]["name"]) == (kind, PA)))

    return apply


def _remove(kind: str) -> Callable[[list[Object]], None]:
    def apply(live: list[Object]) -> None:
        live[:] = [one for one in live if (one["kind"], one["metadata"]["name"]) != (kind, PA)]

    return apply


def _bind_again(live: list[Object]) -> None:
    spec = {"policyName": PA, "validationActions": ["Warn"]}
    live.append({"kind": identity.BINDING, "metadata": {"name": "more"}, "spec": spec})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_remove(identity.POLICY), f"ValidatingAdmissionPolicy {PA} is missing"),
        (_remove(identity.BINDING), f"ValidatingAdmissionPolicyBinding {PA} is missing"),
        (
            _edit(identity.POLICY, lambda one: one["spec"].update(failurePolicy="Ignore")),
            f"ValidatingAdmissionPolicy {PA} differs from the shipped one in spec.failurePolicy",
        ),
        (
            _edit(identity.POLICY, lambda one: one["spec"]["validations"].pop()),
            f"ValidatingAdmissionPolicy {PA} differs from the shipped one in spec.validations",
        ),
        (
            _edit(
                identity.POLICY, lambda one: one["spec"].update(matchConditions=[{"name": "x", "expression": "false"}])
            ),
            f"ValidatingAdmissionPolicy {PA} differs from the shipped one in spec.matchConditions",
        ),
        (
            _edit(identity.POLICY, lambda one: one["metadata"].update(deletionTimestamp="2026-01-01T00:00:00Z")),
            f"ValidatingAdmissionPolicy {PA} is being deleted",
        ),
        (
            _edit(
                identity.BINDING,
                lambda one: one["spec"].update(matchResources={"namespaceSelector": {"matchLabels": {"a": "b"}}}),
            ),
            f"ValidatingAdmissionPolicyBinding {PA} does not cover everything (matchResources: namespaceSelector)",
        ),
        (
            _edit(identity.BINDING, lambda one: one["spec"].update(validationActions=["Audit"])),
            f"ValidatingAdmissionPolicyBinding {PA} does not deny (validationActions: Audit)",
        ),
        (
            _edit(identity.BINDING, lambda one: one["spec"].update(policyName="other")),
            f"ValidatingAdmissionPolicyBinding {PA} binds other instead of {PA}",
        ),
        (
            _edit(identity.BINDING, lambda one: one["spec"].update(paramRef={"name": "x"})),
            f"ValidatingAdmissionPolicyBinding {PA} differs from the shipped one in spec.paramRef",
        ),
        (_bind_again, f"ValidatingAdmissionPolicyBinding more binds {PA} a second time and is not ours"),
    ],
)
def test_each_difference_is_a_sentence(change: Callable[[list[Object]], None], says: str) -> None:
    live = [_served(one) for one in identity.shipped(NAMESPACE, ACCOUNT)]
    change(live)
    assert identity.differences(identity.shipped(NAMESPACE, ACCOUNT), live) == [says]


async def test_lists_come_without_their_kind() -> None:
    class Reader:
        async def list_all(self, resource: str) -> list[Object]:
            kind = {v: k for k, v in identity.RESOURCES.items()}[resource]
            live = [_served(one) for one in identity.shipped(NAMESPACE, ACCOUNT) if one["kind"] == kind]
            return [{k: v for k, v in one.items() if k not in ("kind", "apiVersion")} for one in live]

    assert await identity.verify(Reader(), identity.shipped(NAMESPACE, ACCOUNT)) == []
    assert len(await identity.verify(Reader(), identity.shipped("elsewhere", ACCOUNT))) == 3


def test_the_forged_write_is_the_approval_with_a_decision_under_another_name() -> None:
    real = {"metadata": {"name": "a", "namespace": "n", "uid": "u"}, "spec": {"plan": {"digest": "d"}, "decisions": []}}
    forged = identity.forged_write(real)
    assert forged["metadata"] == {"generateName": "forged-", "namespace": "n"}
    assert forged["spec"]["plan"] == {"digest": "d"}
    assert [d["verdict"] for d in forged["spec"]["decisions"]] == ["Approve"]
    assert real["spec"] == {"plan": {"digest": "d"}, "decisions": []}
    message = identity.FORGED_WRITE_ANSWER
    assert message in (ADMISSION / "planapproval.yaml").read_text()
