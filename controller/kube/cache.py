"""What the watch has shown: the newest version of every Intent and PlanApproval. One event loop, no locks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

Object = Mapping[str, Any]


def version(obj: Object) -> int:
    """resourceVersions are comparable numbers (KEP-5504)."""
    return int(obj["metadata"]["resourceVersion"])


class Cache:
    """Intents by uid; PlanApprovals by namespace and name."""

    def __init__(self) -> None:
        self._intents: dict[str, Object] = {}
        self._approvals: dict[tuple[str, str], Object] = {}

    def intent(self, uid: str) -> Object | None:
        """The newest seen version."""
        return self._intents.get(uid)

    def intents(self) -> Iterable[Object]:
        """All of them."""
        return tuple(self._intents.values())

    def approval(self, namespace: str, name: str) -> Object | None:
        """The newest seen version."""
        return self._approvals.get((namespace, name))

    def knows(self, plural: str, obj: Object) -> bool:
        """Whether any version of this object was seen before."""
        return self._known(plural, obj) is not None

    def saw_intent(self, obj: Object) -> bool:
        """Keep it if it is news; whether it is."""
        uid = str(obj["metadata"]["uid"])
        known = self._intents.get(uid)
        if known is not None and version(obj) <= version(known):
            return False
        self._intents[uid] = _slim(obj)
        return True

    def saw_approval(self, obj: Object) -> bool:
        """Keep it if it is news; whether it is."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        known = self._approvals.get(key)
        if known is not None and version(obj) <= version(known):
            return False
        self._approvals[key] = _slim_approval(obj)
        return True

    def wrote(self, plural: str, obj: Object) -> bool:
        """Keep the answer to a write of ours; whether somebody else's change came with it, of which no event will be news."""
        known = self._known(plural, obj)
        news = self.saw_intent(obj) if plural == "intents" else self.saw_approval(obj)
        return news and known is not None and _of_others(known) != _of_others(obj)

    def _known(self, plural: str, obj: Object) -> Object | None:
        meta = obj["metadata"]
        return self.intent(meta["uid"]) if plural == "intents" else self.approval(meta["namespace"], meta["name"])

    def lost_intent(self, uid: str) -> None:
        """It is gone."""
        self._intents.pop(uid, None)

    def keep_approvals(self, listed: Set[tuple[str, str]]) -> None:
        """Forget the others. One that was made since the list began is forgotten, too: who needs it asks for it."""
        for key in self._approvals.keys() - listed:
            del self._approvals[key]

    def lost_approval(self, obj: Object) -> str:
        """It is gone; the uid of its Intent."""
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        known = self._approvals.get(key)
        if known is not None and known["metadata"]["uid"] == obj["metadata"]["uid"]:
            del self._approvals[key]  # else a successor of the same name is there already
        return str(obj["spec"]["intent"]["uid"])


def _of_others(obj: Object) -> tuple[object, ...]:
    """What a status does not change; the API server counts a spec's versions as its generation."""
    return tuple(obj["metadata"].get(key) for key in ("generation", "annotations", "deletionTimestamp"))


def _slim(obj: Object) -> Object:
    meta = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
    return {**obj, "metadata": meta}


def _slim_approval(obj: Object) -> Object:
    """Of a plan that nobody has voted on, or that is decided, only the digest is looked at: ten thousand plans wait cheaply."""
    spec, status = obj["spec"], obj.get("status") or {}
    slim = _slim(obj)
    if spec.get("decisions") and status.get("decision", "Pending") == "Pending":
        return slim
    plan = {"digest": spec["plan"]["digest"]} if "plan" in spec else {}
    return {**slim, "spec": {"intent": spec["intent"], "plan": plan, "decisions": spec.get("decisions", [])}}
