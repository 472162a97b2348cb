"""FinishWF: join the results in task order, write ExecuteST and the artifact index, close the run once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dbos import DBOS

from controller.core import junit
from controller.core.contract import ErrCode
from controller.core.model import Artifact
from controller.core.phases import Event, Stage, Status
from controller.core.work import Context, TaskResult
from controller.workflows.parts import generation, parts


@DBOS.workflow(name="FinishWF", max_recovery_attempts=50)
def finish_run(run_id: str) -> str:
    """Idempotent: the step row is written once, and the compare-and-set closes once."""
    me = parts()
    number = generation(str(DBOS.workflow_id))
    ctx = me.store.context_of_run(run_id)
    if ctx is None or ctx.execution_no != number:
        return "superseded"
    if (ctx.status, ctx.stage) != (Status.RUNNING, Stage.FINISH):
        me.store.close_canceled(run_id)
        return "ended"
    results = me.store.results(run_id, ctx.plan_no)
    event, reason, error = verdict(results)
    output = {"attempt": number, "tasks": [_line(r) for r in results], "junit": _junit(results)}
    index = Artifact(name="index.json", kind="index", content=json.dumps(output, indent=1, sort_keys=True).encode())
    me.store.save_step(run_id, "ExecuteST", number, output=output, artifacts=[index], commit=None)
    closed = me.store.finish(
        ctx, execution_no=number, event=event.value, reason=reason, error=error, result=_result(ctx, output, number)
    )
    if not closed:
        me.store.close_canceled(run_id)
    return "closed"


def verdict(results: Sequence[TaskResult]) -> tuple[Event, str, str | None]:
    """All succeeded → succeed; the budget ended or a task failed by itself → fail; only infrastructure failed → exceed."""
    failed = [r for r in results if r.status != "succeeded"]
    if not failed:
        return Event.SUCCEED, "Succeeded", None
    if any(r.err_code is ErrCode.BUDGET for r in failed):
        unrun = sum(r.err_code is ErrCode.BUDGET for r in failed)
        return (
            Event.FAIL,
            "BudgetExceeded",
            f"{unrun} of {len(results)} tasks were not run: limits.maxSandboxMinutes are used up",
        )
    ran = [r for r in failed if r.err_code is not ErrCode.SKIPPED]
    red = [r for r in ran if r.err_code is None or not r.err_code.retryable]
    first = (red or failed)[0]
    code = first.err_code.value if first.err_code else ErrCode.LOST.value
    error = f"{len(failed)} of {len(results)} tasks failed; first: {first.task_id} ({code})"
    return (Event.FAIL, "TaskFailed", error) if red else (Event.EXCEED, "InfrastructureFailed", error)


def _line(r: TaskResult) -> dict[str, Any]:
    return {
        "task": r.task_id,
        "taskKey": r.task_key,
        "status": r.status,
        "errCode": r.err_code.value if r.err_code else None,
        "attempt": r.attempt,
        "exit": r.exit,
    }


def _junit(results: Sequence[TaskResult]) -> dict[str, int] | None:
    reports = [r.junit for r in results if r.junit]
    return junit.added(reports) if reports else None


def _result(ctx: Context, output: dict[str, Any], number: int) -> dict[str, Any]:
    base = f"artifact://run/{ctx.run_id}/step"
    result: dict[str, Any] = {
        "patchRef": f"{base}/ApplyPatchST/patch.diff",
        "artifactIndexRef": f"{base}/ExecuteST/index.json",
        "junit": output["junit"],
    }
    return {k: v for k, v in result.items() if v is not None}
