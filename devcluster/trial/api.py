"""The people's side: a small asynchronous client of the API server, and a watch that remembers when each phase was first seen.

aiohttp and not kubectl: starting kubectl takes longer than what is measured. What kubectl itself takes is a row of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import yaml

from devcluster.errors import DevclusterError
from devcluster.trial.numbers import counters

RESOURCES = "/apis/sisukodo.dev/v1alpha1"
APPROVE = [{"op": "add", "path": "/spec/decisions/-", "value": {"verdict": "Approve"}}]
ENDED = frozenset(("Succeeded", "Failed", "RetriesExceeded", "Canceled", "Rejected", "Expired"))
JSON_PATCH = "application/json-patch+json"
LINE_BYTES = 1024 * 1024
EVENT_BYTES = len('{"type":"MODIFIED","object":}\n')
_EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Seconds since 1970, steady, and comparable with PostgreSQL's clock on the same machine."""
    return _EPOCH + time.perf_counter()


class Refused(DevclusterError):
    """The server answered, but not with success."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Requests as one person, over kept-open connections."""

    def __init__(self, kubeconfig: Path) -> None:
        parsed = yaml.safe_load(kubeconfig.read_text())
        cluster, user = parsed["clusters"][0]["cluster"], parsed["users"][0]["user"]
        ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._session = aiohttp.ClientSession(
            cluster["server"],
            headers={"Authorization": f"Bearer {user['token']}"},
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=ca), limit=64),
            timeout=aiohttp.ClientTimeout(total=30),
            read_bufsize=LINE_BYTES,
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.close()

    async def send(self, verb: str, path: str, *, body: Any = None, content_type: str = "application/json") -> Any:
        """The answer's JSON. Raises DevclusterError with the server's words."""
        data = None if body is None else json.dumps(body)
        async with self._session.request(verb, path, data=data, headers={"Content-Type": content_type}) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise Refused(f"{verb} {path}: {answer.status}: {text[:500]}", status=answer.status)
            return json.loads(text)

    async def create_intent(self, namespace: str, name: str, spec: Mapping[str, Any]) -> Any:
        """The Intent as created."""
        body = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "metadata": {"name": name}, "spec": spec}
        return await self.send("POST", f"{RESOURCES}/namespaces/{namespace}/intents", body=body)

    async def approve(self, namespace: str, approval: str) -> None:
        """What `kubectl patch planapproval … --type=json` sends."""
        path = f"{RESOURCES}/namespaces/{namespace}/planapprovals/{approval}"
        await self.send("PATCH", path, body=APPROVE, content_type=JSON_PATCH)

    async def requests(self) -> dict[str, float]:
        """How many requests for our kinds the API server has served so far, by what they were."""
        async with self._session.get("/metrics") as answer:
            text = await answer.text()
        found: dict[str, float] = {}
        for labels, value in counters(text, "apiserver_request_total"):
            if labels["verb"] in ("WATCH", "CONNECT") or labels["resource"] in ("", "leases"):
                continue
            path = "/".join(filter(None, (labels["resource"], labels["subresource"])))
            key = f"{labels['verb']} {path}{' (dry run)' if labels.get('dry_run') else ''}"
            found[key] = found.get(key, 0.0) + value
        return found

    async def lines(self, path: str) -> aiohttp.ClientResponse:
        """An answer whose body is read as it comes."""
        answer = await self._session.get(path, timeout=aiohttp.ClientTimeout(total=None))
        if answer.status != 200:
            raise Refused(f"GET {path}: {answer.status}: {(await answer.text())[:500]}", status=answer.status)
        return answer

    async def pages(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """A list, page by page."""
        token = ""
        while True:
            page = await self.send("GET", f"{path}?limit=500&continue={token}")
            yield page
            token = page["metadata"].get("continue") or ""
            if not token:
                return


@dataclass(frozen=True)
class Sight:
    """An Intent as the watch first showed it in a phase. `phase` is empty before it has one."""

    at: float
    phase: str
    status: Mapping[str, Any]


class Phases:
    """`async with Phases(api, namespace) as seen`: one watch, remembered per Intent and phase; a lasting one survives breaks."""

    def __init__(self, api: Api, namespace: str, *, lasting: bool = False) -> None:
        self._api, self._path = api, f"{RESOURCES}/namespaces/{namespace}/intents"
        self._lasting = lasting
        self._seen: dict[str, list[Sight]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self._bytes: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Phases:
        listed = await self._api.send("GET", f"{self._path}?limit=1")
        self._task = asyncio.create_task(self._follow(await self._watch(listed["metadata"]["resourceVersion"])))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self, version: str) -> aiohttp.ClientResponse:
        return await self._api.lines(f"{self._path}?watch=1&resourceVersion={version}")

    async def _follow(self, answer: aiohttp.ClientResponse) -> None:
        while True:
            try:
                await self._read(answer)
            except (aiohttp.ClientError, TimeoutError):
                if not self._lasting:
                    raise
            if not self._lasting:
                raise DevclusterError("the API server ended the watch")
            answer = await self._again()

    async def _again(self) -> aiohttp.ClientResponse:
        """List, and watch from there, as soon as the API server answers."""
        while True:
            try:
                async for page in self._api.pages(self._path):
                    for obj in page["items"]:
                        self._saw(now(), obj)
                    version = page["metadata"]["resourceVersion"]
                return await self._watch(version)
            except (aiohttp.ClientError, TimeoutError, Refused):
                await asyncio.sleep(0.1)

    async def _read(self, answer: aiohttp.ClientResponse) -> None:
        async with answer:
            async for line in answer.content:
                at, event = now(), json.loads(line)
                if event["type"] == "ERROR":
                    return
                if event["type"] in ("ADDED", "MODIFIED"):
                    name = event["object"]["metadata"]["name"]
                    self._bytes[name] = max(len(line) - EVENT_BYTES, self._bytes.get(name, 0))
                    self._saw(at, event["object"])

    def _saw(self, at: float, obj: Mapping[str, Any]) -> None:
        name, status = obj["metadata"]["name"], obj.get("status") or {}
        self._seen.setdefault(name, []).append(Sight(at, status.get("phase", ""), status))
        self._changed.setdefault(name, asyncio.Event()).set()

    def first(self, name: str, phase: str) -> float | None:
        """When this Intent was first seen in this phase, if it was."""
        return next((sight.at for sight in self._seen.get(name, ()) if sight.phase == phase), None)

    def told(self, name: str) -> float:
        """When this Intent was first seen with a status. Raises StopIteration when it never was."""
        return next(sight.at for sight in self._seen[name] if sight.phase)

    def news(self) -> list[float]:
        """When any Intent was seen in a phase that it had not been in before."""
        return sorted(
            at
            for name, sights in self._seen.items()
            for phase in {sight.phase for sight in sights}
            if (at := self.first(name, phase)) is not None
        )

    def largest(self, name: str) -> int:
        """Bytes of JSON that this Intent had at its largest, of all versions that the watch has shown."""
        return self._bytes.get(name, 0)

    def ended(self, name: str) -> Sight | None:
        """The latest sight of this Intent if it has ended. Raises what ended the watch."""
        assert self._task is not None
        if self._task.done():
            self._task.result()
        last = self._seen[name][-1] if name in self._seen else None
        return last if last is not None and last.phase in ENDED else None

    def versions(self, name: str) -> int:
        """How many versions of this Intent the watch has shown."""
        return len(self._seen.get(name, ()))

    async def wait(self, name: str, phase: str, *, seconds: float = 60) -> Sight:
        """The first sight of this phase ("" is the first sight of all). Raises when it ends in another one, or in time in none."""
        assert self._task is not None
        deadline, changed = now() + seconds, self._changed.setdefault(name, asyncio.Event())
        while True:
            for sight in self._seen.get(name, ()):
                if sight.phase == phase or not phase:
                    return sight
                if sight.phase in ENDED:
                    raise DevclusterError(f"{name} ended as {sight.phase}: {sight.status.get('reason')}")
            if self._task.done():
                self._task.result()
            if now() > deadline:
                last = self._seen.get(name, [Sight(0, "unseen", {})])[-1]
                raise DevclusterError(f"{name} was not {phase} within {seconds:.0f} s; it is {last.phase}")
            changed.clear()
            try:
                await asyncio.wait_for(changed.wait(), 1)
            except TimeoutError:
                continue
