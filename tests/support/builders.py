"""Values for tests: an Intent, its run in any state, its approval, tasks and outcomes. Everything valid unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from controller.core import approval as approvals
from controller.core import digest as digests
from controller.core.contract import Egress, ErrCode, FileIn, Limits, Metrics, SBXReq, SBXRes
from controller.core.phases import Stage, Status
from controller.core.run import Approval, Intent, Run, Vote
from controller.core.settings import Policy, Recipe, Settings, effective
from controller.core.taskkey import task_key
from controller.core.work import Context, Outcome, Task

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
DEADLINE = NOW + timedelta(hours=1)
STORE = "store-1"
UID = "11111111-2222-3333-4444-555555555555"
APPROVAL_UID = "99999999-8888-7777-6666-555555555555"
DIFF = b"--- a/median.py\n+++ b/median.py\n@@ -1 +1 @@\n-old\n+new\n"
POLICY = Policy(
    required=1,
    allow_requester=True,
    templates=("python",),
    egress=("None",),
    max_priority=0,
    recipes={"sandbox-default": Recipe(), "fail-fast": Recipe(on_failure="FailFast")},
    max_executions=3,
    sha256="a" * 64,
)


def settings(**changes: Any) -> Settings:
    """Effective settings of an empty spec under POLICY."""
    return replace(effective({}, namespace="team", policy=POLICY), **changes)


def intent(spec: Mapping[str, Any] | None = None, **changes: Any) -> Intent:
    """A fresh Intent that was just applied; `spec` is added to its goal."""
    plain = Intent(
        uid=UID,
        namespace="team",
        name="fix-median",
        generation=1,
        resource_version="1",
        spec={"goal": "median() is wrong", "requestedBy": "carol@corp", **(spec or {})},
        status={},
        has_finalizer=False,
        deleting=False,
    )
    return replace(plain, **changes)


def task(number: int = 0, /, **changes: Any) -> dict[str, Any]:
    """One task of a plan as JSON."""
    return {
        "id": f"t{number}",
        "title": f"task {number}",
        "command": f"echo {number}",
        "timeoutSeconds": 300,
        "dependsOn": [],
        **changes,
    }


def plan(tasks: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """app.runs.plan: PlanOutput and what git says about the patch."""
    return {
        "goal": "median() is wrong",
        "summary": "one line of median() changes",
        "design": ["take the mean of the middle two"],
        "files": ["median.py"],
        "risks": [],
        "edits": [],
        "tests": ["an even list"],
        "tasks": [task()] if tasks is None else list(tasks),
        "patch": {"files": ["median.py"], "additions": 1, "deletions": 1},
        **changes,
    }


def execution(**changes: Any) -> dict[str, Any]:
    """`spec.plan.execution` of a PlanApproval."""
    return {
        "commit": "c" * 40,
        "snapshotSha256": digests.sha256(b"snapshot"),
        "inputsSha256": digests.sha256_json({}),
        "constraintsSha256": digests.sha256_json({}),
        "template": "local:python@1",
        "egress": {"mode": "None", "allow": []},
        "limits": {
            "cpuMillis": 1000,
            "memoryMb": 512,
            "pids": 256,
            "diskMb": 1024,
            "parallelism": 10,
            "maxSandboxMinutes": 60,
            "timeoutSeconds": 7200,
        },
        "onFailure": "RunAll",
        "secrets": [],
        "policySha256": "a" * 64,
        "compilerVersion": "1",
        "promptVersion": "compile-1",
        "generation": 1,
        **changes,
    }


def run(status: Status = Status.QUEUED, stage: Stage = Stage.PLAN, **changes: Any) -> Run:
    """A run that has no plan."""
    plain = Run(
        run_id=digests.run_id(UID),
        intent_id=UID,
        status=status,
        stage=stage,
        settings=settings(),
        requested_by="carol@corp",
        updated_at=NOW,
    )
    return replace(plain, **changes)


def planned_run(
    status: Status = Status.WAITING_INPUT,
    stage: Stage = Stage.APPROVE,
    *,
    plan_json: Mapping[str, Any] | None = None,
    diff: bytes = DIFF,
    goal: str = "median() is wrong",
    **changes: Any,
) -> Run:
    """A run whose plan has a record, a digest and a recorded approval object."""
    shown = dict(plan() if plan_json is None else plan_json)
    record = digests.execution_record(
        goal=goal, tasks=shown["tasks"], patch_sha256=digests.sha256(diff), execution=execution()
    )
    digest = digests.plan_digest(record)
    plain = run(
        status,
        stage,
        plan=shown,
        record=record,
        digest=digest,
        patch_sha256=digests.sha256(diff),
        approval_name=digests.approval_name("fix-median", digest),
        approval_uid=APPROVAL_UID,
        approval_deadline=DEADLINE,
        last_step="DecideST",
        started_at=NOW,
        commit_id="c" * 40,
        reason="plan_not_approved" if status is Status.WAITING_INPUT else None,
    )
    return replace(plain, **changes)


def context(**changes: Any) -> Context:
    """What a workflow knows of a run that is planning."""
    plain = Context(
        run_id=digests.run_id(UID),
        intent_id=UID,
        intent_name="fix-median",
        namespace="team",
        status=Status.RUNNING,
        stage=Stage.PLAN,
        goal="median() is wrong",
        inputs={},
        constraints={},
        workspace=None,
        settings=settings(),
        plan_no=1,
        execution_no=0,
        total=0,
        feedback=None,
        digest=None,
        record=None,
        patch_sha256=None,
    )
    return replace(plain, **changes)


def vote(approver: str = "alice@corp", verdict: str = "Approve", reason: str = "") -> Vote:
    """One decision."""
    return Vote(approver=approver, verdict=verdict, reason=reason)


def approval(of: Run, *votes: Vote, **changes: Any) -> Approval:
    """The recorded PlanApproval of a run."""
    plain = Approval(
        name=of.approval_name or "", uid=of.approval_uid or APPROVAL_UID, digest=of.digest or "", votes=votes
    )
    return replace(plain, **changes)


def shown(of: Run, diff: bytes = DIFF) -> approvals.Shown:
    """What its PlanApproval must say."""
    return approvals.build(of, intent_name="fix-median", diff=diff)


def request(**changes: Any) -> SBXReq:
    """One task for a sandbox."""
    plain = SBXReq(
        intent_id=UID,
        run_id=digests.run_id(UID),
        step_id="ExecuteST",
        task_id="t0",
        generation=1,
        env_ref="local:python@1",
        cmd="echo 0",
        files_in=(FileIn(kind="archive", sha256=digests.sha256(b"snapshot")),),
        env={},
        workdir="/workspace",
        timeout_ms=300_000,
        limits=Limits(),
        egress=Egress(),
    )
    return plain.model_copy(update=changes)


def tasks(
    run_id: str, count: int, *, generation: int = 1, depends: Mapping[int, Sequence[int]] | None = None
) -> list[Task]:
    """What ExecutePlanWF makes of `count` tasks; `depends` maps a task's number to those that it waits for."""
    made = [request(run_id=run_id, task_id=f"t{n}", cmd=f"echo {n}", generation=generation) for n in range(count)]
    return [
        Task(
            task_id=one.task_id,
            task_key=task_key(one),
            request=one,
            depends_on=tuple(f"t{d}" for d in (depends or {}).get(n, ())),
        )
        for n, one in enumerate(made)
    ]


