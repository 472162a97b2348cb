"""Sandboxes as Pods: one fresh Pod per task in a namespace of their own, its files and commands by exec.

It runs on an event loop in a thread of its own; callers are ordinary threads, and what they are told (`emit`, `canceled`) is
called in theirs. docs/adr/0013 tells why things are done as they are done here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from controller.core.contract import ErrCode, SBXReq, SBXRes
from controller.core.errors import InvalidIntent, SisuError, Unavailable
from controller.core.model import Artifact, Chunk, Owner
from controller.sbx import kubernetes_errors, kubernetes_pod, result
from controller.sbx.artifacts import Caps
from controller.sbx.kubernetes_api import PODS, Api, Bounds
from controller.sbx.kubernetes_box import PodTask, command_line
from controller.sbx.kubernetes_life import Lifecycle
from controller.sbx.kubernetes_pod import PodSettings
from controller.sbx.loop import Loop
from controller.sbx.output import STREAM_LIMIT
from controller.sbx.runs import Attempted, Run, Runs
from controller.sbx.task import COLLECTED, Verdict, settle
from controller.sbx.uploads import log_start

T = TypeVar("T")


class KubernetesProvider:
    """Implements ports.SandboxProvider. Thread-safe; one instance per process is enough."""

    def __init__(
        self,
        kubeconfig: Path | None,
        *,
        templates: Mapping[str, str],
        pods: PodSettings,
        start_log: Path | None = None,
        output_limit: int = STREAM_LIMIT,
        caps: Caps | None = None,
        bounds: Bounds | None = None,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        """Asks nothing yet. `templates` are our names → image references with a digest; `observe` as in local.py."""
        self._templates, self._namespace, self._start_log = dict(templates), pods.namespace, start_log
        self._canary = pods.canary
        self._caps, self._bounds = caps or Caps(), bounds or Bounds()
        self._api = Api(kubeconfig, namespace=pods.namespace, bounds=self._bounds)
        self._loop = Loop("kubernetes")
        self._life = Lifecycle(self._api, pods=pods, bounds=self._bounds, loop=self._loop)
        self._runs: Runs[str] = Runs("kubernetes", loop=self._loop, output_limit=output_limit, observe=observe)

    @property
    def name(self) -> str:
        return "kubernetes"

    def close(self) -> None:
        """No call after it. Pods that run are left to their own deadline."""
        self._loop.run(self._api.close())
        self._loop.close()

    def resolve(self, template: str) -> str:
        """`kubernetes:<name>@<image>@sha256:<digest>`, from configuration alone."""
        if template not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise InvalidIntent("spec.sandbox.template", f"{template!r} is unknown here; there is: {known}")
        return f"kubernetes:{template}@{self._templates[template]}"

    def check(self, request: SBXReq) -> str:
        """The image. Raises InvalidIntent when this provider cannot run the request as it is meant."""
        kubernetes_pod.egress_label(request.egress)
        result.check(request)
        if any(not name.isidentifier() or not name.isascii() for name in request.env):
            raise InvalidIntent("spec.sandbox", "a shell cannot export a variable of this name")
        command_line(request, grace=self._bounds.grace)
        for name, image in self._templates.items():
            if request.env_ref == f"kubernetes:{name}@{image}":
                return image
        now = "is not what SBX_KUBERNETES_TEMPLATES names now"
        raise InvalidIntent("spec.sandbox.template", f"{request.env_ref} {now}")

    def run(
        self,
        request: SBXReq,
        *,
        owner: Owner,
        files: Mapping[str, bytes],
        emit: Callable[[Chunk], None],
        canceled: Callable[[], bool],
    ) -> tuple[SBXRes, Sequence[Artifact]]:
        return self._runs.conduct(
            request, owner=owner, files=files, emit=emit, canceled=canceled, check=self.check, attempt=self._attempt
        )

    def kill(self, owner: Owner) -> int:
        """See ports. Returns when the Pod is gone; raises Unavailable while nobody knows whether it is."""
        self._runs.killing(owner)
        return self._told(self._life.kill(owner))

    def owned(self, store_id: str) -> Sequence[Owner]:
        return self._told(self._life.owned(store_id))

    def _told(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run(work)
        except SisuError:
            raise
        except Exception as e:
            raise Unavailable(f"Kubernetes: {kubernetes_errors.told(e)}") from e

    async def _attempt(self, run: Run[str]) -> Attempted:
        """One Pod from making to deleting."""
        started = time.monotonic()
        made = await self._life.make(run)
        if isinstance(made, Verdict):
            return made, []
        run.ref = f"kubernetes:{self._namespace}/{'' if made.kind is PODS else 'sandboxclaim/'}{made.name}"
        try:
            pod = await self._life.boot(made, run)
            if isinstance(pod, Verdict):
                return pod, []
            self._runs.took("create", time.monotonic() - started)
            return await self._inside(run, pod, replaceable=made.kind is not PODS)
        finally:
            # In a task of its own: a cancel that comes now must not leave the Pod alive.
            await asyncio.wait({self._loop.spawn(self._life.end(run.owner, made))})

    async def _inside(self, run: Run[str], pod: dict[str, Any], *, replaceable: bool) -> Attempted:
        task = PodTask(
            api=self._api,
            pod=pod["metadata"]["name"],
            uid=pod["metadata"]["uid"],
            replaceable=replaceable,
            request=run.request,
            bounds=self._bounds,
            caps=self._caps,
            say=run.say,
            note=run.note,
            log_start=lambda: log_start(self._start_log, run.owner),
            canary=self._canary,
        )
        with self._runs.timed("upload"):
            verdict = await task.upload(run.files)
        if verdict is None and run.killed:
            verdict = Verdict(code=ErrCode.LOST, note="killed by its fence")
        if verdict is not None:
            return verdict, []
        with self._runs.timed("command"):
            verdict = await task.command()
        run.cpu_ms, run.mem_peak_mb = task.facts.cpu_ms, task.facts.mem_peak_mb
        if verdict.code not in COLLECTED or run.killed or not task.alive:
            return verdict, []
        with self._runs.timed("collect"):
            found, trouble = await task.collect()
        return settle(verdict, trouble, run.note), found
