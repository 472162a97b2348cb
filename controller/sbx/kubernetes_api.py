"""The API server as the kubernetes provider needs it: objects and exec streams of one namespace. On the loop of its user.

Objects stay plain JSON, and one keep-alive session serves all calls. The client library gives what it knows best: where the API
server is, whom it trusts, and the credentials, which may change while we run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.utils.quantity import parse_quantity

from controller.sbx.kubernetes_errors import ApiError
from controller.sbx.kubernetes_exec import PROTOCOLS, follow
from controller.sbx.kubernetes_pod import CONTAINER
from controller.sbx.loop import within

PAGE = 250
Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Objects of one kind, by where the API server has them. `cascade`: gone is one only when what it owns is gone, too."""

    api: str
    plural: str
    cascade: bool = False


PODS = Kind(api="/api/v1", plural="pods")
POLICIES = Kind(api="/apis/networking.k8s.io/v1", plural="networkpolicies")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds. Every wait for the cluster is one of these, or PodSettings.boot."""

    api: float = 20.0  # one answer of the API server
    tool: float = 120.0  # one command of ours in the Pod, uploads and downloads included
    probe: float = 5.0  # between two looks at the Pod while the task's command runs
    busy: float = 60.0  # how long 429, 503, a used-up quota and a create without an answer are waited out
    grace: float = 5.0  # from SIGTERM to SIGKILL at the time limit
    reason: float = 10.0  # for a Pod to say why it ended
    gone: float = 60.0  # for a deleted Pod to be gone, before it is deleted by force
    sweeps: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 60.0)  # looks for a Pod whose creation was not answered


class Api:
    """Every method has its outer deadline. Raises ApiError, Silent, aiohttp.ClientError."""

    def __init__(self, kubeconfig: Path | None, *, namespace: str, bounds: Bounds) -> None:
        """Asks nothing yet. Without a kubeconfig: the service account of the Pod that we run in."""
        self._kubeconfig, self._namespace, self._bounds = kubeconfig, namespace, bounds
        self._opening = asyncio.Lock()
        self._opened: tuple[client.ApiClient, aiohttp.ClientSession] | None = None

    async def close(self) -> None:
        """Ends the session."""
        if self._opened is not None:
            await self._opened[1].close()

    async def create(self, kind: Kind, body: Object) -> Object:
        """The object as it was made. ApiError 409 when one of this name exists."""
        return await self._bounded("POST", self._path(kind), body=body)

    async def get(self, kind: Kind, name: str) -> Object | None:
        """None when there is none."""
        return await self._found(self._path(kind, name))

    async def list_all(self, kind: Kind, selector: str = "") -> list[Object]:
        """Every one with these labels, on all pages. None where the cluster does not know the kind."""
        found: list[Object] = []
        params = {"labelSelector": selector, "limit": str(PAGE)}
        while (page := await self._found(self._path(kind), params)) is not None:
            found += page["items"]
            token = page["metadata"].get("continue")
            if not token:
                break
            params["continue"] = token
        return found

    async def delete(self, kind: Kind, name: str, uid: str, *, force: bool = False) -> None:
        """Asks for exactly this one's end. Another one of its name, or none, is none of our business."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        if kind.cascade:
            body["propagationPolicy"] = "Foreground"
        if force:
            body["gracePeriodSeconds"] = 0
        try:
            await self._bounded("DELETE", self._path(kind, name), body=body)
        except ApiError as e:
            if e.status not in (404, 409):
                raise

    async def execute(
        self,
        name: str,
        command: list[str],
        *,
        stdin: bytes,
        feed: Callable[[str, bytes], None],
        heartbeat: float | None = None,
    ) -> int:
        """Runs a command to its end; its exit code. The only method without a deadline. `heartbeat`: seconds between two pings."""
        api, session = await self._open()
        params = [("container", CONTAINER), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        params += [("command", one) for one in command]
        try:
            opening = session.ws_connect(
                f"{api.configuration.host}{self._path(PODS, name)}/exec",
                params=params,
                protocols=PROTOCOLS,
                headers=await self._headers(api),
                heartbeat=heartbeat,
                max_msg_size=0,
            )
            async with opening as socket:
                return await follow(socket, stdin=stdin, feed=feed)
        except aiohttp.WSServerHandshakeError as e:
            raise ApiError(e.status, e.message) from e

    def _path(self, kind: Kind, name: str = "") -> str:
        return f"{kind.api}/namespaces/{self._namespace}/{kind.plural}" + (f"/{name}" if name else "")

    async def _found(self, path: str, params: Mapping[str, str] | None = None) -> Object | None:
        try:
            return await self._bounded("GET", path, params=params)
        except ApiError as e:
            if e.status == 404:
                return None
            raise

    async def _bounded(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        work = self._call(method, path, params=params, body=body)
        return await within(self._bounds.api, work, f"{method} {path.rsplit('/', 2)[-1]}")

    async def _call(self, method: str, path: str, *, params: Mapping[str, str] | None, body: Object | None) -> Object:
        api, session = await self._open()
        asked: AbstractAsyncContextManager[aiohttp.ClientResponse] = session.request(
            method, f"{api.configuration.host}{path}", params=params, json=body, headers=await self._headers(api)
        )
        async with asked as answer:
            text = await answer.text(errors="replace")
            try:
                found = json.loads(text)
            except ValueError:
                found = None
            if answer.status < 300 and isinstance(found, dict):
                return found
            message = found.get("message") if isinstance(found, dict) else text
            status = answer.status if answer.status >= 300 else 502  # whoever answered, it was no API server
            raise ApiError(status, str(message or answer.reason)[:2000], retry_after=_retry_after(answer))

    async def _open(self) -> tuple[client.ApiClient, aiohttp.ClientSession]:
        async with self._opening:
            if self._opened is None:
                api = await _connect(self._kubeconfig)
                # A session of our own: the library's parses every object into classes, and pools 100 connections at most.
                connector = aiohttp.TCPConnector(ssl=api.rest_client.ssl_context, limit=0)
                self._opened = (
                    api,
                    aiohttp.ClientSession(connector=connector, proxy=api.configuration.proxy or None),
                )
        return self._opened

    async def _headers(self, api: client.ApiClient) -> dict[str, str]:
        auth = await api.configuration.auth_settings()  # reads a service account's token again when it was renewed
        return {str(one["key"]): str(one["value"]) for one in auth.values()}


def same_amount(one: object, other: object) -> bool:
    """Whether two quantities are the same, however they are written (1000m, 1). What is no quantity is the same as nothing else."""
    try:
        return bool(parse_quantity(one) == parse_quantity(other))  # type: ignore[no-untyped-call]
    except (ValueError, TypeError):
        return False


async def _connect(kubeconfig: Path | None) -> client.ApiClient:
    if kubeconfig is not None:
        api: client.ApiClient = await config.new_client_from_config(  # type: ignore[no-untyped-call]
            config_file=str(kubeconfig), persist_config=False
        )
        return api
    settings = client.Configuration()
    config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    return client.ApiClient(configuration=settings)


def _retry_after(answer: aiohttp.ClientResponse) -> float:
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0