def response(code: ErrCode = ErrCode.NONE, *, key: str = "", **changes: Any) -> SBXRes:
    """What a sandbox answered."""
    plain = SBXRes(
        exit={ErrCode.NONE: 0, ErrCode.CMD_NONZERO: 1}.get(code),
        stdout="out",
        stderr="",
        files_out=(),
        metrics=Metrics(wall_ms=12),
        sandbox_ref="box",
        err_code=code,
        task_key=key,
    )
    return plain.model_copy(update=changes)


def outcome(code: ErrCode = ErrCode.NONE, *, key: str = "", **changes: Any) -> Outcome:
    """How an attempt ended, without artifacts."""
    plain = Outcome(
        response=response(code, key=key), provider="mock", artifacts=(), chunks=(), chunk_base=0, junit=None
    )
    return replace(plain, **changes)


def mutants(value: Any) -> Iterator[Any]:
    """Every JSON value that differs from this one in one place: a leaf changed, a key or an item added, dropped or moved."""
    if isinstance(value, Mapping):
        yield {**value, "added": 1}
        for key, inner in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in mutants(inner))
    elif isinstance(value, list):
        yield [*value, "added"]
        if value != value[::-1]:
            yield value[::-1]
        for at, inner in enumerate(value):
            yield [*value[:at], *value[at + 1 :]]
            yield from ([*value[:at], other, *value[at + 1 :]] for other in mutants(inner))
    elif isinstance(value, str):
        yield value + " "
        yield f"{value[:-1]}\u00e9" if value else "\u200b"
        yield None
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, str(value))
    else:
        yield "not null"
