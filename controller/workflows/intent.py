"""RunIntentWF: goal → plan → exact patch → digest. It ends where people begin: nothing waits in a process.

No DBOS step: app.run_steps is the checkpoint (run_tracked_step), so a second one in DBOS' tables would only cost commits.
"""

from __future__ import annotations

import logging
from functools import partial

from dbos import DBOS
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from controller.core.errors import Permanent, Transient, Unavailable
from controller.core.phases import Stage, Status
from controller.core.work import Context
from controller.workflows import steps
from controller.workflows.parts import Parts, generation, parts

log = logging.getLogger(__name__)
ATTEMPTS = 4
LONGEST_WAIT_SECONDS = 120.0


@DBOS.workflow(name="RunIntentWF", max_recovery_attempts=50)
def run_intent(intent_id: str) -> str:
    """CompileST → ApplyPatchST → DecideST → waiting_input. A replayed step finds its row and writes nothing."""
    me = parts()
    ctx = me.store.context(intent_id)
    if ctx is None or ctx.plan_no != generation(str(DBOS.workflow_id)):
        return "superseded"
    waiting = _started(me, ctx) and _plan(me, ctx)
    if not waiting:
        me.store.close_canceled(ctx.run_id)
    return "waiting" if waiting else "ended"


def _started(me: Parts, ctx: Context) -> bool:
    return (ctx.status, ctx.stage) == (Status.RUNNING, Stage.PLAN) or me.store.start_plan(ctx)


def _plan(me: Parts, ctx: Context) -> bool:
    """True when people can decide now. What is passing is tried again; what is not ends the run."""
    retry = Retrying(
        retry=retry_if_exception_type(Transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=_pause,
        sleep=partial(_wait, me, ctx),
        reraise=True,
    )
    try:
        begun_before = ctx.status is Status.RUNNING
        known = me.store.steps(ctx.run_id, ctx.plan_no) if begun_before else {}
        compiled = retry(steps.compile_st, me, ctx, known)
        patched = retry(steps.apply_patch_st, me, ctx, known, compiled)
        return retry(steps.decide_st, me, ctx, known, compiled, patched)
    except (Permanent, Transient) as e:
        log.warning("plan failed", extra={"intent": ctx.intent_name, "uid": ctx.intent_id, "error": str(e)})
        me.store.fail_plan(ctx, reason="PlanFailed", error=f"{type(e).__name__}: {e}")
        return False


def _pause(state: RetryCallState) -> float:
    """Seconds before the next try: what the other side asked for, within reason, else 1, 2, 4."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, Unavailable) else 0.0
    return max(min(asked, LONGEST_WAIT_SECONDS), float(wait_exponential(multiplier=1, max=10)(state)))


def _wait(me: Parts, ctx: Context, seconds: float) -> None:
    """Raises Permanent as soon as the run is canceled."""
    until = me.clock.monotonic() + seconds
    while (left := until - me.clock.monotonic()) > 0:
        if ctx.run_id in me.canceled_runs():
            raise Permanent("canceled before there was a plan")
        me.clock.sleep(min(1.0, left))
