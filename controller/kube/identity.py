"""Law 8: is it still the API server that says who approved? Compares the live admission policies with the shipped ones.

The chart applies the same files. Mutating policies are comfort and not looked at; the validating ones and every binding
of theirs must be equal, field by field, or nothing executes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final, Protocol

import rfc8785
import yaml

from controller.kube.crd import API_VERSION

POLICY: Final = "ValidatingAdmissionPolicy"
BINDING: Final = "ValidatingAdmissionPolicyBinding"
RESOURCES: Final = {POLICY: "validatingadmissionpolicies", BINDING: "validatingadmissionpolicybindings"}
FORGED_WRITE_ANSWER: Final = "a PlanApproval is created without decisions"
FORGED_APPROVER: Final = "forged-by-sisu-kodo-to-test-admission"

Object = dict[str, Any]


class AdmissionReader(Protocol):
    """What verify() needs from the API server."""

    async def list_all(self, resource: str) -> Sequence[Mapping[str, Any]]:
        """All objects of a resource of admissionregistration.k8s.io/v1, all pages; their `kind` may be absent."""


def shipped(namespace: str, serviceaccount: str) -> list[Object]:
    """The policies and bindings that must be live, for a controller that runs as this service account."""
    found: list[Object] = []
    folder = files("controller.kube").joinpath("admission")
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        if file.name.endswith(".yaml"):
            text = file.read_text(encoding="utf-8")
            text = text.replace("__NAMESPACE__", namespace).replace("__SERVICEACCOUNT__", serviceaccount)
            found += [one for one in yaml.safe_load_all(text) if one and one["kind"] in RESOURCES]
    return found


def spec_hash(obj: Mapping[str, Any]) -> str:
    """sha256, in hex, of the RFC 8785 form of an object's spec."""
    return hashlib.sha256(rfc8785.dumps(obj.get("spec", {}))).hexdigest()


def differences(ours: Sequence[Mapping[str, Any]], live: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the live policies, one sentence each; empty when they say what the shipped ones say.

    `live` holds all policies and all bindings of the cluster; those of others are left alone.
    """
    return list(_differences(ours, {_key(one): one for one in live}))


async def verify(reader: AdmissionReader, ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fetches policies and bindings, and compares. Raises whatever the reader raises: not knowing is not fine."""
    live: list[Object] = []
    for kind, resource in RESOURCES.items():
        # The items of a list come without their kind.
        live += [{**one, "kind": kind} for one in await reader.list_all(resource)]
    return differences(ours, live)


def forged_write(approval: Mapping[str, Any]) -> Object:
    """The body of a dry-run CREATE that admission must deny with FORGED_WRITE_ANSWER: an approval born approved.

    It is the one forgery that the controller's own rights let through to admission (create, but no update and no patch
    on planapprovals), so a denial proves that the policy is in force for this namespace, and not merely stored.
    """
    spec = approval["spec"]
    decision = {"approver": FORGED_APPROVER, "verdict": "Approve"}
    return {
        "apiVersion": API_VERSION,
        "kind": "PlanApproval",
        "metadata": {"generateName": "forged-", "namespace": approval["metadata"]["namespace"]},
        "spec": {**spec, "decisions": [decision]},
    }


def _differences(ours: Sequence[Mapping[str, Any]], live: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    for one in ours:
        found = live.get(_key(one))
        name = f"{one['kind']} {one['metadata']['name']}"
        if found is None:
            yield f"{name} is missing"
        elif found["metadata"].get("deletionTimestamp"):
            yield f"{name} is being deleted"
        elif spec_hash(found) != spec_hash(one):
            yield f"{name} {_how(one['spec'], found.get('spec', {}))}"
    policies = {one["metadata"]["name"] for one in ours if one["kind"] == POLICY}
    known = {_key(one) for one in ours}
    for key, found in sorted(live.items()):
        policy = found.get("spec", {}).get("policyName")
        if key[0] == BINDING and key not in known and policy in policies:
            yield f"{BINDING} {key[1]} binds {policy} a second time and is not ours"


def _how(ours: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    """The difference in words: for a binding, which of the ways to leave something out."""
    if "policyName" not in ours:
        fields = sorted(key for key in {*ours, *live} if ours.get(key) != live.get(key))
        return f"differs from the shipped one in {', '.join(f'spec.{field}' for field in fields)}"
    if live.get("policyName") != ours["policyName"]:
        return f"binds {live.get('policyName')} instead of {ours['policyName']}"
    left_out = sorted(live.get("matchResources") or ())
    if left_out:
        return f"does not cover everything (matchResources: {', '.join(left_out)})"
    if "Deny" not in live.get("validationActions", ()):
        return f"does not deny (validationActions: {', '.join(live.get('validationActions', ()))})"
    fields = sorted(key for key in {*ours, *live} if ours.get(key) != live.get(key))
    return f"differs from the shipped one in {', '.join(f'spec.{field}' for field in fields)}"


def _key(obj: Mapping[str, Any]) -> tuple[str, str]:
    return obj["kind"], obj["metadata"]["name"]
