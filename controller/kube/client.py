"""Every call to the API server, as the controller's service account. Errors leave as Conflict, Unavailable or Permanent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from controller.core.errors import Conflict, Permanent, Unavailable
from controller.kube.crd import FINALIZER, GROUP

VERSION = "v1alpha1"
MERGE, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"
TIMEOUT_SECONDS = 20
PAGE = 250

Object = Mapping[str, Any]


def message_of(e: ApiException) -> str:
    """The server's own words."""
    try:
        return str(json.loads(e.body or "{}").get("message") or e.reason)
    except (ValueError, AttributeError):
        return str(e.reason)


async def _call(awaitable: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(awaitable, TIMEOUT_SECONDS)
    except ApiException as e:
        if e.status in (404, 409, 410, 422):
            raise Conflict(f"{e.status}: {message_of(e)}") from e
        if e.status in (429,) or e.status >= 500:
            raise Unavailable(f"API server: {e.status}: {message_of(e)}") from e
        raise Permanent(f"API server: {e.status}: {message_of(e)}") from e
    except (aiohttp.ClientError, TimeoutError) as e:
        raise Unavailable(f"API server does not answer: {type(e).__name__}") from e


async def connect(kubeconfig: Path | None) -> client.ApiClient:
    """From a kubeconfig file, or in a cluster from the mounted service account."""
    # Proxies and .netrc are not for the API server, and looking for them takes two threads per request.
    settings = client.Configuration(client_session_kwargs={"trust_env": False})
    if kubeconfig is not None:
        await config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=str(kubeconfig), client_configuration=settings, persist_config=False
        )
    else:
        config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    return client.ApiClient(configuration=settings)


class KubeCluster:
    """Thin: one method, one request (lists read all pages)."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._events = client.EventsV1Api(api)

    def intents(self) -> AsyncIterator[Object]:
        """All Intents of all namespaces."""
        return self._list(GROUP, VERSION, "intents")

    def approvals(self) -> AsyncIterator[Object]:
        """All PlanApprovals of all namespaces."""
        return self._list(GROUP, VERSION, "planapprovals")

    async def list_all(self, resource: str) -> Sequence[Object]:
        """All objects of a cluster-scoped resource of admissionregistration.k8s.io/v1 (identity.AdmissionReader)."""
        return [obj async for obj in self._list("admissionregistration.k8s.io", "v1", resource)]

    async def intent(self, namespace: str, name: str) -> Object | None:
        """One Intent, or None."""
        return await self._found(self._custom.get_namespaced_custom_object(GROUP, VERSION, namespace, "intents", name))

    async def approval(self, namespace: str, name: str) -> Object | None:
        """One PlanApproval, read now, or None."""
        return await self._found(
            self._custom.get_namespaced_custom_object(GROUP, VERSION, namespace, "planapprovals", name)
        )

    async def crd_exists(self, plural: str = "intents") -> bool:
        """Whether this is a kind at all, now."""
        name = f"{plural}.{GROUP}"
        call = self._custom.get_cluster_custom_object("apiextensions.k8s.io", "v1", "customresourcedefinitions", name)
        return await self._found(call) is not None

    async def namespace_exists(self, name: str) -> bool:
        """Whether the namespace is there."""
        return await self._found(self._core.read_namespace(name)) is not None

    async def patch_status(
        self, plural: str, namespace: str, name: str, patch: Mapping[str, Any], *, uid: str
    ) -> Object:
        """Merge-patch the status subresource of exactly this object. Raises Conflict when another one has its name now."""
        body = {"metadata": {"uid": uid}, "status": patch}
        call = self._custom.patch_namespaced_custom_object_status(
            GROUP, VERSION, namespace, plural, name, body, _content_type=MERGE
        )
        return dict(await _call(call))

    async def set_finalizer(self, obj: Object, *, present: bool) -> Object:
        """Add or remove our finalizer on exactly this version of the Intent. Raises Conflict when it changed meanwhile."""
        meta = obj["metadata"]
        others = [f for f in meta.get("finalizers", ()) if f != FINALIZER]
        patch = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": meta["resourceVersion"]},
            {"op": "add", "path": "/metadata/finalizers", "value": [*others, FINALIZER] if present else others},
        ]
        call = self._custom.patch_namespaced_custom_object(
            GROUP, VERSION, meta["namespace"], "intents", meta["name"], patch, _content_type=JSON_PATCH
        )
        return dict(await _call(call))

    async def create_approval(self, body: Object) -> Object:
        """Create a PlanApproval. Raises Conflict when one of this name exists."""
        namespace = body["metadata"]["namespace"]
        call = self._custom.create_namespaced_custom_object(GROUP, VERSION, namespace, "planapprovals", dict(body))
        return dict(await _call(call))

    async def try_forged(self, body: Object) -> str | None:
        """Dry-run a write that admission must deny: its message, or None when it was let through."""
        namespace = body["metadata"]["namespace"]
        call = self._custom.create_namespaced_custom_object(
            GROUP, VERSION, namespace, "planapprovals", dict(body), dry_run="All"
        )
        try:
            await _call(call)
        except (Permanent, Conflict) as e:
            return str(e)
        return None

    async def config_map(self, namespace: str, name: str, key: str) -> str | None:
        """One value of a ConfigMap, or None."""
        try:
            found = await _call(self._core.read_namespaced_config_map(name, namespace))
        except Conflict as e:
            if str(e).startswith("404"):
                return None
            raise
        return (found.data or {}).get(key)

    async def create_config_map(self, body: Any) -> None:
        """Create it; one of the same name is left as it is (its content is compared when it is used)."""
        try:
            await _call(self._core.create_namespaced_config_map(body["metadata"]["namespace"], body))
        except Conflict as e:
            if not str(e).startswith("409"):
                raise

    async def emit(self, body: Any) -> None:
        """Create an Event of events.k8s.io; one of the same name was emitted before."""
        try:
            await _call(self._events.create_namespaced_event(body["metadata"]["namespace"], body))
        except Conflict as e:
            if not str(e).startswith(("409", "404")):  # 404: the namespace is going away
                raise

    async def delete_intent(self, namespace: str, name: str, uid: str) -> None:
        """Delete exactly this Intent."""
        body = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid))
        call = self._custom.delete_namespaced_custom_object(GROUP, VERSION, namespace, "intents", name, body=body)
        await self._found(call)

    async def _found(self, awaitable: Awaitable[Any]) -> Object | None:
        try:
            found = await _call(awaitable)
            return found if isinstance(found, Mapping) else {}
        except Conflict as e:
            if str(e).startswith("404"):
                return None
            raise

    async def _list(self, group: str, version: str, plural: str) -> AsyncIterator[Object]:
        """Page by page: ten thousand objects at once would be what the process' memory is sized by."""
        token = ""
        while True:
            more: dict[str, Any] = {"_continue": token} if token else {}
            page = await _call(self._custom.list_cluster_custom_object(group, version, plural, limit=PAGE, **more))
            for item in page["items"]:
                yield item
            token = page["metadata"].get("continue") or ""
            if not token:
                return


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7386: what turns old into new. Lists are replaced whole."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = merge_patch(before, value)
            if inner:
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch
