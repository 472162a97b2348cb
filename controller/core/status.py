"""The projection: what an Intent's and a PlanApproval's status say, computed from the truth. Equal input, equal output.

Conditions keep their lastTransitionTime while their status stays the same, so a rebuilt status equals the written one.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from controller.core.phases import Stage, Status
from controller.core.run import Approval, Intent, Run
from controller.core.visible import visible

MAX_FAILURES = 10
TAMPERED = "Tampered"  # of the condition IdentityVerified
MAX_MESSAGE = 256

# The closed list of reasons (docs/reasons.md explains each).
REASONS = {
    "Queued": "waiting for a worker",
    "Suspended": "spec.suspend is true",
    "InvalidSpec": "the spec asks for something that cannot be",
    "StoreBehind": "this Intent was started from another database, or its rows are gone; see the runbook",
    "Planning": "OpenCode is making the plan",
    "plan_not_approved": "the plan waits for people",
    "IdentityNotEnforced": "the cluster does not enforce who may approve; nothing executes",
    "ApprovalTampered": "the PlanApproval does not match the stored plan; its votes do not count",
    "Executing": "tasks are running",
    "Finishing": "all tasks have ended; results are being joined",
    "Canceling": "waiting for running sandboxes to be gone",
    "Repairing": "a retry is waiting for a worker",
    "Succeeded": "every task succeeded",
    "TaskFailed": "a task failed by itself (a red test, a timeout, out of memory)",
    "BudgetExceeded": "limits.maxSandboxMinutes are used up; the remaining tasks were not run",
    "InfrastructureFailed": "sandboxes could not be had, or workers died under a task, again and again",
    "PlanFailed": "no plan could be made",
    "ExecutionRefused": "the stored bytes are not the approved bytes, or the sandbox template changed",
    "Rejected": "somebody rejected the plan",
    "Expired": "nobody approved the plan in time",
    "Canceled": "spec.cancel is true",
    "Deleted": "the Intent was deleted",
    "Accepted": "the spec is valid",
    "PlanReady": "the plan can be reviewed",
    "QuorumReached": "enough people approved the plan",
    "NoReason": "",
}


def _condition(
    old: Mapping[str, Any], kind: str, value: str, reason: str, *, generation: int, now: datetime, message: str = ""
) -> dict[str, Any]:
    before = next((c for c in old.get("conditions", ()) if c["type"] == kind), None)
    at = before["lastTransitionTime"] if before is not None and before["status"] == value else stamp(now)
    return {
        "type": kind,
        "status": value,
        "reason": reason,
        "message": visible(message or REASONS.get(reason, ""))[:1024],
        "lastTransitionTime": at,
        "observedGeneration": generation,
    }


def stamp(at: datetime) -> str:
    """RFC 3339 in UTC, whole seconds, as Kubernetes writes it."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _conditions(intent: Intent, now: datetime, *rows: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    return [
        _condition(intent.status, kind, value, reason, generation=intent.generation, now=now, message=message)
        for kind, value, reason, message in rows
    ]


def refused(intent: Intent, *, problem: str, now: datetime) -> dict[str, Any]:
    """The spec cannot be carried out: Accepted=False, and nothing was written anywhere else."""
    return {
        "observedGeneration": intent.generation,
        "reason": "InvalidSpec",
        "nextAction": "Delete this Intent and apply a corrected one",
        "conditions": _conditions(
            intent, now, ("Accepted", "False", "InvalidSpec", problem), ("Finished", "False", "InvalidSpec", problem)
        ),
    }


def held(intent: Intent, *, reason: str, store_id: str, now: datetime) -> dict[str, Any]:
    """Accepted, but no run exists yet."""
    ended = "True" if reason == "Canceled" else "False"
    finished = {"finishedAt": intent.status.get("finishedAt") or stamp(now)} if reason == "Canceled" else {}
    return {
        **finished,
        "observedGeneration": intent.generation,
        "storeId": store_id,
        "phase": "Canceled" if reason == "Canceled" else "Queued",
        "reason": reason,
        "conditions": _conditions(
            intent, now, ("Accepted", "True", "Accepted", "the spec is valid"), ("Finished", ended, reason, "")
        ),
    }


