"""The PlanApproval as pydantic models: what crds/planapprovals.yaml says, in Python. Shared parts are in crd.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from controller.kube.crd import (
    MAX_INTENT_NAME,
    Condition,
    Count,
    Decision,
    EgressMode,
    Hex64,
    Line,
    Name253,
    Positive,
    ShownLine,
    SpecPart,
    StatusPart,
)

# --------------------------------------------------------------------------- PlanApproval.spec


class IntentRef(SpecPart):
    """Which Intent, by name and uid."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_INTENT_NAME)]
    uid: Annotated[str, Field(min_length=1, max_length=64)]


class PartRef(SpecPart):
    """A ConfigMap that holds what does not fit; it counts only if its hash matches."""

    name: Name253
    sha256: Hex64


class ApprovedTask(SpecPart):
    """One command that runs after approval."""

    id: Annotated[str, Field(min_length=1, max_length=63)]
    title: Annotated[str, Field(min_length=1, max_length=200)]
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400)]
    depends_on: Annotated[tuple[Annotated[str, Field(max_length=63)], ...], Field(max_length=20)] = ()


class ApprovedPatch(SpecPart):
    """The change. `diff` is its beginning where `moreRef` has all of it; the hash is of the whole diff."""

    sha256: Hex64
    files: Annotated[tuple[Line, ...], Field(max_length=200)] = ()
    additions: Count | None = None
    deletions: Count | None = None
    diff: Annotated[str | None, Field(max_length=65_536)] = None
    more_ref: PartRef | None = None


class ApprovedEgress(SpecPart):
    """What the tasks may reach, with no default left open."""

    mode: EgressMode
    allow: Annotated[tuple[Annotated[str, Field(max_length=260)], ...], Field(max_length=32)] = ()


class ApprovedLimits(SpecPart):
    """Ceilings per sandbox (first four) and of the whole execution."""

    cpu_millis: Positive
    memory_mb: Positive
    pids: Positive
    disk_mb: Positive
    parallelism: Positive
    max_sandbox_minutes: Positive
    timeout_seconds: Positive


class Execution(SpecPart):
    """What else the digest binds."""

    commit: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]
    snapshot_sha256: Hex64
    inputs_sha256: Hex64
    constraints_sha256: Hex64
    template: Annotated[str, Field(min_length=1, max_length=512)]
    egress: ApprovedEgress
    limits: ApprovedLimits
    on_failure: Literal["RunAll", "FailFast"] | None = None
    secrets: Annotated[tuple[Name253, ...], Field(max_length=16)] = ()
    policy_sha256: Hex64
    compiler_version: Annotated[str, Field(min_length=1, max_length=64)]
    prompt_version: Annotated[str, Field(min_length=1, max_length=64)]
    generation: Count


class ApprovedPlan(SpecPart):
    """What people read and approve."""

    digest: Annotated[str, Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$")]
    goal: Annotated[str, Field(min_length=1, max_length=8192)]
    summary: Annotated[str, Field(max_length=40_960)]
    design: Annotated[tuple[ShownLine, ...], Field(max_length=25)] = ()
    files: Annotated[tuple[ShownLine, ...], Field(max_length=30)] = ()
    risks: Annotated[tuple[ShownLine, ...], Field(max_length=15)] = ()
    tests: Annotated[tuple[ShownLine, ...], Field(max_length=100)] = ()
    task_count: Annotated[int, Field(ge=0, le=10_000)]
    tasks: Annotated[tuple[ApprovedTask, ...], Field(max_length=1000)] = ()
    tasks_ref: PartRef | None = None
    patch: ApprovedPatch
    execution: Execution


class ApprovalPolicy(SpecPart):
    """Who must agree; the stricter of the namespace's policy and the Intent."""

    required: Annotated[int, Field(ge=1, le=8)]
    allow_requester: bool
    requested_by: Annotated[str | None, Field(max_length=256)] = None
    expires_at: AwareDatetime


class DecisionEntry(SpecPart):
    """One person's decision, under the name that the API server authenticated."""

    approver: Annotated[str, Field(min_length=1, max_length=256)]
    verdict: Literal["Approve", "Reject"]
    reason: Line | None = None


class PlanApprovalSpec(SpecPart):
    """What is to be decided, and the decisions. `decisions` is always there, so that a JSON patch can append to it."""

    intent: IntentRef
    plan: ApprovedPlan
    policy: ApprovalPolicy
    decisions: Annotated[tuple[DecisionEntry, ...], Field(max_length=16)]


# --------------------------------------------------------------------------- PlanApproval.status


class ConsumedBy(StatusPart):
    """What the approval was used for; it is used once."""

    workflow_id: Annotated[str, Field(min_length=1, max_length=128)]
    at: AwareDatetime


class PlanApprovalStatus(StatusPart):
    """What became of it."""

    decision: Decision | None = None
    received: Annotated[int | None, Field(ge=0, le=16)] = None
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    consumed_by: ConsumedBy | None = None
