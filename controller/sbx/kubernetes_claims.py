"""Sandboxes from warm pools of agent-sandbox (agents.x-k8s.io): a claim instead of a Pod that we make. Data only, no I/O.

A pool serves a task when its template says what we would have made, and the Pod that it gives must say so, too: who writes a
template decides nothing that a person approved. docs/adr/0016.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from controller.core.contract import ErrCode
from controller.core.model import Owner
from controller.sbx import kubernetes_pod
from controller.sbx.kubernetes_api import Kind, same_amount
from controller.sbx.kubernetes_pod import EGRESS, PodSettings
from controller.sbx.task import Verdict

GROUP = "extensions.agents.x-k8s.io/v1beta1"
# Foreground: the claim is gone when its Sandbox and the Pod are.
CLAIMS = Kind(api=f"/apis/{GROUP}", plural="sandboxclaims", cascade=True)
POOLS = Kind(api=f"/apis/{GROUP}", plural="sandboxwarmpools")
TEMPLATES = Kind(api=f"/apis/{GROUP}", plural="sandboxtemplates")
# What the API server, its admission and the scheduler fill in. None of it widens what a task may do.
FILLED_IN = frozenset(
    (
        *("nodeName", "schedulerName", "serviceAccount", "serviceAccountName", "imagePullSecrets"),
        *("priority", "priorityClassName", "preemptionPolicy", "overhead"),
        *("terminationMessagePath", "terminationMessagePolicy"),
    )
)
AT_LEAST = frozenset(("tolerations", "nodeSelector"))  # admission and RuntimeClasses add to them
AMOUNTS = frozenset(("cpu", "memory", "ephemeral-storage", "sizeLimit"))
OVER = ("ClaimExpired", "SandboxExpired")  # reasons that no waiting changes

Object = dict[str, Any]


def unfit(template: Mapping[str, Any], wanted: Object) -> str | None:
    """Why Pods of this SandboxTemplate are not what was approved (`wanted`: kubernetes_pod.template), or None."""
    spec = template["spec"]
    if spec.get("networkPolicyManagement") != "Unmanaged":
        # NetworkPolicies only ever add: agent-sandbox' own would open the internet to Pods that may reach nothing.
        return "spec.networkPolicyManagement is not Unmanaged"
    if spec.get("volumeClaimTemplates"):
        return "spec.volumeClaimTemplates: a task has no lasting volumes"
    return strange(spec["podTemplate"], wanted)


def strange(pod: Mapping[str, Any], wanted: Object) -> str | None:
    """Where a Pod that somebody else made is not what we would have made, or None."""
    label, found = wanted["metadata"]["labels"][EGRESS], ((pod.get("metadata") or {}).get("labels") or {}).get(EGRESS)
    if found != label:
        return f"label {EGRESS} is {found!r}, {label!r} was approved"
    return _difference(wanted["spec"], pod["spec"], "spec")


def claim(owner: Owner, *, pool: str, settings: PodSettings, end: dt.datetime) -> Object:
    """The SandboxClaim, which ends by itself at `end` (UTC). It carries the owner's mark, for a Pod of a pool cannot."""
    return {
        "apiVersion": GROUP,
        "kind": "SandboxClaim",
        "metadata": kubernetes_pod.mark(owner, settings=settings),
        "spec": {
            "warmPoolRef": {"name": pool},
            "lifecycle": {"shutdownTime": end.strftime("%Y-%m-%dT%H:%M:%SZ"), "shutdownPolicy": "DeleteForeground"},
        },
    }


def pool(name: str, template: Object, *, settings: PodSettings, replicas: int) -> tuple[Object, Object]:
    """A SandboxTemplate and a SandboxWarmPool for tasks that want this `kubernetes_pod.template`."""
    metadata = {"name": name, "namespace": settings.namespace}
    made_of = {"networkPolicyManagement": "Unmanaged", "podTemplate": template}
    warm = {"replicas": replicas, "sandboxTemplateRef": {"name": name}, "updateStrategy": {"type": "Recreate"}}
    return (
        {"apiVersion": GROUP, "kind": "SandboxTemplate", "metadata": metadata, "spec": made_of},
        {"apiVersion": GROUP, "kind": "SandboxWarmPool", "metadata": dict(metadata), "spec": warm},
    )


def pod_of(claim: Mapping[str, Any]) -> str | None:
    """The name of the Pod that the claim was given; None while it has none. A Pod has its Sandbox's name."""
    name = ((claim.get("status") or {}).get("sandbox") or {}).get("name")
    return name if isinstance(name, str) and name else None


def of_claim(claim: Mapping[str, Any]) -> Verdict | None:
    """Why a claim will never have a Pod; None while it may."""
    if "deletionTimestamp" in claim["metadata"]:
        return Verdict(code=ErrCode.LOST, note="the SandboxClaim was deleted before its Pod ran")
    for one in (claim.get("status") or {}).get("conditions") or ():
        if one.get("reason") in OVER:
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"no Pod for the SandboxClaim: {one['reason']}")
    return None


def _difference(wanted: Any, found: Any, path: str) -> str | None:
    """The first place where they differ, beyond what is filled in."""
    name = path.rpartition(".")[2]
    if _same(name, wanted, found):
        return None
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | (found.keys() - FILLED_IN))
        differences = (_difference(wanted.get(key), found.get(key), f"{path}.{key}") for key in keys)
        return next(filter(None, differences), None)
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return next(filter(None, (_difference(*pair, f"{path}.{n}") for n, pair in pairs)), None)
    return f"{path} is {found!r}, {wanted!r} was approved"[:300]


def _same(name: str, wanted: Any, found: Any) -> bool:
    if name in AT_LEAST:
        return _within(wanted or [], found or [])
    if name in AMOUNTS:
        return same_amount(wanted, found)
    return bool(wanted == found) or (wanted in (None, [], {}) and found in (None, [], {}))


def _within(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(found, dict):
        return wanted.items() <= found.items()
    return all(one in found for one in wanted)
