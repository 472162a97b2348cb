"""A small API server for the kubernetes provider: Pods in memory, exec streams over websocket, NetworkPolicies, and failures on purpose.

Commands really run, in the jails of devcluster/e2b. It knows one namespace and no kubelet: a Pod runs as soon as `boot` says. It
does what agent-sandbox does for claims of a pool that `add` was given; with none, it does not know those kinds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from controller.sbx import kubernetes_policies, templates
from controller.sbx.run import Result
from devcluster.e2b.host import Host, Process, Sandbox

FOREVER = 3600.0
NAMESPACE = "sandboxes"
IMAGE = f"registry.invalid/base@sha256:{'a' * 64}"
BASE = f"/api/v1/namespaces/{NAMESPACE}/pods"
AGENTS = f"/apis/extensions.agents.x-k8s.io/v1beta1/namespaces/{NAMESPACE}"
# What an API server fills in that knows a Pod's defaults.
DEFAULTS = {"nodeName": "n1", "serviceAccountName": "default", "schedulerName": "default-scheduler", "priority": 0}
Pod = dict[str, Any]


@dataclass(kw_only=True)
class Fault:
    """One failure of an operation, which happens `times` times: create, get, list, delete, policy, exec, claim, claimed, unclaim,
    claims, pools (`*`: any).

    `status` answers so, and with `done` only after the work; `silent` never answers; `late` answers so many seconds after the
    work. Of an exec whose command holds `match`: `cut` breaks its stream off once something was printed, `mute` lets it fall
    silent, `says` ends it with this Status.
    """

    operation: str
    times: int = 1
    status: int = 0
    body: str = '{"kind": "Status", "status": "Failure", "message": "on purpose"}'
    headers: Mapping[str, str] = field(default_factory=dict)
    done: bool = False
    silent: bool = False
    late: float = 0.0
    cut: bool = False
    mute: bool = False
    says: str = ""
    match: str = ""
    happened: int = 0


class PodsServer:
    """`with PodsServer(root) as server: server.kubeconfig`. What it holds may be changed while it runs."""

    def __init__(self, root: Path, *, cgroups: str, page: int = 2) -> None:
        self.kubeconfig = root / "kubeconfig"
        self.plan: list[Fault] = []
        self.seen: list[str] = []
        self.urls: list[str] = []
        self.creates: list[Pod] = []
        self.pods: dict[str, Pod] = {}
        self.claims: dict[str, Pod] = {}
        self.kinds: dict[str, dict[str, Pod]] = {}
        self.policies = {name: dict(one) for name, one in kubernetes_policies.shipped().items()}
        self.before_exec: Callable[[str], object] | None = None  # told the command and its stdin
        self.told = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}  # as a kubelet does
        self.boot = 0.0
        self.linger = 0.0  # seconds from a delete until the Pod is gone; longer than `gone`: until it is forced
        self.image_id = IMAGE
        self._page = page
        self._host = Host(root / "state", templates={"base": templates.base()}, cgroups=cgroups)
        self._boxes: dict[str, Sandbox] = {}
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(64))  # a command takes one while it runs
        self._thread = threading.Thread(target=self._loop.run_forever, name="pods-server", daemon=True)

    def __enter__(self) -> PodsServer:
        self._thread.start()
        app = web.Application(middlewares=[self._middleware], client_max_size=1 << 26)
        app.add_routes(
            [
                web.post(BASE, self._create, name="create"),
                web.get(BASE, self._list, name="list"),
                web.get(BASE + "/{name}", self._get, name="get"),
                web.delete(BASE + "/{name}", self._delete, name="delete"),
                web.get(BASE + "/{name}/exec", self._exec, name="exec"),
                web.get(
                    "/apis/networking.k8s.io/v1/namespaces/{ns}/networkpolicies/{name}", self._policy, name="policy"
                ),
                web.post(AGENTS + "/sandboxclaims", self._claim, name="claim"),
                web.get(AGENTS + "/sandboxclaims", self._claims, name="claims"),
                web.get(AGENTS + "/sandboxclaims/{name}", self._claimed, name="claimed"),
                web.delete(AGENTS + "/sandboxclaims/{name}", self._unclaim, name="unclaim"),
                web.get(AGENTS + "/{kind}", self._kind, name="pools"),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._do(self._runner.cleanup())
        for box in self._boxes.values():
            box.kill()
        self._host.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def fail(self, operation: str, **fault: Any) -> None:
        """Plans a failure."""
        self.plan.append(Fault(operation=operation, **fault))

    def add(self, *objects: Pod) -> None:
        """SandboxTemplates and SandboxWarmPools."""
        for one in objects:
            self.kinds.setdefault(f"{one['kind'].lower()}s", {})[one["metadata"]["name"]] = one

    def replace(self, name: str) -> None:
        """As agent-sandbox does when somebody deletes a Sandbox's Pod: another one of its name."""
        box, pod = self._boxes.pop(name), self.pods[name]
        begun = asyncio.run_coroutine_threadsafe(self._begin(name, pod["metadata"], pod["spec"]), self._loop)
        box.kill()
        begun.result(timeout=30)

    def remove(self, name: str) -> None:
        """The Pod is gone, as when somebody else deleted it."""
        self.pods.pop(name, None)
        if (box := self._boxes.pop(name, None)) is not None:
            box.kill()

    def end(
        self, name: str, *, phase: str = "Failed", reason: str = "", container: Mapping[str, Any] | None = None
    ) -> None:
        """The Pod's containers end, and its status says why."""
        status = self.pods[name]["status"]
        terminated = {"exitCode": 137, "reason": "Error", **(container or {})}
        status |= {"phase": phase, "containerStatuses": [{"name": "task", "state": {"terminated": terminated}}]}
        if reason:
            status["reason"] = reason
        if (box := self._boxes.pop(name, None)) is not None:
            box.kill()

    async def _listen(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        server = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        named = {"clusters": "cluster", "users": "user", "contexts": "context"}
        values = {"cluster": {"server": server}, "user": {"token": "t"}, "context": {"cluster": "x", "user": "x"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
        self.kubeconfig.write_text(
            yaml.safe_dump({**config, **{many: [{"name": "x", one: values[one]}] for many, one in named.items()}})
        )

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _fault(self, operation: str, *, line: str | None = None) -> Fault | None:
        for fault in self.plan:
            inside = bool(fault.cut or fault.mute or fault.says)
            meant = fault.operation in (operation, "*") and inside == (line is not None) and fault.match in (line or "")
            if meant and fault.happened < fault.times:
                fault.happened += 1
                return fault
        return None

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        operation = str(request.match_info.route.name)
        self.seen.append(operation)
        self.urls.append(str(request.url))
        fault = self._fault(operation)
        answer: web.StreamResponse | None = None
        if fault is None:
            return await handler(request)  # type: ignore[no-any-return]
        if fault.silent:
            await asyncio.sleep(FOREVER)
        if fault.late or fault.done:
            answer = await handler(request)
            await asyncio.sleep(fault.late)
        if not fault.status and answer is not None:
            return answer
        kind = "application/json" if fault.body.startswith("{") else "text/plain"
        return web.Response(status=fault.status, text=fault.body, content_type=kind, headers=dict(fault.headers))

    async def _create(self, request: web.Request) -> web.Response:
        pod = await request.json()
        name = pod["metadata"]["name"]
        if name in self.pods:
            return _refused(409, f'pods "{name}" already exists')
        self.creates.append(json.loads(json.dumps(pod)))
        pod["metadata"]["uid"] = str(uuid.uuid4())
        pod["status"] = {"phase": "Pending", "conditions": []}
        self.pods[name] = pod
        asyncio.ensure_future(self._start(pod))  # noqa: RUF006 - the loop ends with the test
        return web.json_response(pod, status=201)

    async def _start(self, pod: Pod) -> None:
        name = pod["metadata"]["name"]
        if self.boot:
            await asyncio.sleep(self.boot)
        if self.pods.get(name) is not pod:
            return
        box = await asyncio.to_thread(self._host.create, "base", metadata={}, envs=self.told, seconds=FOREVER)
        if self.pods.get(name) is not pod:
            await asyncio.to_thread(box.kill)
            return
        self._boxes[name] = box
        running = {"name": "task", "imageID": self.image_id, "state": {"running": {"startedAt": "now"}}}
        pod["status"] = {"phase": "Running", "containerStatuses": [running]}

    async def _begin(self, name: str, metadata: Pod, spec: Pod) -> None:
        """A Pod that agent-sandbox makes."""
        pod = {"metadata": metadata | {"name": name, "uid": str(uuid.uuid4())}, "spec": spec}
        self.pods[name] = pod | {"status": {"phase": "Pending", "conditions": []}}
        await self._start(self.pods[name])

    async def _claim(self, request: web.Request) -> web.Response:
        claim = await request.json()
        name = claim["metadata"]["name"]
        if name in self.claims:
            return _refused(409, f'sandboxclaims "{name}" already exists')
        self.creates.append(json.loads(json.dumps(claim)))
        claim["metadata"]["uid"] = str(uuid.uuid4())
        self.claims[name] = claim
        asyncio.ensure_future(self._serve(claim))  # noqa: RUF006 - the loop ends with the test
        return web.json_response(claim, status=201)

    async def _serve(self, claim: Pod) -> None:
        pool = self.kinds["sandboxwarmpools"].get(claim["spec"]["warmPoolRef"]["name"])
        if pool is None:
            why = {"type": "Ready", "status": "False", "reason": "WarmPoolNotFound", "message": "not found"}
            claim["status"] = {"conditions": [why]}
            return
        template = self.kinds["sandboxtemplates"][pool["spec"]["sandboxTemplateRef"]["name"]]
        pod = json.loads(json.dumps(template["spec"]["podTemplate"]))
        name = f"{pool['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        claim["status"] = {"sandbox": {"name": name}, "conditions": []}
        await self._begin(name, pod.get("metadata") or {}, pod["spec"] | DEFAULTS)

    async def _claims(self, request: web.Request) -> web.Response:
        if not self.kinds:
            return _refused(404, "the server could not find the requested resource")
        return self._page_of(self.claims, request)

    async def _kind(self, request: web.Request) -> web.Response:
        found = self.kinds.get(request.match_info["kind"])
        if found is None:
            return _refused(404, "the server could not find the requested resource")
        return self._page_of(found, request)

    async def _claimed(self, request: web.Request) -> web.Response:
        claim = self.claims.get(request.match_info["name"])
        return web.json_response(claim) if claim else _refused(404, "not found")

    async def _unclaim(self, request: web.Request) -> web.Response:
        name, options = request.match_info["name"], await request.json()
        claim = self.claims.get(name)
        if claim is None:
            return _refused(404, "not found")
        if options["preconditions"]["uid"] != claim["metadata"]["uid"]:
            return _refused(409, "the UID in the precondition does not match")
        assert options["propagationPolicy"] == "Foreground", "else the claim goes before its Pod"
        claim["metadata"]["deletionTimestamp"] = "now"
        asyncio.ensure_future(self._collect(name))  # noqa: RUF006 - the loop ends with the test
        return web.json_response(claim)

    async def _collect(self, name: str) -> None:
        """The garbage collector: the Pod first, which may be deleted by force meanwhile; then the claim."""
        pod = ((self.claims[name].get("status") or {}).get("sandbox") or {}).get("name")
        for _ in range(int(self.linger / 0.05)):
            if pod not in self.pods:
                break
            await asyncio.sleep(0.05)
        if pod is not None:
            await asyncio.to_thread(self.remove, pod)
        self.claims.pop(name, None)

    async def _get(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        return web.json_response(pod) if pod else _refused(404, "not found")

    async def _list(self, request: web.Request) -> web.Response:
        return self._page_of(self.pods, request)

    def _page_of(self, objects: Mapping[str, Pod], request: web.Request) -> web.Response:
        wanted = dict(one.split("=") for one in request.query.get("labelSelector", "").split(",") if one)
        known = [one for _, one in sorted(objects.items())]
        found = [one for one in known if wanted.items() <= (one["metadata"].get("labels") or {}).items()]
        at = int(request.query.get("continue") or 0)
        more = str(at + self._page) if len(found) > at + self._page else ""
        return web.json_response({"items": found[at : at + self._page], "metadata": {"continue": more}})

    async def _delete(self, request: web.Request) -> web.Response:
        name, options = request.match_info["name"], await request.json()
        pod = self.pods.get(name)
        if pod is None:
            return _refused(404, "not found")
        if options["preconditions"]["uid"] != pod["metadata"]["uid"]:
            return _refused(409, "the UID in the precondition does not match")
        pod["metadata"]["deletionTimestamp"] = "now"
        if self.linger and options.get("gracePeriodSeconds") != 0:
            self._loop.call_later(self.linger, lambda: asyncio.ensure_future(asyncio.to_thread(self.remove, name)))
        else:
            await asyncio.to_thread(self.remove, name)
        return web.json_response(pod)

    async def _policy(self, request: web.Request) -> web.Response:
        found = self.policies.get(request.match_info["name"])
        return web.json_response(found) if found else _refused(404, "not found")

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        box = self._boxes.get(request.match_info["name"])
        if box is None:
            return _refused(404 if request.match_info["name"] not in self.pods else 500, "container not found")
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io",), autoping=True)
        await socket.prepare(request)
        argv = request.query.getall("command")
        size = re.match(r'(?:eval "\$\()?head -c (\d+)', argv[-1])
        stdin = bytearray()
        while len(stdin) < int(size[1] if size else 0):
            stdin += (await socket.receive_bytes())[1:]
        line = argv[-1] + stdin.decode(errors="replace")
        if self.before_exec is not None:
            await asyncio.to_thread(self.before_exec, line)
            box = self._boxes[request.match_info["name"]]
        fault = self._fault("exec", line=line)
        if fault is not None and fault.says:
            await socket.send_bytes(b"\x03" + fault.says.encode())
            return socket
        reading = asyncio.ensure_future(_drain(socket))
        try:
            await _stream(socket, box, argv, bytes(stdin), fault)
        finally:
            reading.cancel()
        return socket


async def _stream(
    socket: web.WebSocketResponse, box: Sandbox, argv: list[str], stdin: bytes, fault: Fault | None
) -> None:
    process = Process(box, 2, argv, deadline=time.monotonic() + FOREVER)
    running = asyncio.ensure_future(asyncio.to_thread(box.follow, process, stdin=stdin))
    try:
        while not socket.closed:
            kind, what = await process.events.get()
            if isinstance(what, Result):
                break
            process.taken(len(what))
            await socket.send_bytes((b"\x01" if kind == "stdout" else b"\x02") + what)
            if fault is not None and fault.cut:
                assert socket._req is not None and socket._req.transport is not None
                socket._req.transport.abort()
                return
            if fault is not None and fault.mute:
                await asyncio.sleep(FOREVER)
        if not socket.closed:
            await socket.send_bytes(b"\x03" + _status(what if isinstance(what, Result) else Result()))
    finally:
        process.killed = True
        running.cancel()


async def _drain(socket: web.WebSocketResponse) -> None:
    with contextlib.suppress(Exception):
        while not socket.closed:
            await socket.receive()


def _status(ended: Result) -> bytes:
    code = 137 if ended.exit is None else ended.exit
    if code == 0:
        return b'{"status": "Success"}'
    cause = {"reason": "ExitCode", "message": str(code)}
    failed = {"status": "Failure", "reason": "NonZeroExitCode", "message": f"exit code {code}"}
    return json.dumps({**failed, "details": {"causes": [cause]}}).encode()


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)