def stalled(intent: Intent, *, store_id: str, now: datetime, consumed: bool = False) -> dict[str, Any]:
    """StoreBehind: keep what the status says, and add that a person must look."""
    reason = "StoreBehind"
    remedy = (
        "This plan's approval was executed before and is never consumed again: set spec.cancel, or delete the Intent"
        if consumed
        else "To let this database take over: "
        f"kubectl annotate intent {intent.name} -n {intent.namespace} sisukodo.dev/acknowledge-store={store_id}"
    )
    message = f"{REASONS[reason]}. This database is {store_id}. {remedy}"
    others = [dict(c) for c in intent.status.get("conditions", ()) if c["type"] != "Stalled"]
    return {
        **intent.status,
        "reason": reason,
        "conditions": [*others, *_conditions(intent, now, ("Stalled", "True", reason, message))],
    }


def history(intent: Intent, *, store_id: str) -> dict[str, Any]:
    """It ended in another store, and a person has said that this one takes over: it stays as it ended."""
    kept = [dict(c) for c in intent.status.get("conditions", ()) if c["type"] != "Stalled"]
    reason = next((c["reason"] for c in kept if c["type"] == "Finished"), intent.status["phase"])
    return {
        **intent.status,
        "observedGeneration": intent.generation,
        "storeId": store_id,
        "reason": reason,
        "conditions": kept,
    }


def reason_of(run: Run, *, identity: str | None, approval_problem: str | None) -> str:
    """Why the run is where it is: one word of the closed list."""
    if run.status is Status.WAITING_INPUT:
        if approval_problem is not None:
            return "ApprovalTampered"
        return "IdentityNotEnforced" if identity is not None else "plan_not_approved"
    if run.status is Status.RUNNING:
        return {Stage.PLAN: "Planning", Stage.FINISH: "Finishing"}.get(run.stage, "Executing")
    fixed = {
        Status.QUEUED: "Queued",
        Status.REPAIRING: "Repairing",
        Status.SUCCEEDED: "Succeeded",
        Status.REJECTED: "Rejected",
        Status.EXPIRED: "Expired",
        Status.CANCELED: "Canceled",
    }
    if run.status is Status.CANCELING:
        return "Canceling"
    return run.reason or fixed.get(run.status, "NoReason")


def of_run(
    intent: Intent, run: Run, *, approval: Approval | None, store_id: str, identity: str | None, now: datetime
) -> dict[str, Any]:
    """The whole status of a started Intent."""
    problem = approval.problem if approval is not None and approval.uid == run.approval_uid else None
    reason = reason_of(run, identity=identity, approval_problem=problem)
    detail = run.error or problem or (identity if reason == "IdentityNotEnforced" else None) or REASONS.get(reason, "")
    status: dict[str, Any] = {
        "observedGeneration": intent.generation,
        "observedRetry": run.retry_count,
        "storeId": store_id,
        "phase": run.status.phase,
        "reason": reason,
        "lastStep": run.last_step,
        "runId": run.run_id,
        "workflowId": run.intent_id,
        "nextAction": _next_action(intent, run),
        "resolvedCommit": run.commit_id,
        "plan": _plan(run),
        "tasks": _tasks(run),
        "failures": [
            {"task": f.task, "errCode": f.err_code, "message": visible(f.message)[:MAX_MESSAGE]}
            for f in run.tasks.failures[:MAX_FAILURES]
        ],
        "result": dict(run.result) if run.result else None,
        "usage": {"tokens": run.tokens, "sandboxSeconds": round(run.tasks.sandbox_ms / 1000)},
        "startedAt": stamp(run.started_at) if run.started_at else None,
        "finishedAt": stamp(run.finished_at) if run.finished_at and run.status.terminal else None,
        "approvalDeadline": stamp(run.approval_deadline) if run.approval_deadline and run.digest else None,
        "conditions": _conditions(intent, now, *_rows(run, reason, detail)),
    }
    return {k: v for k, v in status.items() if v not in (None, [], {})}


def _plan(run: Run) -> dict[str, Any] | None:
    if run.digest is None or run.plan is None:
        return None
    return {
        "digest": run.digest,
        "approvalName": run.approval_name,
        "taskCount": len(run.plan["tasks"]),
        "summary": visible(str(run.plan["summary"]))[:1024],
    }


