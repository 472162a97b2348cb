"""A run as reconcile sees it: the row of app.runs with its task counts, and the votes on its plan. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from controller.core.phases import Stage, Status
from controller.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TaskFailure:
    """One failed task, bounded for the status."""

    task: str
    err_code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """How many tasks of the current plan are where."""

    total: int = 0
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    unknown: int = 0
    sandbox_ms: int = 0
    failures: tuple[TaskFailure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """The truth about one Intent. `plan` is PlanOutput JSON, `record` what the digest is of."""

    run_id: str
    intent_id: str
    status: Status
    stage: Stage
    settings: Settings
    last_step: str | None = None
    reason: str | None = None
    error: str | None = None
    next_action: str | None = None
    plan_no: int = 1
    execution_no: int = 0
    retry_count: int = 0
    commit_id: str | None = None
    plan: Mapping[str, Any] | None = None
    record: Mapping[str, Any] | None = None
    digest: str | None = None
    patch_sha256: str | None = None
    approval_name: str | None = None
    approval_uid: str | None = None
    approval_deadline: datetime | None = None
    requested_by: str = ""
    result: Mapping[str, Any] | None = None
    tokens: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    updated_at: datetime | None = None
    tasks: Tasks = field(default_factory=Tasks)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One decision, as the API server authenticated it."""

    approver: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Approval:
    """A PlanApproval as read from the API server. `problem` says why its votes cannot count (None when they can)."""

    name: str
    uid: str
    digest: str
    votes: tuple[Vote, ...] = ()
    problem: str | None = None
    status: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Intent:
    """An Intent as read from the API server."""

    uid: str
    namespace: str
    name: str
    generation: int
    resource_version: str
    spec: Mapping[str, Any]
    status: Mapping[str, Any]
    has_finalizer: bool
    deleting: bool
    acknowledged_store: str | None = None
