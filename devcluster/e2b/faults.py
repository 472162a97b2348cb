"""Failures on purpose. Tests put them into a server of their own process; neither a request nor the command line can.

Each fault is for one kind of operation (`create`, `list`, `template`, `info`, `kill`, `start`, `processes`, `signal`, `read`,
`write`, `health`, or `*`) and happens `times` times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
FOREVER = 3600.0
OPERATIONS = {
    ("POST", "/v2/sandboxes"): "create",
    ("GET", "/v2/sandboxes"): "list",
    ("GET", "/templates/{id}"): "template",
    ("GET", "/sandboxes/{id}"): "info",
    ("DELETE", "/sandboxes/{id}"): "kill",
    ("POST", "/process.Process/Start"): "start",
    ("POST", "/process.Process/List"): "processes",
    ("POST", "/process.Process/SendSignal"): "signal",
    ("GET", "/files"): "read",
    ("POST", "/files"): "write",
    ("GET", "/health"): "health",
}


@dataclass(kw_only=True)
class Fault:
    """One failure.

    `status` answers so, and with `done` only after the work; `silent` never answers; `held` begins the work so many seconds
    late, `late` answers so many seconds after it. `cut` breaks a Start's stream off in the midst of an event, once something
    was printed, and loses the end of a written file; `mute` lets a Start's stream fall silent instead. `match` is a part of a
    Start's command line.
    """

    operation: str
    times: int = 1
    status: int = 0
    body: str = '{"code": 500, "message": "on purpose"}'
    headers: Mapping[str, str] = field(default_factory=dict)
    done: bool = False
    silent: bool = False
    held: float = 0.0
    late: float = 0.0
    cut: bool = False
    mute: bool = False
    match: str = ""
    happened: int = 0


class Faults:
    """The plan, which may change while the server runs."""

    def __init__(self, *plan: Fault) -> None:
        self.plan = list(plan)
        self.seen: list[str] = []

    def next(self, operation: str, *, stream: bool = False, line: str = "") -> Fault | None:
        """The fault that happens now, counted. `stream` asks for those that happen inside of one."""
        for fault in self.plan:
            inside = fault.cut or fault.mute
            meant = fault.operation in (operation, "*") and inside == stream and fault.match in line
            if meant and fault.happened < fault.times:
                fault.happened += 1
                return fault
        return None

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Before (or around) the work."""
        resource = request.match_info.route.resource
        operation = OPERATIONS.get((request.method, resource.canonical if resource else ""), "")
        self.seen.append(operation)
        fault = self.next(operation)
        if fault is None:
            return await handler(request)
        if fault.silent:
            await asyncio.sleep(FOREVER)
        if fault.held:
            await request.read()  # now: its client will have gone
            await asyncio.sleep(fault.held)
        if fault.held or fault.late or fault.done:
            answer = await handler(request)
            await asyncio.sleep(fault.late)
        if fault.status:
            kind = "application/json" if fault.body.startswith("{") else "text/plain"
            return web.Response(status=fault.status, text=fault.body, content_type=kind, headers=dict(fault.headers))
        return answer
