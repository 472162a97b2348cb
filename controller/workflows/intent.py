"""RunIntentWF: goal → plan → exact patch → digest. It ends where people begin: nothing waits in a process."""

from __future__ import annotations

import logging

from dbos import DBOS

from controller.core.errors import Permanent, Transient
from controller.core.phases import Stage, Status
from controller.core.work import Context
from controller.workflows import steps
from controller.workflows.parts import generation, parts

log = logging.getLogger(__name__)


@DBOS.workflow(name="RunIntentWF", max_recovery_attempts=50)
def run_intent(intent_id: str) -> str:
    """CompileST → ApplyPatchST → DecideST → waiting_input. A replayed step finds its row and writes nothing."""
    me = parts()
    ctx = me.store.context(intent_id)
    if ctx is None or ctx.plan_no != generation(str(DBOS.workflow_id)):
        return "superseded"
    if not _started(ctx):
        me.store.close_canceled(ctx.run_id)
        return "ended"
    try:
        _compile_st(intent_id)
        _apply_patch_st(intent_id)
        _decide_st(intent_id)
    except (Permanent, Transient) as e:
        log.warning("plan failed", extra={"intent": ctx.intent_name, "uid": intent_id, "error": str(e)})
        me.store.fail_plan(ctx, reason="PlanFailed", error=f"{type(e).__name__}: {e}")
    me.store.close_canceled(ctx.run_id)
    return "ended"


def _started(ctx: Context) -> bool:
    return (ctx.status, ctx.stage) == (Status.RUNNING, Stage.PLAN) or parts().store.start_plan(ctx)


def _transient(e: BaseException) -> bool:
    return isinstance(e, Transient)


def _fresh(intent_id: str) -> Context:
    ctx = parts().store.context(intent_id)
    if ctx is None:
        raise Permanent(f"intent {intent_id} has no run")
    return ctx


@DBOS.step(name="CompileST", retries_allowed=True, max_attempts=4, interval_seconds=1.0, should_retry=_transient)
def _compile_st(intent_id: str) -> str:
    return steps.compile_st(parts(), _fresh(intent_id))


@DBOS.step(name="ApplyPatchST", retries_allowed=True, max_attempts=4, interval_seconds=1.0, should_retry=_transient)
def _apply_patch_st(intent_id: str) -> str:
    return steps.apply_patch_st(parts(), _fresh(intent_id))


@DBOS.step(name="DecideST", retries_allowed=True, max_attempts=4, interval_seconds=1.0, should_retry=_transient)
def _decide_st(intent_id: str) -> str:
    return steps.decide_st(parts(), _fresh(intent_id))
