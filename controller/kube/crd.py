"""The custom resources as pydantic models: what crds/ says, in Python (tests/unit/test_crd_models.py).

A spec is closed (an unknown field is an error), a status is open (a newer controller may have written more).
Absent stays absent: DEFAULTS says what that means, and is never written into an object: GitOps tools would fight it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

GROUP: Final = "sisukodo.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FINALIZER: Final = "sisukodo.dev/run"
ACKNOWLEDGE_STORE: Final = "sisukodo.dev/acknowledge-store"
MAX_INTENT_NAME: Final = 200
MAX_FREE_JSON_BYTES: Final = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What an absent field of an Intent's spec means."""

    template: str = "python"
    egress_mode: str = "None"
    cpu: str = "1"
    memory: str = "512Mi"
    task_timeout_seconds: int = 300
    max_tasks: int = 100
    parallelism: int = 10
    timeout_seconds: int = 7200
    max_tokens: int = 500_000
    max_sandbox_minutes: int = 60
    required: int = 1
    expires_after_seconds: int = 259_200
    priority: int = 0
    recipe: str = "sandbox-default"
    ref: str = "HEAD"


DEFAULTS: Final = Defaults()


# The rules that the CRDs state in CEL, because a pattern has no message. RE2 and Python read them alike.
GIT_URL: Final = (
    r"^(https://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])|http://(127[.]0[.]0[.]1|localhost|\[::1\]))"
    r"(:[0-9]{1,5})?(/[A-Za-z0-9._~%+,:@!$&*()=;/-]*)?$"
)
GIT_REF: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.+@/-]*$"
PARTITION_KEY: Final = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
TEMPLATE: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"
SECRET_NAME: Final = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?([.][a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"
HOST: Final = r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$"


def _like(pattern: str, wanted: str, *, without: tuple[str, ...] = ()) -> AfterValidator:
    # fullmatch: Python's `$` would let a line feed through at the end, RE2's does not.
    compiled = re.compile(pattern.removeprefix("^").removesuffix("$"))

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None or any(part in value for part in without):
            raise ValueError(wanted)
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Hex64 = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]
Name253 = Annotated[str, Field(min_length=1, max_length=253)]
Line = Annotated[str, Field(max_length=1024)]
# Ten times what the model may write: hidden characters are shown as `<U+202E>`.
ShownLine = Annotated[str, Field(max_length=10_240)]
FreeJson = Annotated[dict[str, Any], Field(max_length=256)]
Host = Annotated[
    str,
    Field(min_length=1, max_length=260),
    _like(HOST, "use host or host:port, for example packages.example.com or packages.example.com:443"),
]
GitUrl = Annotated[
    str,
    Field(min_length=1, max_length=1024),
    _like(GIT_URL, "use https://host/path without a user, password or query; put credentials into secretRef"),
]
GitRef = Annotated[
    str,
    Field(min_length=1, max_length=255),
    _like(GIT_REF, "use a branch, tag or commit such as main, v1.2.0 or refs/heads/fix", without=("..", "//")),
]
PartitionKey = Annotated[
    str,
    Field(min_length=1, max_length=63),
    _like(
        PARTITION_KEY, "use letters, digits, '-', '_' and '.', with a letter or digit at both ends, such as tenant-1"
    ),
]
Template = Annotated[
    str,
    Field(min_length=1, max_length=253),
    _like(TEMPLATE, "use the name of a template such as python or team/node:22"),
]
CpuText = Annotated[
    str,
    Field(max_length=16, pattern=r"^([1-9][0-9]{0,2}([.][0-9]{1,3})?|0[.]0{0,2}[1-9][0-9]{0,2}|[1-9][0-9]{0,5}m)$"),
]
Memory = Annotated[str, Field(min_length=2, max_length=16, pattern=r"^[1-9][0-9]{0,11}(M|G|Ki|Mi|Gi)$")]
EgressMode = Literal["None", "Public", "Allow"]
Phase = Literal[
    "Queued",
    "Running",
    "WaitingInput",
    "Canceling",
    "Repairing",
    "Succeeded",
    "Failed",
    "RetriesExceeded",
    "Canceled",
    "Rejected",
    "Expired",
]
Decision = Literal["Pending", "Approved", "Rejected", "Expired", "Superseded", "Canceled"]


class SpecPart(BaseModel):
    """Closed, immutable, camelCase on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """As it stands in an object: camelCase, absent fields absent."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusPart(SpecPart):
    """The same, but what it does not know it leaves out."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)


# --------------------------------------------------------------------------- Intent.spec


class SecretRef(SpecPart):
    """A Secret in the Intent's namespace."""

    name: Annotated[Name253, _like(SECRET_NAME, "use the name of a Secret such as forge-token")]


class GitWorkspace(SpecPart):
    """A repository that is read, never written."""

    url: GitUrl
    ref: GitRef | None = None
    secret_ref: SecretRef | None = None


class Workspace(SpecPart):
    """The code to work on; without git it is an empty directory."""

    git: GitWorkspace | None = None


class ApprovalRules(SpecPart):
    """What the Intent asks for; the namespace's policy may be stricter."""

    required: Annotated[int | None, Field(ge=1, le=8)] = None
    expires_after_seconds: Annotated[int | None, Field(ge=1, le=31_536_000)] = None


class Egress(SpecPart):
    """What tasks may reach. Hosts are listed for mode Allow, and only then."""

    mode: EgressMode | None = None
    allow: Annotated[tuple[Host, ...], Field(max_length=32)] = ()

    @model_validator(mode="after")
    def _hosts_for_allow(self) -> Self:
        if (self.mode == "Allow") != bool(self.allow):
            raise ValueError("allow lists hosts for mode Allow: give both or neither")
        return self


class SandboxSpec(SpecPart):
    """What each task runs in."""

    template: Template | None = None
    egress: Egress | None = None
    cpu: Annotated[int, Field(ge=1, le=999)] | CpuText | None = None
    memory: Memory | None = None
    task_timeout_seconds: Annotated[int | None, Field(ge=1, le=86_400)] = None


class Limits(SpecPart):
    """Ceilings for the whole Intent."""

    max_tasks: Annotated[int | None, Field(ge=1, le=10_000)] = None
    parallelism: Annotated[int | None, Field(ge=1, le=1000)] = None
    timeout_seconds: Annotated[int | None, Field(ge=1, le=604_800)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000_000)] = None
    max_sandbox_minutes: Annotated[int | None, Field(ge=1, le=1_000_000)] = None