def _tasks(run: Run) -> dict[str, Any] | None:
    t = run.tasks
    if t.total == 0:
        return None
    return {
        "total": t.total,
        "queued": t.queued,
        "running": t.running,
        "succeeded": t.succeeded,
        "failed": t.failed,
        "unknown": t.unknown,
        "display": f"{t.succeeded + t.failed}/{t.total}",
    }


def news(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether people wait for this change, or it is only progress (counts, usage, last step) that may be written once a second."""
    if any(
        old.get(k) != new.get(k) for k in ("phase", "reason", "plan", "storeId", "observedGeneration", "observedRetry")
    ):
        return True
    return _gist(old) != _gist(new)


def _gist(status: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(c["type"], c["status"], c["reason"]) for c in status.get("conditions", ())]


def _next_action(intent: Intent, run: Run) -> str | None:
    if run.status is Status.WAITING_INPUT and run.approval_name:
        return f"Review and decide: kubectl describe planapproval {run.approval_name} -n {intent.namespace}"
    if run.status.terminal and run.next_action:
        return run.next_action
    if run.status in (Status.FAILED, Status.RETRIES_EXCEEDED, Status.REJECTED, Status.EXPIRED):
        return f"To try again set spec.retry to {run.retry_count + 1}"
    return None


def _rows(run: Run, reason: str, detail: str) -> list[tuple[str, str, str, str]]:
    planned = "True" if run.digest else ("False" if run.status.terminal else "Unknown")
    ran = run.stage in (Stage.EXECUTE, Stage.FINISH)
    denied = run.status in (Status.REJECTED, Status.EXPIRED)
    approved = "True" if ran else ("False" if denied or run.status is Status.WAITING_INPUT else "Unknown")
    succeeded = "True" if run.status is Status.SUCCEEDED else ("False" if run.status.terminal else "Unknown")
    rows = [
        ("Accepted", "True", "Accepted", "the spec is valid"),
        ("Planned", planned, "PlanReady" if run.digest else reason, "" if run.digest else detail),
        ("Approved", approved, "QuorumReached" if ran else reason, "" if ran else detail),
        ("Succeeded", succeeded, reason, detail),
        ("Finished", "True" if run.status.terminal else "False", reason, detail),
    ]
    if reason in ("IdentityNotEnforced", "ApprovalTampered"):
        rows.append(("Stalled", "True", reason, detail))
    return rows


def of_approval(approval: Approval, run: Run, *, identity: str | None, now: datetime) -> dict[str, Any]:
    """The status of a PlanApproval: what was decided, and by which workflow it was consumed."""
    decision = _decision(run)
    received = len({v.approver for v in approval.votes})
    votes = f"{received} of {run.settings.required} votes"
    verified = "False" if identity is not None or approval.problem is not None else "True"
    why = approval.problem or identity or "votes are by whom the API server authenticated"
    rows = [
        ("Decided", "True" if decision != "Pending" else "False", decision, votes),
        ("IdentityVerified", verified, _verified(approval, identity), why),
    ]
    seen: dict[str, Any] = {
        "decision": decision,
        "received": received,
        "conditions": [_condition(approval.status, k, s, r, generation=1, now=now, message=m) for k, s, r, m in rows],
    }
    if decision == "Approved":
        before = approval.status.get("consumedBy")
        seen["consumedBy"] = before or {
            "workflowId": f"{run.intent_id}:execute:{run.execution_no}",
            "at": stamp(now),  # not the run's start: planning began then
        }
    return seen


def _verified(approval: Approval, identity: str | None) -> str:
    if approval.problem is not None:
        return TAMPERED
    return "Verified" if identity is None else "NotEnforced"


def tampered(status: Mapping[str, Any]) -> str | None:
    """What was found wrong with a PlanApproval that has votes. It is not forgotten: what those people saw cannot be put back."""
    return next((c["message"] for c in status.get("conditions", ()) if c["reason"] == TAMPERED), None)


def _decision(run: Run) -> str:
    if run.status is Status.WAITING_INPUT:
        return "Pending"
    if run.stage in (Stage.EXECUTE, Stage.FINISH):
        return "Approved"
    return {Status.REJECTED: "Rejected", Status.EXPIRED: "Expired", Status.CANCELED: "Canceled"}.get(
        run.status, "Superseded"
    )
