"""What the workflows handle: the frozen request of a run, one attempt at a task, its outcome. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from controller.core.contract import ErrCode, SBXReq, SBXRes
from controller.core.model import Artifact, Chunk
from controller.core.phases import Stage, Status
from controller.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Context:
    """A run and what was asked. `plan_no` and `execution_no` are the generations of law 1."""

    run_id: str
    intent_id: str
    intent_name: str
    namespace: str
    status: Status
    stage: Stage
    goal: str
    inputs: Any
    constraints: Any
    workspace: Mapping[str, Any] | None
    settings: Settings
    plan_no: int
    execution_no: int
    total: int
    feedback: str | None
    digest: str | None
    record: Mapping[str, Any] | None
    patch_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One approved task and what will be asked of its sandbox. `depends_on` are task ids that must succeed first."""

    task_id: str
    task_key: str
    request: SBXReq
    depends_on: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """All tasks of one approved plan, in order."""

    run_id: str
    execution_no: int
    generation: int
    tasks: Sequence[Task]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One journaled attempt. `attempt` counts over all executions, what ended those before it in this one only.

    `failures`: an infrastructure error. `interruptions`: its worker died beside other tasks, `interruptions_alone` without any.
    `fence` is None when there is nothing to run: read `run_status` and `leased` for why.
    """

    run_id: str
    run_status: Status
    leased: bool = True
    deadline: datetime | None = None
    task_key: str = ""
    attempt: int = 0
    failures: int = 0
    interruptions: int = 0
    interruptions_alone: int = 0
    fence: int | None = None
    request: SBXReq | None = None
    superseded: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attempt ended with, all of which is committed together. `chunk_base` is the first chunk's sequence number."""

    response: SBXRes
    provider: str
    artifacts: Sequence[Artifact]
    chunks: Sequence[Chunk]
    chunk_base: int
    junit: Mapping[str, int] | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task after its last attempt."""

    task_id: str
    task_key: str
    status: str
    err_code: ErrCode | None
    attempt: int
    exit: int | None
    wall_ms: int | None
    junit: Mapping[str, int] | None
