"""The daemon that E2B has in each box, as far as it is needed: commands by the Connect protocol in JSON, files, health.

One origin serves all boxes; the header E2b-Sandbox-Id says which. A stream is a row of envelopes: flags, length, JSON.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from controller.sbx.run import Result, Stop
from devcluster.e2b.faults import FOREVER, Fault, Faults
from devcluster.e2b.host import Host, Process, Sandbox

HOST = web.AppKey("host", Host)
FAULTS = web.AppKey("faults", Faults)
KEEPALIVE_SECONDS = 30.0
DAY = 86_400.0
WRITE = 'mkdir -p -- "$(dirname -- "$0")" && exec cat > "$0"'
READ = '[ -e "$0" ] || exit 44; [ -f "$0" ] || exit 45; exec cat -- "$0"'


def routes() -> list[web.RouteDef]:
    """For the application."""
    return [
        web.get("/health", health),
        web.get("/files", read),
        web.post("/files", write),
        web.post("/process.Process/Start", start),
        web.post("/process.Process/List", processes),
        web.post("/process.Process/SendSignal", send_signal),
    ]


def envelope(message: Mapping[str, Any], *, last: bool = False) -> bytes:
    """One frame of a stream."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">BI", 2 if last else 0, len(body)) + body


def target(request: web.Request) -> Sandbox:
    """The box that is meant. Raises the answers that E2B's proxy and envd give."""
    name = request.headers.get("E2b-Sandbox-Id", "")
    sandbox = request.app[HOST].sandboxes.get(name)
    if sandbox is None or sandbox.dead:
        gone = {"sandboxId": name, "message": "The sandbox was not found", "code": 502}
        raise web.HTTPBadGateway(text=json.dumps(gone), content_type="application/json")
    if request.headers.get("X-Access-Token") != sandbox.token and request.path != "/health":
        refused = {"code": "unauthenticated", "message": "unauthorized access, please provide a valid access token"}
        raise web.HTTPUnauthorized(text=json.dumps(refused), content_type="application/json")
    return sandbox


async def health(request: web.Request) -> web.Response:
    if "E2b-Sandbox-Id" in request.headers:
        target(request)
    return web.Response(status=204)


async def write(request: web.Request) -> web.Response:
    sandbox, path = target(request), request.query["path"]
    content = await request.read()
    if request.app[FAULTS].next("write", stream=True):
        content = content[:-1]
    ended, _ = await asyncio.to_thread(sandbox.tool, ("/bin/sh", "-c", WRITE, path), stdin=content)
    if ended.exit != 0:
        return web.json_response({"code": 500, "message": f"cannot write {path}"}, status=500)
    return web.json_response([{"name": path.rpartition("/")[2], "path": path, "type": "file"}])


async def read(request: web.Request) -> web.Response:
    sandbox, path = target(request), request.query["path"]
    ended, content = await asyncio.to_thread(sandbox.tool, ("/bin/sh", "-c", READ, path))
    if ended.exit != 0:
        status = {44: 404, 45: 400}.get(ended.exit or 0, 500)
        return web.json_response({"code": status, "message": f"cannot read {path}"}, status=status)
    return web.Response(body=content, content_type="application/octet-stream")


async def processes(request: web.Request) -> web.Response:
    listed = [
        {"pid": p.pid, "config": {"cmd": p.argv[0], "args": p.argv[1:]}} for p in target(request).processes.values()
    ]
    return web.json_response({"processes": listed})


async def send_signal(request: web.Request) -> web.Response:
    sandbox, message = target(request), await request.json()
    process = sandbox.processes.get(int(message["process"].get("pid", 0)))
    if process is None:
        return web.json_response({"code": "not_found", "message": "process not found"}, status=404)
    process.killed = True  # SIGTERM, too: a jail has one end
    return web.json_response({})


async def start(request: web.Request) -> web.StreamResponse:
    sandbox = target(request)
    _, length = struct.unpack(">BI", await request.content.readexactly(5))
    asked = json.loads(await request.content.readexactly(length))["process"]
    argv = [asked["cmd"], *asked.get("args", ())]
    limit = request.headers.get("Connect-Timeout-Ms")
    process = sandbox.start(
        argv, envs=asked.get("envs") or {}, cwd=asked.get("cwd") or "/tmp", seconds=int(limit) / 1000 if limit else DAY
    )
    response = web.StreamResponse(headers={"Content-Type": "application/connect+json"})
    await response.prepare(request)
    try:
        with contextlib.suppress(ConnectionResetError):  # the client went away
            await response.write(envelope({"event": {"start": {"pid": process.pid}}}))
            await _follow(request, response, process, request.app[FAULTS].next("start", stream=True, line=argv[-1]))
    finally:
        process.detached = True  # it runs on, as in E2B
    return response


async def _follow(request: web.Request, response: web.StreamResponse, process: Process, fault: Fault | None) -> None:
    while True:
        try:
            kind, what = await asyncio.wait_for(process.events.get(), KEEPALIVE_SECONDS)
        except TimeoutError:
            await response.write(envelope({"event": {"keepalive": {}}}))
            continue
        if isinstance(what, Result):
            for message, last in _end(process.sandbox, what):
                await response.write(envelope(message, last=last))
            return
        whole = envelope({"event": {"data": {kind: base64.b64encode(what).decode()}}})
        await response.write(whole)
        process.taken(len(what))
        if fault is not None and fault.mute:
            await asyncio.sleep(FOREVER)
        if fault is not None and request.transport is not None:
            await response.write(whole[:-3])
            request.transport.abort()
            return


def _end(sandbox: Sandbox, ended: Result) -> list[tuple[dict[str, Any], bool]]:
    if ended.stop is Stop.TIMEOUT:
        return [({"error": {"code": "deadline_exceeded", "message": "context deadline exceeded"}}, True)]
    if sandbox.dead:
        gone = f"the connection to sandbox {sandbox.id} ended before the stream completed"
        return [({"error": {"code": "unavailable", "message": gone}}, True)]
    if ended.failure is not None:
        return [({"error": {"code": "invalid_argument", "message": ended.failure}}, True)]
    if ended.exit is None:
        end = {"exitCode": -1, "status": "signal: killed", "error": "signal: killed"}
    else:
        status = f"exit status {ended.exit}"
        end = {"exited": True, "status": status} | ({"exitCode": ended.exit, "error": status} if ended.exit else {})
    return [({"event": {"end": end}}, False), ({}, True)]
