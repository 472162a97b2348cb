"""The two contracts with untrusted parties: what the model answers (PlanOutput) and what a sandbox is asked and answers (SBXReq, SBXRes).

Pydantic, because they are edges; pure, because their JSON Schemas are hashed and golden-tested (tests/unit/golden/).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Line = Annotated[str, Field(max_length=1024)]
Path = Annotated[str, Field(min_length=1, max_length=1024)]


class Contract(BaseModel):
    """Closed, immutable, camelCase on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


# --------------------------------------------------------------------------- the model's answer


class WriteFile(Contract):
    """The whole new content of one file."""

    op: Literal["write"]
    path: Path
    content: Annotated[str, Field(max_length=262_144)]


class ReplaceText(Contract):
    """One search/replace; `search` must occur exactly once in the file."""

    op: Literal["replace"]
    path: Path
    search: Annotated[str, Field(min_length=1, max_length=65_536)]
    replace: Annotated[str, Field(max_length=65_536)]


class DeleteFile(Contract):
    """Remove one file."""

    op: Literal["delete"]
    path: Path


Edit = Annotated[WriteFile | ReplaceText | DeleteFile, Field(discriminator="op")]


class PlanTask(Contract):
    """One command that runs in its own sandbox, in the patched workspace, by `/bin/sh -c command`."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    depends_on: Annotated[tuple[str, ...], Field(max_length=20)] = ()


class PlanOutput(Contract):
    """The plan and the edits that the model proposes. `tests` is for the reader; `tasks` is what runs."""

    goal: Annotated[str, Field(min_length=1, max_length=8192)]
    summary: Annotated[str, Field(min_length=1, max_length=4096)]
    design: Annotated[tuple[Line, ...], Field(max_length=25)]
    files: Annotated[tuple[Line, ...], Field(max_length=30)]
    risks: Annotated[tuple[Line, ...], Field(max_length=15)]
    edits: Annotated[tuple[Edit, ...], Field(max_length=200)]
    tests: Annotated[tuple[Line, ...], Field(max_length=100)]
    tasks: Annotated[tuple[PlanTask, ...], Field(min_length=1, max_length=10_000)]


class Need(Contract):
    """What the model wants to see before it can plan: files, and extended regular expressions to search for."""

    reads: Annotated[tuple[Path, ...], Field(max_length=20)] = ()
    searches: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=5)] = ()


class CompileTurn(Contract):
    """One turn's answer: either `need` (serve it and ask again) or `plan` (done)."""

    kind: Literal["need", "plan"]
    need: Need | None = None
    plan: PlanOutput | None = None


# --------------------------------------------------------------------------- the sandbox


class ErrCode(StrEnum):
    """How a task ended. From typed exceptions and exit states, never from words in its output."""

    NONE = "NONE"
    CMD_NONZERO = "CMD_NONZERO"
    TIMEOUT = "TIMEOUT"
    OOM = "OOM"
    BOOT_FAIL = "BOOT_FAIL"
    NET_FAIL = "NET_FAIL"
    UPLOAD_FAIL = "UPLOAD_FAIL"
    DOWNLOAD_FAIL = "DOWNLOAD_FAIL"
    LOST = "LOST"
    CANCELED = "CANCELED"
    SKIPPED = "SKIPPED"  # not run: a task that it depends on failed, any did and the recipe is FailFast, or refused
    BUDGET = "BUDGET"  # not run: maxSandboxMinutes are used up

    @property
    def retryable(self) -> bool:
        """Infrastructure failed, not the task: another sandbox may do better (at most 3 attempts)."""
        return self in (ErrCode.BOOT_FAIL, ErrCode.NET_FAIL, ErrCode.UPLOAD_FAIL, ErrCode.DOWNLOAD_FAIL, ErrCode.LOST)


class FileIn(Contract):
    """One upload. `archive` is a tar that is unpacked at workdir, `patch` is applied there by git after all archives."""

    kind: Literal["archive", "patch"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Limits(Contract):
    """Ceilings of one sandbox."""

    cpu_millis: int = 1000
    memory_mb: int = 512
    pids: int = 256
    disk_mb: int = 1024


class Egress(Contract):
    """What the task may reach. `None` is nothing at all."""

    mode: Literal["None", "Public", "Allow"] = "None"
    allow: tuple[str, ...] = ()


class SBXReq(Contract):
    """One task for a sandbox. `task_key` (core.taskkey) is the hash of its RFC 8785 form."""

    intent_id: str
    run_id: str
    step_id: str
    task_id: str
    generation: int
    env_ref: str
    cmd: str
    files_in: tuple[FileIn, ...]
    env: dict[str, str]
    workdir: str
    timeout_ms: int
    limits: Limits
    egress: Egress


class FileOut(Contract):
    """One file that the task left in its output directory."""

    path: str
    sha256: str


class Metrics(Contract):
    """Measured by the provider; None where it cannot measure."""

    wall_ms: int
    cpu_ms: int | None = None
    mem_peak_mb: Annotated[int | None, Field(alias="memPeakMB")] = None


class SBXRes(Contract):
    """What came back. `exit` is None when the command did not end by itself."""

    exit: int | None
    stdout: str
    stderr: str
    files_out: tuple[FileOut, ...]
    metrics: Metrics
    sandbox_ref: str
    err_code: ErrCode
    task_key: str
    artifact_index_ref: str | None = None
