"""RunStore in memory, with the compare-and-sets and the one-transaction promises of the real one.

What workflows do to a run (plan it, run its tasks, finish it) are plain methods below the port's; `clock` is the database's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from controller.core import digest as digests
from controller.core.contract import ErrCode
from controller.core.errors import DigestMismatch, Drift
from controller.core.phases import TRANSITIONS, Event, Stage, Status, retry_event
from controller.core.run import Intent, Run, TaskFailure, Tasks, Vote
from controller.core.settings import Settings
from tests.support.builders import execution, plan


@dataclass(kw_only=True)
class MemoryTask:
    """One row of app.sbx_runs."""

    id: str
    status: str = "queued"
    err_code: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One row of app.plan_approvals."""

    run_id: str
    digest: str
    approver: str
    verdict: str
    consumed_by: str


@dataclass(kw_only=True)
class MemoryRunStore:
    """`fail` maps a method's name to errors to raise, one per call, before anything happens; `calls` counts."""

    clock: Callable[[], datetime]
    id: str = "store-1"
    runs: dict[str, Run] = field(default_factory=dict)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    tasks: dict[str, list[MemoryTask]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    enqueued: dict[str, tuple[str, str]] = field(default_factory=dict)
    decided: list[Decision] = field(default_factory=list)
    fail: dict[str, list[Exception]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    # ------------------------------------------------------------------ RunStore

    def store_id(self) -> str:
        self._called("store_id")
        return self.id

    def run(self, intent_id: str) -> Run | None:
        self._called("run")
        with self.lock:
            row = self.runs.get(intent_id)
            return None if row is None else replace(row, tasks=self._counted(row))

    def start(self, intent: Intent, settings: Settings, *, requested_by: str) -> None:
        self._called("start")
        with self.lock:
            if intent.uid not in self.runs:
                self.names[intent.uid] = (intent.namespace, intent.name)
                self.runs[intent.uid] = Run(
                    run_id=digests.run_id(intent.uid),
                    intent_id=intent.uid,
                    status=Status.QUEUED,
                    stage=Stage.PLAN,
                    settings=settings,
                    retry_count=int(intent.spec.get("retry", 0)),
                    requested_by=requested_by,
                    updated_at=self.clock(),
                )
            self._enqueue("RunIntentWF", intent.uid, intent.uid)

    def patch(self, run: Run) -> bytes:
        self._called("patch")
        content = self.blobs.get(str(run.patch_sha256))
        if content is None or digests.sha256(content) != run.patch_sha256:
            raise DigestMismatch(f"blob {run.patch_sha256} is missing or was altered")
        return content

    def record_approval_object(self, run: Run, *, name: str, uid: str) -> bool:
        self._called("record_approval_object")
        with self.lock:
            row = self.runs[run.intent_id]
            if row.status is not Status.WAITING_INPUT or row.digest != run.digest:
                return False
            self._put(replace(row, approval_name=name, approval_uid=uid))
            return True

    def approve(self, run: Run, votes: Sequence[Vote]) -> bool:
        self._called("approve")
        with self.lock:
            row = self.runs[run.intent_id]
            recorded = row.digest == run.digest and row.approval_uid == run.approval_uid is not None
            in_time = row.approval_deadline is not None and row.approval_deadline > self.clock()
            if not (recorded and in_time and self._move(row, Event.APPROVE)):
                return False
            row = self.runs[run.intent_id]
            self._put(replace(row, execution_no=row.execution_no + 1, started_at=row.started_at or self.clock()))
            workflow = f"{row.intent_id}:execute:{row.execution_no + 1}"
            self._record(row, votes, consumed_by=workflow)
            self._enqueue("ExecutePlanWF", workflow, row.run_id)
            return True

    def reject(self, run: Run, votes: Sequence[Vote]) -> bool:
        self._called("reject")
        with self.lock:
            row = self.runs[run.intent_id]
            who = ", ".join(f"{v.approver}: {v.reason}" if v.reason else v.approver for v in votes)
            if row.digest != run.digest or not self._move(
                row, Event.REJECT, reason="Rejected", error=f"rejected by {who}"[:1024]
            ):
                return False
            self._record(row, votes, consumed_by="reject")
            return True

    def expire(self, run: Run) -> bool:
        self._called("expire")
        with self.lock:
            row = self.runs[run.intent_id]
            late = row.approval_deadline is not None and row.approval_deadline <= self.clock()
            return late and self._move(row, Event.EXPIRE, reason="Expired")

    def cancel(self, run: Run, *, reason: str) -> bool:
        self._called("cancel")
        with self.lock:
            row = self.runs[run.intent_id]
            if self._move(row, Event.CANCEL_IDLE, reason=reason):
                return True
            if not self._move(row, Event.CANCEL_BUSY, reason=reason):
                return False
            if row.stage is not Stage.PLAN:
                for task in self._of(row):
                    if task.status == "queued":
                        task.status, task.err_code = "failed", "CANCELED"
                self.close_canceled(row.intent_id)
            return True

    def adjust(self, run: Run, *, partition: str, priority: int) -> bool:
        self._called("adjust")
        with self.lock:
            row = self.runs[run.intent_id]
            if row.status.terminal:
                return False
            kept = partition if row.stage in (Stage.PLAN, Stage.APPROVE) else row.settings.partition
            self._put(replace(row, settings=replace(row.settings, partition=kept, priority=priority)))
            return True

    def retry(self, run: Run, *, count: int) -> bool:
        self._called("retry")
        with self.lock:
            row = self.runs[run.intent_id]
            event = retry_event(run.status, run.stage)
            if event is None or row.retry_count >= count:
                return False
            if event is Event.RETRY:
                return self._reopen_plan(row, count)
            consumed = [d.consumed_by for d in self.decided if (d.run_id, d.digest) == (row.run_id, row.digest)]
            first = min((int(by.rpartition(":")[2]) for by in consumed if ":execute:" in by), default=1)
            if row.execution_no - first + 1 >= row.settings.max_executions:
                note = f"spec.retry is used up: the policy allows {row.settings.max_executions} executions of one plan"
                self._put(replace(row, retry_count=count, next_action=note))
                return False
            return self._reopen_execution(row, count)

    def open_runs(self) -> Sequence[Mapping[str, Any]]:
        self._called("open_runs")
        with self.lock:
            return [
                {
                    "intent_id": row.intent_id,
                    "run_id": row.run_id,
                    "namespace": self.names[row.intent_id][0],
                    "name": self.names[row.intent_id][1],
                    "status": row.status.value,
                    "stage": row.stage.value,
                }
                for row in self.runs.values()
                if not row.status.terminal
            ]

    def progress(self) -> Mapping[str, str]:
        self._called("progress")
        with self.lock:
            found = {}
            for row in self.runs.values():
                tasks = self.tasks.get(self._key(row), []) if row.stage is Stage.EXECUTE else []
                if row.status in (Status.RUNNING, Status.CANCELING):
                    ended = sum(t.status in ("succeeded", "failed") for t in tasks)
                    running = sum(t.status == "running" for t in tasks)
                    found[row.intent_id] = f"{row.stage} {row.last_step} {row.tokens} {ended} {running}"
            return found

    def overdue(self) -> Sequence[str]:
        self._called("overdue")
        with self.lock:
            return [
                row.intent_id
                for row in self.runs.values()
                if row.status is Status.WAITING_INPUT
                and row.approval_deadline is not None
                and row.approval_deadline <= self.clock()
            ]

    # ------------------------------------------------------------------ what workflows do

    def begin_plan(self, uid: str) -> bool:
        """RunIntentWF begins."""
        with self.lock:
            return self._move(self.runs[uid], Event.START_PLAN, started_at=self.clock())

    def plan_ready(self, uid: str, *, diff: bytes, plan_json: Mapping[str, Any] | None = None) -> Run:
        """DecideST: the run waits for people."""
        with self.lock:
            if self.runs[uid].status is not Status.RUNNING:
                assert self.begin_plan(uid)
            shown = dict(plan() if plan_json is None else plan_json)
            row = self.runs[uid]
            sha = digests.sha256(diff)
            self.blobs[sha] = diff
            more = execution(generation=row.plan_no)
            record = digests.execution_record(
                goal=shown["goal"], tasks=shown["tasks"], patch_sha256=sha, execution=more
            )
            digest = digests.plan_digest(record)
            assert self._move(
                row,
                Event.PLANNED,
                reason="plan_not_approved",
                next_action="APPROVE_PLAN",
                last_step="DecideST",
                plan=shown,
                record=record,
                digest=digest,
                patch_sha256=sha,
                commit_id="c" * 40,
                approval_name=digests.approval_name(self.names[uid][1], digest),
                approval_uid=None,
                approval_deadline=self.clock() + timedelta(seconds=row.settings.expires_after_seconds),
            )
            return self.runs[uid]

    def plan_failed(self, uid: str) -> None:
        """No plan could be made."""
        with self.lock:
            assert self._move(
                self.runs[uid], Event.PLAN_FAILED, reason="PlanFailed", error="no plan", next_action="RETRY"
            )

    def begin_tasks(self, uid: str, count: int, *, running: int = 0) -> None:
        """ExecutePlanWF, and the first tasks begin."""
        with self.lock:
            tasks = self._of(self.runs[uid])
            tasks += [MemoryTask(id=f"t{n}") for n in range(len(tasks), count)]
            for task in [t for t in tasks if t.status == "queued"][:running]:
                task.status = "running"

    def end_task(self, uid: str, code: ErrCode = ErrCode.NONE) -> None:
        """The first task that runs has an outcome."""
        with self.lock:
            task = next(t for t in self._of(self.runs[uid]) if t.status == "running")
            task.status = "succeeded" if code is ErrCode.NONE else "failed"
            task.err_code = code.value
            if all(t.status in ("succeeded", "failed") for t in self._of(self.runs[uid])):
                row = self.runs[uid]
                if row.status is Status.RUNNING:
                    self._put(replace(row, stage=Stage.FINISH))
                    self._enqueue("FinishWF", f"{uid}:finish:{row.execution_no}", row.run_id)

    def finish(self, uid: str, event: Event, *, reason: str, error: str | None = None) -> None:
        """FinishWF."""
        with self.lock:
            row = self.runs[uid]
            assert row.stage is Stage.FINISH
            assert self._move(row, event, reason=reason, error=error, last_step="ExecuteST", result={"patchRef": "p"})

    def close_canceled(self, uid: str) -> bool:
        """canceling → canceled, when nothing runs any more."""
        with self.lock:
            row = self.runs[uid]
            if any(t.status == "running" for t in self._of(row)):
                return False
            return self._move(row, Event.CLOSE_CANCELED, reason=row.reason)

    # ------------------------------------------------------------------ inside

    def _called(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1
        if self.fail.get(method):
            raise self.fail[method].pop(0)

    def _key(self, row: Run) -> str:
        return f"{row.run_id}:{row.plan_no}"

    def _of(self, row: Run) -> list[MemoryTask]:
        return self.tasks.setdefault(self._key(row), [])

    def _put(self, row: Run) -> None:
        self.runs[row.intent_id] = replace(row, updated_at=self.clock())

    def _move(self, row: Run, event: Event, **changes: Any) -> bool:
        moved = TRANSITIONS[event]
        if row.status not in moved.sources:
            return False
        end = {"finished_at": self.clock() if moved.target.terminal else None}
        plain: dict[str, Any] = {"reason": None, "error": None, "next_action": None, **end, **changes}
        self._put(replace(row, status=moved.target, stage=moved.stage or row.stage, **plain))
        return True

    def _reopen_plan(self, row: Run, count: int) -> bool:
        gone: dict[str, Any] = dict.fromkeys(
            ["digest", "record", "plan", "result", "approval_name", "approval_uid", "approval_deadline"]
        )
        if not self._move(row, Event.RETRY, retry_count=count, plan_no=row.plan_no + 1, **gone):
            return False
        self._enqueue("RunIntentWF", f"{row.intent_id}:plan:{row.plan_no + 1}", row.intent_id)
        return True

    def _reopen_execution(self, row: Run, count: int) -> bool:
        if not self._move(row, Event.RESUME, retry_count=count, execution_no=row.execution_no + 1, result=None):
            return False
        for task in self._of(row):
            if task.status == "failed" and task.err_code is not None and ErrCode(task.err_code).retryable:
                task.status, task.err_code = "queued", None
        self._enqueue("ExecutePlanWF", f"{row.intent_id}:execute:{row.execution_no + 1}", row.run_id)
        return True

    def _record(self, row: Run, votes: Sequence[Vote], *, consumed_by: str) -> None:
        known = {(d.run_id, d.digest, d.approver) for d in self.decided}
        for vote in votes:
            if (row.run_id, row.digest, vote.approver) not in known:
                self.decided.append(
                    Decision(
                        run_id=row.run_id,
                        digest=str(row.digest),
                        approver=vote.approver,
                        verdict=vote.verdict,
                        consumed_by=consumed_by,
                    )
                )

    def _enqueue(self, workflow: str, id_: str, arg: str) -> None:
        if self.enqueued.setdefault(id_, (workflow, arg)) != (workflow, arg):
            raise Drift(f"workflow {id_} exists with other inputs")

    def _counted(self, row: Run) -> Tasks:
        tasks = self.tasks.get(self._key(row), [])
        many = {s: sum(t.status == s for t in tasks) for s in ("queued", "running", "succeeded", "failed")}
        failed = [t for t in tasks if t.status == "failed"][:10]
        return Tasks(
            total=len(tasks),
            unknown=sum(t.err_code == "LOST" for t in tasks),
            failures=tuple(TaskFailure(task=t.id, err_code=str(t.err_code), message="out") for t in failed),
            **many,
        )
