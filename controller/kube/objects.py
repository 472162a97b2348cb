"""Objects from the API server into values, and values into objects. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from controller.core.approval import PART_KEY, Shown
from controller.core.digest import approval_name
from controller.core.run import Approval, Intent, Vote
from controller.core.visible import visible
from controller.kube.crd import ACKNOWLEDGE_STORE, API_VERSION, FINALIZER

Object = Mapping[str, Any]
NOTE_BYTES = 1024  # not characters: the API server refuses an event with more
STORE_LABEL = "sisukodo.dev/store"
MANAGED_BY = {"app.kubernetes.io/managed-by": "sisu-kodo"}


def intent(obj: Object) -> Intent:
    """What decide() looks at."""
    meta = obj["metadata"]
    return Intent(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        generation=meta.get("generation", 1),
        resource_version=meta["resourceVersion"],
        spec=obj["spec"],
        status=obj.get("status") or {},
        has_finalizer=FINALIZER in meta.get("finalizers", ()),
        deleting="deletionTimestamp" in meta,
        acknowledged_store=(meta.get("annotations") or {}).get(ACKNOWLEDGE_STORE),
    )


def approval(obj: Object, *, problem: str | None) -> Approval:
    """What decide() looks at; votes under names that the API server authenticated."""
    votes = tuple(
        Vote(approver=d["approver"], verdict=d["verdict"], reason=visible(d.get("reason", "")))
        for d in obj["spec"].get("decisions", ())
    )
    return Approval(
        name=obj["metadata"]["name"],
        uid=obj["metadata"]["uid"],
        digest=obj["spec"]["plan"]["digest"],
        votes=votes,
        problem=problem,
        status=obj.get("status") or {},
    )


def owner_reference(owner: Intent) -> dict[str, Any]:
    """Children go with their Intent."""
    return {
        "apiVersion": API_VERSION,
        "kind": "Intent",
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _meta(owner: Intent, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": owner.namespace,
        "ownerReferences": [owner_reference(owner)],
        "labels": MANAGED_BY,
    }


def plan_approval(owner: Intent, shown: Shown, *, store_id: str, edition: int = 1) -> dict[str, Any]:
    """The PlanApproval, without decisions; the empty list is there so that a JSON patch can append to it.

    The label says which store asks (law 10): an equal plan of another store has the same digest, but its votes are not ours.
    A later edition has a name of its own.
    """
    name = approval_name(owner.name, shown.spec["plan"]["digest"]) + (f"-{edition}" if edition > 1 else "")
    meta = _meta(owner, name)
    return {
        "apiVersion": API_VERSION,
        "kind": "PlanApproval",
        "metadata": {**meta, "labels": {**meta["labels"], STORE_LABEL: store_id}},
        "spec": {**shown.spec, "decisions": []},
    }


def is_ours(found: Object, wanted: Object) -> bool:
    """Whether this object, found under the wanted name, is the one that we would create, not yet used."""
    plain = {k: v for k, v in found["spec"].items() if k != "decisions"}
    expected = {k: v for k, v in wanted["spec"].items() if k != "decisions"}
    same_store = found["metadata"].get("labels", {}).get(STORE_LABEL) == wanted["metadata"]["labels"][STORE_LABEL]
    unused = "consumedBy" not in (found.get("status") or {}) and "deletionTimestamp" not in found["metadata"]
    return same_store and unused and plain == expected


def config_maps(owner: Intent, shown: Shown) -> Iterable[dict[str, Any]]:
    """The spilled parts, immutable."""
    for name, text in shown.parts.items():
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _meta(owner, name),
            "immutable": True,
            "data": {PART_KEY: text},
        }


def event(
    owner: Intent, *, reason: str, message: str, kind: str, key: str, now: datetime, reporter: str
) -> dict[str, Any]:
    """An Event whose name follows from what it says, so that saying it twice changes nothing."""
    suffix = hashlib.sha256(f"{owner.uid}/{reason}/{key}".encode()).hexdigest()[:16]
    return {
        "metadata": {"name": f"{owner.name[:200]}.{suffix}", "namespace": owner.namespace},
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reason": reason,
        "action": reason,
        "type": kind,
        "note": message.encode()[:NOTE_BYTES].decode(errors="ignore"),
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": "Intent",
            "name": owner.name,
            "namespace": owner.namespace,
            "uid": owner.uid,
        },
        "reportingController": "sisukodo.dev/controller",
        "reportingInstance": reporter[:128],
    }
