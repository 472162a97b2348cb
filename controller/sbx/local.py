"""Sandboxes on this host: one fresh bubblewrap box per task, for laptops, CI and offline work. Needs Linux and bubblewrap.

As root every box runs under an unprivileged outer uid of its own and in its own cgroup; limits.py says what holds
otherwise. No network at all: `bwrap --share-net` would reach the host's 127.0.0.1, so any egress but None is refused.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from controller.core.contract import ErrCode, Metrics, SBXReq, SBXRes
from controller.core.errors import InvalidIntent, Unavailable
from controller.core.model import Artifact, Chunk, Owner
from controller.sbx import jail, result
from controller.sbx.artifacts import Caps
from controller.sbx.boxes import Box, Boxes, NoFreeUid
from controller.sbx.limits import Cgroup, CgroupTree, rlimits
from controller.sbx.output import STREAM_LIMIT, Capture
from controller.sbx.run import Cell
from controller.sbx.spawn import Launcher
from controller.sbx.task import COLLECTED, Task, Verdict, settle
from controller.sbx.templates import Catalog, Template, base
from controller.sbx.uploads import Verifier, log_start

log = logging.getLogger(__name__)
UIDS = range(200_000, 200_064)
UID_WAIT_SECONDS = 30.0
TOOLS = tuple(Path("/usr/bin") / name for name in ("prlimit", "tar", "git", "env", "du"))


class LocalProvider:
    """Implements ports.SandboxProvider. Thread-safe; one instance per process is enough."""

    def __init__(
        self,
        *,
        state_root: Path,
        templates: Sequence[Template] = (),
        uids: Sequence[int] = UIDS,
        bwrap: Path = Path("/usr/bin/bwrap"),
        start_log: Path | None = None,
        output_limit: int = STREAM_LIMIT,
        caps: Caps | None = None,
        grace_seconds: float = 2.0,
        cgroup_parent: str = "sisu-kodo",
        observe: Callable[[str, float], None] = lambda stage, seconds: None,
    ) -> None:
        """Removes what dead controllers left under state_root. Raises Unavailable when this host cannot do it at all.

        `uids` are the outer uids when we are root (ignored otherwise); `start_log` gets a line per started command;
        `observe` gets (create | upload | command | collect | total, seconds).
        """
        for tool in (bwrap, *TOOLS):
            if not os.access(tool, os.X_OK):
                raise Unavailable(
                    f"{tool} is missing: install it (apt-get install bubblewrap git tar util-linux coreutils)"
                )
        self._root = os.geteuid() == 0
        if self._root:
            _must_be_traversable([state_root, *(host for t in templates for host, _ in t.binds)])
        self._boxes = Boxes(state_root, uids=uids if self._root else ())
        self._catalog = Catalog([base(), *templates])
        self._cgroups = CgroupTree.find(parent=cgroup_parent)
        self._launcher = Launcher()
        self._verifier = Verifier()
        self._bwrap, self._start_log, self._output_limit = bwrap, start_log, output_limit
        self._caps, self._grace, self._observe = caps or Caps(), grace_seconds, observe
        self.sweep()

    @property
    def name(self) -> str:
        return "local"

    def sweep(self) -> int:
        """Kills and removes what dead controllers left on this host; how many sandboxes that were."""
        count = self._boxes.sweep(lambda name: self._cgroups.named(name).remove())
        if count:
            log.info("sandbox_leftovers_removed", extra={"count": count})
        return count

    def close(self) -> None:
        """Kills what still runs. The provider starts anew when it is used again."""
        self._launcher.close()

    def resolve(self, template: str) -> str:
        return self._catalog.resolve(template)

    def check(self, request: SBXReq) -> Template:
        """The request's template. Raises InvalidIntent when this provider cannot run the request as it is meant."""
        if request.egress.mode != "None":
            raise InvalidIntent("spec.sandbox.egress.mode", "the local provider has no network; only None can be had")
        template = self._catalog.find(request.env_ref)
        if template is None:
            raise InvalidIntent("spec.sandbox.template", f"{request.env_ref} is not what this host has now")
        result.check(request)
        return template

    def run(
        self,
        request: SBXReq,
        *,
        owner: Owner,
        files: Mapping[str, bytes],
        emit: Callable[[Chunk], None],
        canceled: Callable[[], bool],
    ) -> tuple[SBXRes, Sequence[Artifact]]:
        started = time.monotonic()
        capture = Capture(emit, limit=self._output_limit)
        facts = _Facts()
        verdict, found = self._attempt(request, owner, files, capture, canceled, facts)
        wall = time.monotonic() - started
        self._observe("total", wall)
        metrics = Metrics(wall_ms=round(wall * 1000), cpu_ms=facts.cpu_ms, mem_peak_mb=facts.peak_mb)
        return result.response(verdict, found, capture=capture, metrics=metrics, ref=facts.ref, owner=owner), found

    def kill(self, owner: Owner) -> int:
        count = 0
        for box in self._boxes.all():
            if (box.owner.store_id, box.owner.fence) != (owner.store_id, owner.fence):
                continue
            try:
                lived = not box.killed() and (not box.abandoned() or box.jail_lives())
                box.kill()
            except FileNotFoundError:
                continue  # it ended meanwhile
            count += lived
        return count

    def owned(self, store_id: str) -> Sequence[Owner]:
        mine = (box for box in self._boxes.all() if box.owner.store_id == store_id)
        return [box.owner for box in mine if _lives(box)]

    def _attempt(
        self,
        request: SBXReq,
        owner: Owner,
        files: Mapping[str, bytes],
        capture: Capture,
        canceled: Callable[[], bool],
        facts: _Facts,
    ) -> tuple[Verdict, Sequence[Artifact]]:
        """One box from making to removing; what keeps it from being made is a BOOT_FAIL."""
        try:
            template = self.check(request)
            if complaint := self._verifier.complaint(request, files):
                return Verdict(code=ErrCode.UPLOAD_FAIL, note=complaint), ()
            with self._task(request, template, owner, capture, canceled) as task:
                facts.ref = f"local:{platform.node()}/{task.cell.box.name}"
                verdict, found = self._phases(task, files)
                facts.read(task)
                return verdict, found
        except NoFreeUid as e:
            return Verdict(code=ErrCode.CANCELED if canceled() else ErrCode.BOOT_FAIL, note=str(e)), ()
        except (InvalidIntent, Unavailable) as e:
            return Verdict(code=ErrCode.BOOT_FAIL, note=str(e)), ()
        except OSError as e:
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"the sandbox could not be made: {e}"), ()

    def _phases(self, task: Task, files: Mapping[str, bytes]) -> tuple[Verdict, Sequence[Artifact]]:
        with self._timed("upload"):
            verdict = task.upload(files)
        if verdict is not None:
            return verdict, ()
        with self._timed("command"):
            verdict = task.command()
        if verdict.code not in COLLECTED:
            return verdict, ()
        with self._timed("collect"):
            found, trouble = task.collect()
        return settle(verdict, trouble, task.capture.note), found

    @contextmanager
    def _task(
        self, request: SBXReq, template: Template, owner: Owner, capture: Capture, canceled: Callable[[], bool]
    ) -> Iterator[Task]:
        with ExitStack() as stack:
            with self._timed("create"):
                uid = self._take_uid(stack, canceled)
                box = stack.enter_context(self._boxes.create(owner, uid=uid))
                group = self._cgroups.create(box.name, request.limits)
                stack.callback(group.remove)
                view = self._view(box, template, request)
            yield Task(
                cell=self._cell(box, group, uid, request),
                request=request,
                view=jail.arguments(view),
                capture=capture,
                canceled=canceled,
                log_start=lambda: log_start(self._start_log, owner),
                caps=self._caps,
            )

    def _cell(self, box: Box, group: Cgroup, uid: int | None, request: SBXReq) -> Cell:
        prefix = rlimits(request.limits, memory=not group.directories)
        return Cell(
            launcher=self._launcher, bwrap=self._bwrap, box=box, cgroup=group, uid=uid, prefix=prefix, grace=self._grace
        )

    def _view(self, box: Box, template: Template, request: SBXReq) -> jail.View:
        return jail.View(
            accounts=self._boxes.accounts,
            workspace=box.tree / "workspace",
            output=box.tree / "output",
            tmp=box.tree / "tmp",
            binds=template.binds,
            env=jail.environment(template.env, template.path, request.env),
            workdir=request.workdir or jail.WORKSPACE,
        )

    def _take_uid(self, stack: ExitStack, canceled: Callable[[], bool]) -> int | None:
        """Waits a while for a free one: more tasks than uids is load, not failure."""
        deadline = time.monotonic() + UID_WAIT_SECONDS
        while True:
            try:
                return stack.enter_context(self._boxes.uid())
            except NoFreeUid:
                if time.monotonic() >= deadline or canceled():
                    raise
                time.sleep(0.1)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._observe(stage, time.monotonic() - started)


class _Facts:
    """What the result tells of the sandbox itself, read while its cgroup is there."""

    def __init__(self) -> None:
        self.ref = f"local:{platform.node()}"
        self.cpu_ms: int | None = None
        self.peak_mb: int | None = None

    def read(self, task: Task) -> None:
        self.cpu_ms = task.cell.cgroup.cpu_ms()
        self.peak_mb = task.cell.cgroup.peak_mb()


def _lives(box: Box) -> bool:
    try:
        return not box.abandoned() or box.jail_lives()
    except FileNotFoundError:
        return False


def _must_be_traversable(paths: Sequence[Path]) -> None:
    """The outer uid opens these itself, so each folder above them must let others pass. Raises Unavailable naming the folder."""
    for path in paths:
        for folder in (path, *path.absolute().parents):
            if folder.exists() and not folder.stat().st_mode & 0o001:
                raise Unavailable(f"{folder} is closed to other users (chmod o+x, or choose another place than {path})")