class IntentSpec(SpecPart):
    """What is wanted."""

    goal: Annotated[str, Field(min_length=1, max_length=8192)]
    inputs: FreeJson | None = None
    constraints: FreeJson | None = None
    workspace: Workspace | None = None
    recipe: Annotated[str | None, Field(min_length=1, max_length=63)] = None
    queue_partition_key: PartitionKey | None = None
    priority: Annotated[int | None, Field(ge=-1000, le=1000)] = None
    approval: ApprovalRules | None = None
    sandbox: SandboxSpec | None = None
    limits: Limits | None = None
    requested_by: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    suspend: bool | None = None
    cancel: bool | None = None
    retry: Annotated[int | None, Field(ge=0, le=100_000)] = None
    ttl_seconds_after_finished: Annotated[int | None, Field(ge=0, le=315_360_000)] = None


# --------------------------------------------------------------------------- Intent.status


class Condition(StatusPart):
    """One aspect of the state, as Kubernetes' own conditions."""

    type: Annotated[str, Field(min_length=1, max_length=64)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: Count | None = None
    last_transition_time: AwareDatetime
    reason: Annotated[str, Field(min_length=1, max_length=128)]
    message: Line


class PlanStatus(StatusPart):
    """The plan that waits, or was decided on last."""

    digest: Annotated[str | None, Field(max_length=71)] = None
    approval_name: Annotated[str | None, Field(max_length=253)] = None
    task_count: Count | None = None
    summary: Line | None = None


class TaskCounts(StatusPart):
    """How many tasks are where. `display` is finished of all, such as 3/10."""

    total: Count | None = None
    queued: Count | None = None
    running: Count | None = None
    succeeded: Count | None = None
    failed: Count | None = None
    unknown: Count | None = None
    display: Annotated[str | None, Field(max_length=32)] = None


class Failure(StatusPart):
    """One failed task."""

    task: Annotated[str, Field(max_length=63)]
    err_code: Annotated[str, Field(max_length=32)]
    message: Annotated[str | None, Field(max_length=256)] = None


class Junit(StatusPart):
    """Test results over all tasks."""

    tests: Count | None = None
    failures: Count | None = None


class Result(StatusPart):
    """What came out, by artifact names."""

    patch_ref: Annotated[str | None, Field(max_length=256)] = None
    junit: Junit | None = None
    artifact_index_ref: Annotated[str | None, Field(max_length=256)] = None


class Usage(StatusPart):
    """What it has cost so far."""

    tokens: Count | None = None
    sandbox_seconds: Count | None = None


class IntentStatus(StatusPart):
    """The projection of app.runs; the database is the truth."""

    observed_generation: Count | None = None
    observed_retry: Count | None = None
    store_id: Annotated[str | None, Field(max_length=64)] = None
    phase: Phase | None = None
    reason: Annotated[str | None, Field(max_length=128)] = None
    last_step: Annotated[str | None, Field(max_length=64)] = None
    run_id: Annotated[str | None, Field(max_length=64)] = None
    workflow_id: Annotated[str | None, Field(max_length=128)] = None
    next_action: Line | None = None
    resolved_commit: Annotated[str | None, Field(max_length=64)] = None
    plan: PlanStatus | None = None
    tasks: TaskCounts | None = None
    failures: Annotated[tuple[Failure, ...], Field(max_length=10)] = ()
    result: Result | None = None
    usage: Usage | None = None
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None
    approval_deadline: AwareDatetime | None = None
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
