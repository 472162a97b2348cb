"""What the judge looks at, as values. Times are seconds since 1970 by PostgreSQL's clock or our own, which are one machine's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of app.sbx_runs, in task order. `receipts` is what app.mock_receipts counted for it."""

    task_id: str
    task_key: str
    status: str
    err_code: str | None
    exit: int | None
    outcomes: int
    fence: int | None
    receipts: int
    junit: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A row of app.sbx_attempts: one intention to create a sandbox."""

    fence: int
    task_key: str
    attempt: int
    state: str
    executor: str
    created: float
    ended: float | None

    @property
    def worker(self) -> str:
        """The process incarnation: an executor's id is its name and eight random digits."""
        return self.executor.rpartition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Start:
    """A line of the sandboxes' start log (SBX_START_LOG): the count that PostgreSQL has no part in."""

    task_key: str
    attempt: int
    fence: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One Intent's execution. `endings` are the terminal statuses it ever had, `finishers` FinishWF's outputs, `steps` ExecuteST's rows."""

    status: str
    reason: str | None
    closed: int
    executions: int
    endings: tuple[str, ...]
    finishers: tuple[str, ...]
    steps: int
    result: tuple[tuple[str, str], ...]  # (task id, status)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One artifact of a task, with the hash of its blob's bytes as they are."""

    task_id: str
    name: str
    kind: str
    attempt: int
    sha256: str
    content_sha256: str


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What app.chunks has of one attempt."""

    task_key: str
    attempt: int
    stdout_bytes: int
    marks: int  # `stream_closed`
    last: str  # the kind of the last chunk


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All of it, of one Intent. `shown` is the Intent's status.tasks, `largest` its JSON in bytes at its largest."""

    run: Run
    tasks: tuple[Task, ...]
    attempts: tuple[Attempt, ...]
    starts: tuple[Start, ...]
    shown: Mapping[str, int]
    largest: int
    kept: tuple[Kept, ...] = ()
    streams: tuple[Stream, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """A worker that could not go on: `killed`, `stopped` and `disowned` by us, `ended` by itself."""

    worker: str
    what: str
    at: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A worker's log line `attempt failed`: the sandbox, not the task, was the trouble."""

    task_key: str
    attempt: int
    err_code: str


@dataclass(frozen=True, kw_only=True)
class Window:
    """From when to when the sandbox provider failed on purpose."""

    what: str
    began: float
    ended: float


@dataclass(frozen=True, kw_only=True)
class Causes:
    """Everything that may explain an attempt whose outcome did not count."""

    interruptions: tuple[Interruption, ...] = ()
    failures: tuple[Failure, ...] = ()
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question of the verdict: how many rows were looked at, and those that show that the answer is no."""

    name: str
    looked_at: int
    violations: tuple[str, ...] = field(default=())
