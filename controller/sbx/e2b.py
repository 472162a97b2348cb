"""Sandboxes at E2B, or at anything that speaks its API, through the unmodified e2b SDK: one fresh box per task.

The SDK is imported on first use (0.9 s, 50 MB) and runs on an event loop in a thread of its own; callers are ordinary threads,
and what they are told (`emit`, `canceled`) is called in theirs. docs/adr/0011 tells why things are done as they are done here.
The SDK's transport may abort an interpreter that ends by itself: controller/main.py ends by os._exit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from controller.core.contract import ErrCode, SBXReq, SBXRes
from controller.core.errors import InvalidIntent, SisuError, Unavailable
from controller.core.model import Artifact, Chunk, Owner
from controller.sbx import e2b_api, e2b_errors, result
from controller.sbx.artifacts import Caps
from controller.sbx.e2b_api import Account, Api
from controller.sbx.e2b_box import BoxTask, command_line
from controller.sbx.e2b_calls import Bounds, load
from controller.sbx.loop import Loop
from controller.sbx.output import STREAM_LIMIT
from controller.sbx.patience import patiently
from controller.sbx.runs import Attempted, Run, Runs
from controller.sbx.sweep import Sweep
from controller.sbx.task import COLLECTED, Verdict, settle
from controller.sbx.uploads import log_start

if TYPE_CHECKING:
    from e2b import AsyncSandbox

log = logging.getLogger(__name__)
MARGIN = 300  # seconds that a box may live beyond its task's time, for what comes before and after the command
REFERENCE = re.compile(r"e2b:(?P<name>[^@/]+)@(?P<template>[^@/]+)/(?P<build>[^@/]+)")
T = TypeVar("T")


class Build(NamedTuple):
    """What a box is made from: ids at E2B."""

    template: str
    build: str


class E2BProvider:
    """Implements ports.SandboxProvider. Thread-safe; one instance per process is enough."""

    def __init__(
        self,
        account: Account,
        *,
        templates: Mapping[str, str],
        start_log: Path | None = None,
        output_limit: int = STREAM_LIMIT,
        caps: Caps | None = None,
        bounds: Bounds | None = None,
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        """Asks nothing of E2B yet. `templates` are our names → E2B's template ids; `observe` as in local.py."""
        self._templates, self._start_log = dict(templates), start_log
        self._caps, self._bounds = caps or Caps(), bounds or Bounds()
        self._api = Api(account, bounds=self._bounds)
        self._told: set[str] = set()
        self._loop = Loop("e2b")
        self._sweep = Sweep(self._loop, kill=self._api.kill_marked, told=e2b_errors.told, pauses=self._bounds.sweeps)
        self._runs: Runs[Build] = Runs("e2b", loop=self._loop, output_limit=output_limit, observe=observe)

    @property
    def name(self) -> str:
        return "e2b"

    def close(self) -> None:
        """No call after it. Boxes that run are left to their own time limit."""
        self._loop.close()

    def resolve(self, template: str) -> str:
        """`e2b:<name>@<template id>/<build id>`: E2B never changes a build, and a rebuilt template has another."""
        if template not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise InvalidIntent("spec.sandbox.template", f"{template!r} is unknown here; there is: {known}")
        wanted = self._templates[template]
        load()
        try:
            build = self._loop.run(self._api.build(wanted))
        except SisuError:
            raise
        except Exception as e:
            raise e2b_errors.of_template(e, wanted) from e
        return f"e2b:{template}@{wanted}/{build}"

    def check(self, request: SBXReq) -> Build:
        """Raises InvalidIntent when this provider cannot run the request as it is meant."""
        e2b_api.network(request.egress)
        result.check(request)
        command_line(request, memory=True)
        ref = REFERENCE.fullmatch(request.env_ref)
        if ref is None or self._templates.get(ref["name"]) != ref["template"]:
            raise InvalidIntent("spec.sandbox.template", f"{request.env_ref} is not what SBX_E2B_TEMPLATES names now")
        return Build(ref["template"], ref["build"])

    def run(
        self,
        request: SBXReq,
        *,
        owner: Owner,
        files: Mapping[str, bytes],
        emit: Callable[[Chunk], None],
        canceled: Callable[[], bool],
    ) -> tuple[SBXRes, Sequence[Artifact]]:
        load()
        return self._runs.conduct(
            request, owner=owner, files=files, emit=emit, canceled=canceled, check=self.check, attempt=self._attempt
        )

    def kill(self, owner: Owner) -> int:
        """See ports. Raises Unavailable when E2B does not tell: then nobody knows."""
        run = self._runs.killing(owner)
        known = run.ref.removeprefix("e2b:") if run else ""  # lists may lag behind
        return _told(lambda: self._loop.run(self._api.kill_marked(owner, known=known)))

    def owned(self, store_id: str) -> Sequence[Owner]:
        boxes = _told(lambda: self._loop.run(self._api.found({e2b_api.STORE: store_id})))
        owners = (e2b_api.owner_of(box.metadata) for box in boxes)
        return [owner for owner in owners if owner is not None]

    async def _attempt(self, run: Run[Build]) -> Attempted:
        """One box from making to killing."""
        made = await self._made(run)
        if isinstance(made, Verdict):
            return made, []
        run.ref = f"e2b:{made.sandbox_id}"
        try:
            verdict, found = await self._inside(made, run)
        finally:
            # In a task of its own: a cancel that comes now must not leave the box alive.
            await asyncio.wait({self._loop.spawn(self._end(made.sandbox_id))})
        return verdict, found

    async def _made(self, run: Run[Build]) -> AsyncSandbox | Verdict:
        with self._runs.timed("create"):
            passing, seconds = e2b_errors.passing, self._bounds.busy
            try:
                return await patiently(
                    lambda: self._create(run), passing=passing, seconds=seconds, stopped=lambda: run.killed
                )
            except Exception as e:  # noqa: BLE001 - translated, whatever it is
                return e2b_errors.of_create(e)

    async def _create(self, run: Run[Build]) -> AsyncSandbox:
        """What it made without our knowing is looked for at once."""
        seconds, egress = math.ceil(run.request.timeout_ms / 1000) + MARGIN, e2b_api.network(run.request.egress)
        try:
            return await self._api.create(run.made_of.template, owner=run.owner, seconds=seconds, egress=egress)
        except (Exception, asyncio.CancelledError) as e:
            if e2b_errors.undecided(e):
                await asyncio.wait({self._loop.spawn(self._sweep.now(run.owner))})
            raise

    async def _inside(self, box: AsyncSandbox, run: Run[Build]) -> Attempted:
        task = BoxTask(
            box=box,
            request=run.request,
            bounds=self._bounds,
            caps=self._caps,
            say=run.say,
            note=run.note,
            log_start=lambda: log_start(self._start_log, run.owner),
        )
        with self._runs.timed("upload"):
            known = await self._known(box, run)
            verdict = known if isinstance(known, Verdict) else await task.prepare() or await task.upload(run.files)
        if verdict is None and run.killed:
            verdict = Verdict(code=ErrCode.LOST, note="killed by its fence")
        if verdict is not None:
            return verdict, []
        with self._runs.timed("command"):
            verdict = await task.command(memory=known is True)
        if verdict.code not in COLLECTED or run.killed:
            return verdict, []
        with self._runs.timed("collect"):
            found, trouble = await task.collect()
        return settle(verdict, trouble, run.note), found

    async def _known(self, box: AsyncSandbox, run: Run[Build]) -> bool | Verdict:
        """Whether the box has more memory than the task may take. A Verdict when it is not what was approved.

        The build is asked for after the box was made: builds are only ever replaced by later ones, so that the approved one
        being current now means that it was when the box was made.
        """
        try:
            build, info = await asyncio.gather(self._api.build(run.made_of.template), self._api.info(box))
        except InvalidIntent as e:
            return Verdict(code=ErrCode.BOOT_FAIL, note=str(e))
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            return e2b_errors.of_phase(e, otherwise=ErrCode.BOOT_FAIL)
        limits, cpu_millis = run.request.limits, 1000 * info.cpu_count
        if build != run.made_of.build or info.template_id != run.made_of.template:
            now = f"template {info.template_id}, build {build}"
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"{run.request.env_ref} was approved; E2B now has {now}")
        if info.memory_mb < limits.memory_mb or cpu_millis < limits.cpu_millis:
            has = f"{info.cpu_count} CPUs and {info.memory_mb} MiB"
            asked = f"{limits.cpu_millis}m CPU and {limits.memory_mb} MiB were asked for"
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"template {run.made_of.template} has {has}; {asked}")
        if cpu_millis > limits.cpu_millis and run.made_of.template not in self._told:
            self._told.add(run.made_of.template)  # once: E2B has no CPU limit but the template's
            log.info("e2b_cpu_limit", extra={"template": run.made_of.template, "cpus": info.cpu_count})
        return info.memory_mb > limits.memory_mb

    async def _end(self, sandbox_id: str) -> None:
        """Kills the box. When E2B does not answer, its own time limit does it."""
        for _ in range(2):
            try:
                await self._api.kill(sandbox_id)
                return
            except Exception as e:  # noqa: BLE001 - told, and tried once more
                log.warning("e2b_kill_failed", extra={"sandbox": sandbox_id, "error": e2b_errors.told(e)})


def _told(ask: Callable[[], T]) -> T:
    load()
    try:
        return ask()
    except Exception as e:
        raise Unavailable(f"E2B: {e2b_errors.told(e)}") from e
