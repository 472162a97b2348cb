"""E2B's control plane over a Host, and the server that serves it together with envd on one port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from devcluster.e2b import envd
from devcluster.e2b.envd import FAULTS, HOST
from devcluster.e2b.faults import Faults
from devcluster.e2b.host import SIZE, Full, Host, Sandbox

ENVD_VERSION = "0.6.7"
REAP_SECONDS = 0.1
KEY = web.AppKey("key", str)
PAGE = web.AppKey("page", int)
CREATES = web.AppKey("creates", list[dict[str, Any]])


def application(host: Host, *, key: str, page: int = 100, faults: Faults | None = None) -> web.Application:
    """`page` is the most that a list answers at once; `faults` are for tests."""
    faults = faults or Faults()
    app = web.Application(middlewares=[_authenticate, faults.middleware], client_max_size=1 << 30)
    app[HOST], app[KEY], app[PAGE], app[CREATES], app[FAULTS] = host, key, page, [], faults
    app.add_routes(
        [
            web.post("/v2/sandboxes", _create),
            web.get("/v2/sandboxes", _list),
            web.get("/sandboxes/{id}", _info),
            web.delete("/sandboxes/{id}", _kill),
            web.post("/sandboxes/{id}/timeout", _timeout),
            web.get("/templates/{id}", _template),
            *envd.routes(),
        ]
    )
    app.cleanup_ctx.append(_life)
    return app


def refusal(status: int, message: str) -> web.Response:
    """An error in E2B's form."""
    return web.json_response({"code": status, "message": message}, status=status)


@web.middleware
async def _authenticate(request: web.Request, handler: Any) -> web.StreamResponse:
    ours = request.path.startswith(("/v2/", "/sandboxes/", "/templates/"))
    if ours and request.headers.get("X-API-KEY") != request.app[KEY]:
        return refusal(401, "Invalid API key")
    answer: web.StreamResponse = await handler(request)
    return answer


async def _create(request: web.Request) -> web.Response:
    host, asked = request.app[HOST], await request.json()
    request.app[CREATES].append(asked)
    template = asked["templateID"]
    if template not in host.templates:
        return refusal(404, f"template {template} not found")
    denied = asked.get("allow_internet_access") is False
    if not denied:
        return refusal(400, "this server has no network: only allow_internet_access=false can be had")
    options = {"metadata": asked.get("metadata") or {}, "envs": asked.get("envVars") or {}}
    try:
        sandbox = await asyncio.to_thread(host.create, template, seconds=asked.get("timeout", 300), **options)
    except Full as e:
        return refusal(429, str(e))
    return web.json_response({**_listed(sandbox), "envdAccessToken": sandbox.token}, status=201)


async def _list(request: web.Request) -> web.Response:
    # The SDK quotes names and values, and then the whole.
    pairs = urllib.parse.parse_qsl(request.query.get("metadata", ""))
    wanted = {urllib.parse.unquote(name): urllib.parse.unquote(value) for name, value in pairs}
    found = [s for s in request.app[HOST].sandboxes.values() if wanted.items() <= s.metadata.items()]
    begin = int(request.query.get("nextToken") or 0)
    end = begin + min(int(request.query.get("limit", 100)), request.app[PAGE])
    more = {"x-next-token": str(end)} if len(found) > end else {}
    return web.json_response([_listed(s) for s in found[begin:end]], headers=more)


async def _info(request: web.Request) -> web.Response:
    sandbox = request.app[HOST].sandboxes.get(request.match_info["id"])
    return web.json_response(_listed(sandbox)) if sandbox else refusal(404, "Sandbox not found")


async def _kill(request: web.Request) -> web.Response:
    killed = await _end(request.app[HOST], request.match_info["id"])
    return web.Response(status=204) if killed else refusal(404, "Sandbox not found")


async def _timeout(request: web.Request) -> web.Response:
    sandbox = request.app[HOST].sandboxes.get(request.match_info["id"])
    if sandbox is None:
        return refusal(404, "Sandbox not found")
    sandbox.end_at = time.time() + (await request.json())["timeout"]
    return web.Response(status=204)


async def _template(request: web.Request) -> web.Response:
    host, template = request.app[HOST], request.match_info["id"]
    if template not in host.templates:
        return refusal(404, "template not found")
    return web.json_response({"templateID": template, "buildID": host.build(template), "buildStatus": "ready"})


async def _end(host: Host, name: str) -> bool:
    sandbox = host.sandboxes.pop(name, None)
    if sandbox is not None:
        await asyncio.to_thread(sandbox.kill)
    return sandbox is not None


def _listed(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "templateID": sandbox.template,
        "sandboxID": sandbox.id,
        "clientID": "local",
        "startedAt": datetime.fromtimestamp(sandbox.started, UTC).isoformat(),
        "endAt": datetime.fromtimestamp(sandbox.end_at, UTC).isoformat(),
        "cpuCount": SIZE.cpu_millis // 1000,
        "memoryMB": SIZE.memory_mb,
        "diskSizeMB": SIZE.disk_mb,
        "state": "running",
        "envdVersion": ENVD_VERSION,
        "metadata": dict(sandbox.metadata),
    }


async def _life(app: web.Application) -> AsyncIterator[None]:
    async def reap() -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            for sandbox in list(app[HOST].sandboxes.values()):
                if sandbox.end_at <= time.time():
                    await _end(app[HOST], sandbox.id)

    reaper = asyncio.ensure_future(reap())
    yield
    reaper.cancel()
    await asyncio.to_thread(app[HOST].close)


class Server:
    """The application in a thread of its own, for tests: `with Server(app) as server: server.url`. Port 0 takes a free one."""

    def __init__(self, app: web.Application, *, port: int = 0) -> None:
        self._app, self._port = app, port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="e2b-server", daemon=True)
        self.host, self.faults, self.creates = app[HOST], app[FAULTS], app[CREATES]
        self.url = ""

    def __enter__(self) -> Server:
        self._thread.start()
        self._runner = web.AppRunner(self._app, shutdown_timeout=0.1, access_log=None)
        self.url = self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def kill(self, sandbox_id: str) -> None:
        """From outside, as E2B may do at any time."""
        self._do(_end(self.host, sandbox_id))

    def deaf(self) -> None:
        """Takes no new connections from now on; another server may take the port."""
        for site in list(self._runner.sites):
            self._do(site.stop())

    def down(self) -> None:
        """No connection is left, and new ones are refused, until `up`. Boxes stay."""
        self._port = self._runner.addresses[0][1]
        self.deaf()
        assert self._runner.server is not None
        self._do(self._runner.server.shutdown(0.1))

    def up(self) -> None:
        """Listens on the same port again."""
        self._do(self._open())

    async def _open(self) -> None:
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()

    async def _listen(self) -> str:
        await self._runner.setup()
        await self._open()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)
