"""ExecutePlanWF: check once more that the stored bytes are the approved bytes, then open the window of TaskWF and end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dbos import DBOS

from controller.core import digest as digests
from controller.core.contract import Egress, FileIn, Limits, SBXReq
from controller.core.errors import DigestMismatch, Permanent
from controller.core.phases import Stage, Status
from controller.core.taskkey import task_key
from controller.core.work import Context, Execution, Task
from controller.workflows.parts import Parts, generation, parts

log = logging.getLogger(__name__)


@DBOS.workflow(name="ExecutePlanWF", max_recovery_attempts=50)
def execute_plan(run_id: str) -> str:
    """Nothing is compiled here: record, patch and snapshot are hashed again and a mismatch is refused (law 7)."""
    me = parts()
    number = generation(str(DBOS.workflow_id))
    ctx = me.store.context_of_run(run_id)
    if ctx is None or ctx.execution_no != number:
        return "superseded"
    if (ctx.status, ctx.stage) != (Status.RUNNING, Stage.EXECUTE):
        me.store.close_canceled(run_id)
        return "ended"
    try:
        verify(me, ctx)
        assert ctx.record is not None  # verify() has seen it
        tasks = requests(ctx, ctx.record)
    except Permanent as e:
        log.error("execution refused", extra={"run": run_id, "error": str(e)})
        me.store.refuse_execution(ctx, error=str(e))
        return "refused"
    me.store.begin_execution(Execution(run_id=run_id, execution_no=number, generation=ctx.plan_no, tasks=tasks))
    return "begun"


def verify(me: Parts, ctx: Context) -> None:
    """Raises DigestMismatch where approval, record, bytes or template are not what was approved."""
    record = ctx.record
    if record is None or ctx.digest is None or digests.plan_digest(record) != ctx.digest:
        raise DigestMismatch("the stored execution record does not have the approved digest")
    if me.store.approved_votes(ctx.run_id, ctx.digest) < ctx.settings.required:
        raise DigestMismatch(f"fewer than {ctx.settings.required} recorded approvals of {ctx.digest}")
    execution = record["execution"]
    me.store.check_blobs([execution["snapshotSha256"], record["patchSha256"]])
    resolved = me.sandboxes.resolve(ctx.settings.template)
    if resolved != execution["template"]:
        raise DigestMismatch(f"sandbox template is now {resolved}, approved was {execution['template']}; plan again")


def requests(ctx: Context, record: Mapping[str, Any]) -> list[Task]:
    """One SBXReq per task of the execution record, in plan order, from the record alone."""
    execution = record["execution"]
    files = [FileIn(kind="archive", sha256=execution["snapshotSha256"])]
    if record["patchSha256"] != digests.sha256(b""):
        files.append(FileIn(kind="patch", sha256=record["patchSha256"]))
    limits = execution["limits"]
    tasks = []
    for task in record["tasks"]:
        request = SBXReq(
            intent_id=ctx.intent_id,
            run_id=ctx.run_id,
            step_id="ExecuteST",
            task_id=task["id"],
            generation=ctx.plan_no,
            env_ref=execution["template"],
            cmd=task["command"],
            files_in=tuple(files),
            env={},
            workdir="/workspace",
            timeout_ms=task["timeoutSeconds"] * 1000,
            limits=Limits(
                cpu_millis=limits["cpuMillis"],
                memory_mb=limits["memoryMb"],
                pids=limits["pids"],
                disk_mb=limits["diskMb"],
            ),
            egress=Egress(mode=execution["egress"]["mode"], allow=tuple(execution["egress"]["allow"])),
        )
        tasks.append(
            Task(task_id=task["id"], task_key=task_key(request), request=request, depends_on=task["dependsOn"])
        )
    return tasks
