"""A provider in memory, for CI and load. The same commands have the same result in a real shell, as far as it knows them.

Known, joined by `&&`, `;` and newlines:  true   false   exit N   sleep SECONDS   echo WORDS   echo WORDS >&2
echo WORDS > "$SISU_OUTPUT_DIR/NAME"   echo "$NAME".   WORDS are plain words or quoted without expansions.
Anything else is not guessed at: exit 0, with the whole command on stdout. Archives and patches are only checked.
"""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controller.core.contract import ErrCode, Metrics, SBXReq, SBXRes
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact, Chunk, Owner
from controller.sbx import result
from controller.sbx.artifacts import artifact, index
from controller.sbx.output import STREAM_LIMIT, Capture
from controller.sbx.uploads import Verifier, log_start

SLICE = 0.02  # seconds between two looks while it sleeps
ASK = 0.2  # seconds between two questions whether the task is canceled
WORD = r"""(?:[A-Za-z0-9_./:,=%+@-]+|'[^'\\\n]*'|"[^"$`\\\n]*")"""
STEP = re.compile(
    rf"""\ *(?:
      (?P<plain>true|false)
    | exit\ +(?P<exit>\d{{1,3}})
    | sleep\ +(?P<sleep>\d+(?:\.\d+)?)
    | echo(?P<words>(?:\ +(?!-){WORD})*)(?:\ *>\ *"?\$SISU_OUTPUT_DIR/(?P<file>[A-Za-z0-9._-]+)"?|\ *(?P<err>>&2))?
    | echo\ +"\$(?P<variable>[A-Za-z_][A-Za-z0-9_]*)"
    )\ *(?P<join>&&|;|\n|$)""",
    re.VERBOSE,
)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One run in progress; `killed` is set by kill()."""

    request: SBXReq
    owner: Owner
    capture: Capture
    canceled: Callable[[], bool]
    deadline: float
    killed: bool = False
    asked: float = 0.0
    outputs: dict[str, bytes] = field(default_factory=dict)


class MockProvider:
    """Implements ports.SandboxProvider. Thread-safe; a run costs some ten microseconds and no thread."""

    def __init__(
        self,
        *,
        templates: Sequence[str] = ("base", "python"),
        start_log: Path | None = None,
        output_limit: int = STREAM_LIMIT,
    ) -> None:
        self._templates = tuple(templates)
        self._start_log = start_log
        self._output_limit = output_limit
        self._verifier = Verifier()
        self._runs: list[_Run] = []
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return "mock"

    def resolve(self, template: str) -> str:
        if template not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise InvalidIntent("spec.sandbox.template", f"{template!r} is unknown here; there is: {known}")
        return f"mock:{template}"

    def check(self, request: SBXReq) -> None:
        """Raises InvalidIntent."""
        result.check(request)
        if request.env_ref not in (f"mock:{name}" for name in self._templates):
            raise InvalidIntent("spec.sandbox.template", f"{request.env_ref} is unknown here")

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
        run = _Run(
            request=request,
            owner=owner,
            capture=Capture(emit, limit=self._output_limit),
            canceled=canceled,
            deadline=started + request.timeout_ms / 1000,
        )
        with self._lock:
            self._runs.append(run)
        try:
            code, status = self._judge(run, files)
        finally:
            with self._lock:
                self._runs.remove(run)
        collected = code in (ErrCode.NONE, ErrCode.CMD_NONZERO, ErrCode.TIMEOUT)
        found = [artifact(name, content) for name, content in sorted(run.outputs.items())] if collected else []
        answer = SBXRes(
            exit=status,
            stdout=run.capture.tail("stdout"),
            stderr=run.capture.tail("stderr"),
            files_out=index(found),
            metrics=Metrics(wall_ms=round((time.monotonic() - started) * 1000)),
            sandbox_ref=f"mock:{owner.fence}",
            err_code=code,
            task_key=owner.task_key,
        )
        return answer, found

    def kill(self, owner: Owner) -> int:
        with self._lock:
            found = [run for run in self._runs if _mark(run.owner) == _mark(owner) and not run.killed]
            for run in found:
                run.killed = True
        return len(found)

    def owned(self, store_id: str) -> Sequence[Owner]:
        with self._lock:
            return [run.owner for run in self._runs if run.owner.store_id == store_id]

    def _judge(self, run: _Run, files: Mapping[str, bytes]) -> tuple[ErrCode, int | None]:
        try:
            self.check(run.request)
        except InvalidIntent as e:
            run.capture.note(str(e))
            return ErrCode.BOOT_FAIL, None
        if complaint := self._verifier.complaint(run.request, files):
            run.capture.note(complaint)
            return ErrCode.UPLOAD_FAIL, None
        log_start(self._start_log, run.owner)
        stop, status = _interpret(run)
        if stop is not None:
            run.capture.note(f"ended: {stop.value}")
            return stop, None
        return (ErrCode.NONE if status == 0 else ErrCode.CMD_NONZERO), status


def _mark(owner: Owner) -> tuple[str, int]:
    return owner.store_id, owner.fence


def _parse(command: str) -> list[re.Match[str]] | None:
    """The steps, or None when the command is not of the known kind throughout."""
    steps: list[re.Match[str]] = []
    at = 0
    while at < len(command.rstrip()):
        step = STEP.match(command, at)
        if step is None:
            return None
        steps.append(step)
        at = step.end()
    return None if steps and steps[-1]["join"] == "&&" else steps


def _interpret(run: _Run) -> tuple[ErrCode | None, int]:
    """(why it was stopped, exit code)."""
    steps = _parse(run.request.cmd)
    if steps is None:
        run.capture.feed("stdout", run.request.cmd.encode(errors="replace") + b"\n")
        return _stopped(run), 0
    status, skip = 0, False
    for step in steps:
        if not skip:
            if step["sleep"] is not None and (stop := _sleep(run, float(step["sleep"]))) is not None:
                return stop, 0
            status = _do(run, step)
            if step["exit"] is not None:
                return None, status
        skip = status != 0 and step["join"] == "&&"
    return _stopped(run), status


def _do(run: _Run, step: re.Match[str]) -> int:
    if step["plain"] is not None:
        return 0 if step["plain"] == "true" else 1
    if step["exit"] is not None:
        return int(step["exit"]) % 256
    if step["sleep"] is not None:
        return 0
    if step["variable"] is not None:
        own = {"SISU_OUTPUT_DIR": "/output"}
        text = {**run.request.env, **own}.get(step["variable"], "")
    else:
        text = " ".join(shlex.split(step["words"]))
    line = text.encode(errors="replace") + b"\n"
    if step["file"] is not None:
        run.outputs[step["file"]] = line
    else:
        run.capture.feed("stderr" if step["err"] is not None else "stdout", line)
    return 0


def _sleep(run: _Run, seconds: float) -> ErrCode | None:
    end = time.monotonic() + seconds
    while (stop := _stopped(run)) is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(SLICE, left))
    return stop


def _stopped(run: _Run) -> ErrCode | None:
    now = time.monotonic()
    if run.killed:
        return ErrCode.LOST
    if now >= run.deadline:
        return ErrCode.TIMEOUT
    if now - run.asked >= ASK:
        run.asked = now
        if run.canceled():
            return ErrCode.CANCELED
    return None
