"""TaskWF: one slot of a run's window. No DBOS step: the journal is the checkpoint, and every line may run again after a crash.

It carries on with the next task of its run for a short slice, so that a window is not limited by the queue's polling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime

from dbos import DBOS

from controller.core import junit
from controller.core.contract import ErrCode, Metrics, SBXRes
from controller.core.errors import Permanent, Transient
from controller.core.model import Artifact, Owner
from controller.core.phases import Status
from controller.core.work import Attempt, Outcome
from controller.workflows.parts import Parts, parts
from controller.workflows.stream import ChunkStream

log = logging.getLogger(__name__)
SLICE_SECONDS = 0.25
MAX_FAILURES = 3  # infrastructure errors of its own
MAX_INTERRUPTIONS = 3  # dead workers, beside other tasks: then it runs alone; and alone: then it is LOST
BACKOFF_SECONDS = (1.0, 3.0)
KILL_PAUSE_SECONDS = 2.0
ROOM_PAUSE_SECONDS = 0.2


@DBOS.workflow(name="TaskWF", max_recovery_attempts=50)
def run_task(run_id: str) -> str:
    """begin; while there is a task: effect, outcome (and perhaps the next task)."""
    me, workflow = parts(), str(DBOS.workflow_id)
    attempt: Attempt | None = me.store.begin_attempt(run_id, workflow)
    hand_over_at = me.clock.monotonic() + SLICE_SECONDS
    while attempt is not None and attempt.fence is not None:
        fence = attempt.fence
        try:
            attempt = try_once(me, attempt, workflow, hand_over_at)
        finally:
            me.room.leave(fence)
    if attempt is not None and not attempt.leased:
        # Ending normally here would make the workflow SUCCESS and leak its window slot.
        me.fence_off("executor lease is not live")
    if attempt is not None and attempt.run_status is Status.CANCELING:
        for held in me.store.held(workflow):
            end_sandbox(me, _owner(me, held))
        me.store.abandon(workflow)
        me.store.close_canceled(run_id)
    return "ended"


def _owner(me: Parts, attempt: Attempt) -> Owner:
    return Owner(
        store_id=me.store_id,
        run_id=attempt.run_id,
        task_key=attempt.task_key,
        attempt=attempt.attempt,
        fence=attempt.fence or 0,
    )


def try_once(me: Parts, attempt: Attempt, workflow: str, hand_over_at: float) -> Attempt | None:
    """One attempt and what follows from it."""
    _kill_superseded(me, attempt)
    blamed = attempt.interruptions_alone >= MAX_INTERRUPTIONS
    outcome = _lost(me, attempt) if blamed else effect(me, attempt)
    code = outcome.response.err_code
    if code is ErrCode.CANCELED:
        return me.store.begin_attempt(attempt.run_id, workflow)  # begins nothing: the run is canceling
    if code.retryable and not blamed and attempt.failures + 1 < MAX_FAILURES:
        log.warning(
            "attempt failed", extra={"task_key": attempt.task_key, "attempt": attempt.attempt, "err_code": code.value}
        )
        me.clock.sleep(BACKOFF_SECONDS[attempt.failures] * (0.5 + me.jitter()))
        return me.store.begin_attempt(attempt.run_id, workflow, failed=attempt.fence)
    carry = me.clock.monotonic() < hand_over_at
    following = me.store.record_outcome(attempt, outcome, workflow_id=workflow, carry=carry)
    if following is None:
        me.observe("fence_rejected", me.sandboxes.name, 0.0)
    return following


def _kill_superseded(me: Parts, attempt: Attempt) -> None:
    """The outcome of an earlier attempt is unknown: look it up by its fence and end it before another begins."""
    for fence, number in attempt.superseded:
        before = Owner(
            store_id=me.store_id, run_id=attempt.run_id, task_key=attempt.task_key, attempt=number, fence=fence
        )
        killed = end_sandbox(me, before)
        log.warning("attempt superseded", extra={"task_key": attempt.task_key, "attempt": number, "killed": killed})


def end_sandbox(me: Parts, owner: Owner) -> int:
    """How many there were. Asks until the provider answers: until then nobody knows, and no other attempt may begin."""
    while True:
        try:
            return me.sandboxes.kill(owner)
        except Transient as e:
            log.warning("sandbox_kill_unconfirmed", extra={"task_key": owner.task_key, "error": str(e)})
            me.clock.sleep(KILL_PAUSE_SECONDS * (0.5 + me.jitter()))


def effect(me: Parts, attempt: Attempt) -> Outcome:
    """Run the sandbox, or say why it was not run. Never raises for what a task or a provider does."""
    request = attempt.request
    assert request is not None  # an attempt with a fence has one
    stream = ChunkStream(
        write=lambda chunks, base: me.store.add_chunks(attempt, chunks, base=base), now=me.clock.monotonic
    )

    def canceled() -> bool:
        stream.flush_due()
        return attempt.run_id in me.canceled_runs() or _late(me, attempt.deadline)

    try:
        files = {f.sha256: me.blob(f.sha256) for f in request.files_in}
    except Permanent as e:
        return _unrun(me, attempt, ErrCode.UPLOAD_FAIL, str(e))
    if canceled() or not (_admitted(me, attempt, canceled) and _entered(me, attempt, canceled)):
        late = _late(me, attempt.deadline)
        return _unrun(
            me,
            attempt,
            ErrCode.TIMEOUT if late else ErrCode.CANCELED,
            "the run's timeoutSeconds passed before it began" if late else "canceled before it began",
        )
    started = me.clock.monotonic()
    response, produced = me.sandboxes.run(
        request, owner=_owner(me, attempt), files=files, emit=stream.emit, canceled=canceled
    )
    if response.err_code is ErrCode.CANCELED and _late(me, attempt.deadline):
        response = response.model_copy(
            update={"err_code": ErrCode.TIMEOUT, "stderr": "the run's timeoutSeconds have passed"}
        )
    me.observe("total", response.err_code.value, me.clock.monotonic() - started)
    return _outcome(me, attempt, response, produced, stream)


def _admitted(me: Parts, attempt: Attempt, canceled: Callable[[], bool]) -> bool:
    """Wait until the provider's limits let this attempt create its sandbox. False: canceled, or too late, before they did."""
    assert attempt.fence is not None
    while (seconds := me.admission.wait(attempt.fence)) > 0:
        me.clock.sleep(min(1.0, seconds) * (0.5 + me.jitter()))
        if canceled():
            return False
    return True


