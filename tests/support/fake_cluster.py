"""An API server in memory: the twin of controller.kube.client.KubeCluster, and hands for the people who use the cluster.

resourceVersions grow over all objects, status is a subresource, merge patches drop nulls, deletion waits for finalizers and
takes owned objects along. Errors leave as the client's do: Conflict whose text begins with the HTTP status, and whatever a
test puts into `fail`. `watchers` see every change at once; `calls` counts requests by method.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from controller.core.errors import Conflict
from controller.kube import identity
from controller.kube.client import KubeCluster
from controller.kube.crd import ACKNOWLEDGE_STORE, API_VERSION, FINALIZER

Object = Mapping[str, Any]
NAMESPACE, SERVICE_ACCOUNT = "sisu-kodo-system", "sisu-kodo-controller"
WRITES = ("patch_status", "set_finalizer", "create_approval", "create_config_map", "emit", "delete_intent")
DENIED = f"admission denied the request: {identity.FORGED_WRITE_ANSWER}"


def copied(obj: Any) -> Any:
    """What goes over the wire."""
    return json.loads(json.dumps(obj))


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


@dataclass(kw_only=True)
class FakeCluster:
    """Objects by (plural, namespace, name)."""

    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    policies: list[dict[str, Any]] = field(default_factory=lambda: identity.shipped(NAMESPACE, SERVICE_ACCOUNT))
    forged_answer: str | None = DENIED
    namespaces: set[str] = field(default_factory=lambda: {"team"})
    has_crd: bool = True
    hidden: set[str] = field(default_factory=set)  # uids that a list leaves out
    watchers: list[Callable[[str, str, Object], None]] = field(default_factory=list)
    fail: dict[str, list[Exception]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    version: int = 0

    @property
    def client(self) -> KubeCluster:
        """As the type that reconcile asks for."""
        return cast("KubeCluster", self)

    @property
    def writes(self) -> int:
        """How many requests so far could have changed something."""
        return sum(self.calls[name] for name in WRITES)

    # ------------------------------------------------------------------ KubeCluster

    async def intents(self) -> AsyncIterator[Object]:
        self._called("intents")
        for o in self._all("intents"):
            if o["metadata"]["uid"] not in self.hidden:
                yield copied(o)

    async def approvals(self) -> AsyncIterator[Object]:
        self._called("approvals")
        for o in self._all("planapprovals"):
            yield copied(o)

    async def list_all(self, resource: str) -> Sequence[Object]:
        self._called("list_all")
        kind = next(k for k, plural in identity.RESOURCES.items() if plural == resource)
        return [{k: v for k, v in copied(p).items() if k != "kind"} for p in self.policies if p["kind"] == kind]

    async def intent(self, namespace: str, name: str) -> Object | None:
        self._called("intent")
        return self._get("intents", namespace, name)

    async def approval(self, namespace: str, name: str) -> Object | None:
        self._called("approval")
        return self._get("planapprovals", namespace, name)

    async def crd_exists(self) -> bool:
        self._called("crd_exists")
        return self.has_crd

    async def namespace_exists(self, name: str) -> bool:
        self._called("namespace_exists")
        return name in self.namespaces

    async def patch_status(
        self, plural: str, namespace: str, name: str, patch: Mapping[str, Any], *, uid: str
    ) -> Object:
        self._called("patch_status")
        obj = self._found(plural, namespace, name)
        if uid != obj["metadata"]["uid"]:
            raise Conflict("409: the object has been modified: UID in precondition does not match")
        return self._changed(plural, {**obj, "status": merged(obj.get("status", {}), copied(patch))})

    async def set_finalizer(self, obj: Object, *, present: bool) -> Object:
        self._called("set_finalizer")
        meta = obj["metadata"]
        live = self._found("intents", meta["namespace"], meta["name"])
        if live["metadata"]["resourceVersion"] != meta["resourceVersion"]:
            raise Conflict("422: the server rejected our request due to an error in our request")
        others = [f for f in live["metadata"].get("finalizers", ()) if f != FINALIZER]
        finalizers = [*others, FINALIZER] if present else others
        return self._changed("intents", {**live, "metadata": {**live["metadata"], "finalizers": finalizers}})

    async def create_approval(self, body: Object) -> Object:
        self._called("create_approval")
        return self.create("planapprovals", body)

    async def try_forged(self, body: Object) -> str | None:
        self._called("try_forged")
        assert body["spec"]["decisions"], "a forgery is born with a decision"
        return self.forged_answer

    async def config_map(self, namespace: str, name: str, key: str) -> str | None:
        self._called("config_map")
        found = self._get("configmaps", namespace, name)
        return None if found is None else found.get("data", {}).get(key)

    async def create_config_map(self, body: Any) -> None:
        self._called("create_config_map")
        if self._get("configmaps", body["metadata"]["namespace"], body["metadata"]["name"]) is None:
            self.create("configmaps", body)

    async def emit(self, body: Any) -> None:
        self._called("emit")
        if self._get("events", body["metadata"]["namespace"], body["metadata"]["name"]) is None:
            self.create("events", body)

    async def delete_intent(self, namespace: str, name: str, uid: str) -> None:
        self._called("delete_intent")
        found = self._get("intents", namespace, name)
        if found is None:
            return
        if found["metadata"]["uid"] != uid:
            raise Conflict("409: the UID in the precondition does not match")
        self.delete("intents", name, namespace=namespace)

    # ------------------------------------------------------------------ what people do

    def create(self, plural: str, body: Object) -> Object:
        """A new object with a uid. Raises Conflict when one of this name exists."""
        meta = body["metadata"]
        if (plural, meta["namespace"], meta["name"]) in self.objects:
            raise Conflict(f"409: {plural} {meta['name']!r} already exists")
        self.version += 1
        plain = {k: v for k, v in copied(body).items() if k != "status"}
        plain["metadata"] = {**plain["metadata"], "uid": f"uid-{self.version}", "generation": 1}
        return self._put(plural, plain, "ADDED")

    def apply(self, name: str = "fix-median", *, namespace: str = "team", **spec: Any) -> str:
        """kubectl apply of an Intent, new or known; its uid."""
        found = self.objects.get(("intents", namespace, name))
        if found is not None:
            self._edit("intents", name, namespace, lambda o: {**o, "spec": {**o["spec"], **spec}})
            return str(found["metadata"]["uid"])
        wanted = {"goal": "median() is wrong", "requestedBy": "carol@corp", **spec}
        body = {
            "apiVersion": API_VERSION,
            "kind": "Intent",
            "metadata": {"name": name, "namespace": namespace},
            "spec": wanted,
        }
        return str(self.create("intents", body)["metadata"]["uid"])

    def vote(self, name: str, approver: str = "alice@corp", verdict: str = "Approve", reason: str = "") -> None:
        """kubectl patch planapproval, admitted."""
        one = {"approver": approver, "verdict": verdict, **({"reason": reason} if reason else {})}
        self.edit_spec("planapprovals", name, lambda spec: {**spec, "decisions": [*spec["decisions"], one]})

    def acknowledge(self, name: str, store_id: str) -> None:
        """kubectl annotate intent."""

        def annotated(obj: dict[str, Any]) -> dict[str, Any]:
            return {**obj, "metadata": {**obj["metadata"], "annotations": {ACKNOWLEDGE_STORE: store_id}}}

        self._edit("intents", name, "team", annotated)

    def edit_spec(self, plural: str, name: str, change: Callable[[Any], Any], *, namespace: str = "team") -> None:
        """Somebody with every right changes a spec."""
        self._edit(plural, name, namespace, lambda o: {**o, "spec": change(copied(o["spec"]))})

    def edit_data(self, name: str, change: Callable[[str], str], *, namespace: str = "team") -> None:
        """Somebody with every right replaces a ConfigMap."""
        self._edit("configmaps", name, namespace, lambda o: {**o, "data": {k: change(v) for k, v in o["data"].items()}})

    def delete(self, plural: str, name: str, *, namespace: str = "team", force: bool = False) -> None:
        """kubectl delete; `force` takes finalizers off first."""
        obj = self._found(plural, namespace, name)
        meta = {**obj["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
        self._changed(plural, {**obj, "metadata": {**meta, "finalizers": [] if force else meta.get("finalizers", [])}})

    def get(self, plural: str, name: str, *, namespace: str = "team") -> dict[str, Any]:
        """kubectl get -o json."""
        return dict(copied(self._found(plural, namespace, name)))

    def of_kind(self, plural: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [copied(o) for o in self._all(plural)]

    # ------------------------------------------------------------------ inside

    def _called(self, method: str) -> None:
        self.calls[method] += 1
        if self.fail.get(method):
            raise self.fail[method].pop(0)

    def _all(self, plural: str) -> Iterator[dict[str, Any]]:
        return (o for (p, _, _), o in list(self.objects.items()) if p == plural)

    def _get(self, plural: str, namespace: str, name: str) -> Object | None:
        found = self.objects.get((plural, namespace, name))
        return None if found is None else dict(copied(found))

    def _found(self, plural: str, namespace: str, name: str) -> dict[str, Any]:
        if (plural, namespace, name) not in self.objects:
            raise Conflict(f"404: {plural} {name!r} not found")
        return self.objects[plural, namespace, name]

    def _edit(self, plural: str, name: str, namespace: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        obj = self._found(plural, namespace, name)
        new = change(obj)
        if new.get("spec") != obj.get("spec"):
            new = {**new, "metadata": {**new["metadata"], "generation": obj["metadata"]["generation"] + 1}}
        self._changed(plural, new)

    def _changed(self, plural: str, new: dict[str, Any]) -> Object:
        meta = new["metadata"]
        if new == self.objects[plural, meta["namespace"], meta["name"]]:
            return dict(copied(new))  # the API server writes nothing, and nobody sees an event
        if "deletionTimestamp" in meta and not meta.get("finalizers"):
            return self._gone(plural, new)
        self.version += 1
        return self._put(plural, new, "MODIFIED")

    def _put(self, plural: str, obj: dict[str, Any], kind: str) -> Object:
        meta = {**obj["metadata"], "resourceVersion": str(self.version)}
        new = self.objects[plural, meta["namespace"], meta["name"]] = {**copied(obj), "metadata": meta}
        self._tell(plural, kind, new)
        return dict(copied(new))

    def _gone(self, plural: str, obj: dict[str, Any]) -> Object:
        meta = obj["metadata"]
        del self.objects[plural, meta["namespace"], meta["name"]]
        self.version += 1
        last = {**obj, "metadata": {**meta, "resourceVersion": str(self.version)}}
        self._tell(plural, "DELETED", last)
        for (other, _, _), child in list(self.objects.items()):
            if meta["uid"] in {o["uid"] for o in child["metadata"].get("ownerReferences", ())}:
                self._gone(other, child)
        return dict(copied(last))

    def _tell(self, plural: str, kind: str, obj: Object) -> None:
        for watcher in tuple(self.watchers):
            watcher(plural, kind, copied(obj))