def _entered(me: Parts, attempt: Attempt, canceled: Callable[[], bool]) -> bool:
    """Wait until this attempt may run beside those that run here, or until none does, when it has to be alone."""
    assert attempt.fence is not None
    alone = attempt.interruptions >= MAX_INTERRUPTIONS
    while not me.room.enter(attempt.fence, alone=alone):
        me.clock.sleep(ROOM_PAUSE_SECONDS * (0.5 + me.jitter()))
        if canceled():
            return False
    if alone:
        me.store.note_alone(attempt)
        log.warning(
            "attempt runs alone",
            extra={"task_key": attempt.task_key, "attempt": attempt.attempt, "interruptions": attempt.interruptions},
        )
    return True


def _late(me: Parts, deadline: datetime | None) -> bool:
    return deadline is not None and me.clock.now() >= deadline


def _outcome(
    me: Parts, attempt: Attempt, response: SBXRes, produced: Sequence[Artifact], stream: ChunkStream
) -> Outcome:
    chunks, base = stream.close()
    reports = [found for a in produced if a.kind == "junit" and (found := junit.summary(a.content)) is not None]
    named = [*stream.artifacts(), *produced]  # the first of a name is kept: no file may pass for what was printed
    return Outcome(
        response=response.model_copy(update={"task_key": attempt.task_key}),
        provider=me.sandboxes.name,
        artifacts=named,
        chunks=chunks,
        chunk_base=base,
        junit=junit.added(reports) if reports else None,
    )


def _lost(me: Parts, attempt: Attempt) -> Outcome:
    alone, beside = attempt.interruptions_alone, attempt.interruptions
    why = f"its worker died {alone} times while no other task ran on it, and {beside} times before that beside others"
    return _unrun(me, attempt, ErrCode.LOST, why)


def _unrun(me: Parts, attempt: Attempt, code: ErrCode, why: str) -> Outcome:
    response = SBXRes(
        exit=None,
        stdout="",
        stderr=why,
        files_out=(),
        metrics=Metrics(wall_ms=0),
        sandbox_ref="",
        err_code=code,
        task_key=attempt.task_key,
    )
    stream = ChunkStream(write=lambda *_: None, now=me.clock.monotonic)
    return _outcome(me, attempt, response, (), stream)
