"""RunStore over PostgreSQL: what the control loop reads and decides."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import cachetools
import psycopg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from controller.core import feedback
from controller.core.contract import ErrCode
from controller.core.digest import run_id as derive_run_id
from controller.core.phases import TRANSITIONS, Event, Stage, Status, retry_event
from controller.core.run import Intent, Run, TaskFailure, Tasks, Vote
from controller.core.settings import Settings
from controller.db.blobs import read_blob
from controller.db.pool import SQL, Pool, change, one, rows, transaction

PATCH_CACHE_BYTES = 8 * 1024 * 1024
INFRASTRUCTURE = [code.value for code in ErrCode if code.retryable or code is ErrCode.SKIPPED]


def sources(event: Event) -> list[str]:
    """The statuses that an event may move, for `status = ANY(…)`."""
    return [s.value for s in TRANSITIONS[event].sources]


def move_params(event: Event) -> dict[str, Any]:
    """sources, target, stage and terminal of one transition, for the named statements."""
    t = TRANSITIONS[event]
    return {
        "sources": sources(event),
        "target": t.target.value,
        "stage": t.stage.value if t.stage else None,
        "terminal": t.target.terminal,
    }


class PgRunStore:
    """Every method is one statement or one transaction."""

    def __init__(self, pool: Pool, *, app_version: str) -> None:
        self._pool = pool
        self._version = app_version
        # Read when the plan is shown, and again when its votes are counted.
        self._patch = cachetools.cached(cachetools.LRUCache(PATCH_CACHE_BYTES, getsizeof=len), lock=threading.Lock())(
            partial(read_blob, pool)
        )

    def store_id(self) -> str:
        row = one(self._pool, "store_id")
        if row is None:
            raise LookupError("app.store is empty; run `python -m controller migrate`")
        return str(row["id"])

    def run(self, intent_id: str) -> Run | None:
        row = one(self._pool, "run", intent_id=intent_id)
        return None if row is None else _run(row)

    def start(self, intent: Intent, settings: Settings, *, requested_by: str) -> None:
        run_id = derive_run_id(intent.uid)
        payload = {"inputs": intent.spec.get("inputs", {}), "constraints": intent.spec.get("constraints", {})}

        def body(c: psycopg.Connection[DictRow]) -> None:
            c.execute(
                SQL["insert_intent"],
                {
                    "intent_id": intent.uid,
                    "namespace": intent.namespace,
                    "name": intent.name,
                    "goal": intent.spec["goal"],
                    "payload": Jsonb(payload),
                    "spec": Jsonb(dict(intent.spec)),
                    "requested_by": requested_by,
                },
            )
            c.execute(
                SQL["insert_run"],
                {
                    "run_id": run_id,
                    "intent_id": intent.uid,
                    "settings": Jsonb(settings.to_json()),
                    "retry_count": intent.spec.get("retry", 0),
                },
            )
            self._enqueue(c, "RunIntentWF", intent.uid, intent.uid, settings.priority)

        transaction(self._pool, body)

    def patch(self, run: Run) -> bytes:
        return self._patch(str(run.patch_sha256))

    def record_approval_object(self, run: Run, *, name: str, uid: str) -> bool:
        return (
            change(self._pool, "record_approval_object", run_id=run.run_id, name=name, uid=uid, digest=run.digest) == 1
        )

    def approve(self, run: Run, votes: Sequence[Vote]) -> bool:
        def body(c: psycopg.Connection[DictRow]) -> bool:
            row = c.execute(
                SQL["approve"],
                {
                    "run_id": run.run_id,
                    "digest": run.digest,
                    "approval_uid": run.approval_uid,
                    **move_params(Event.APPROVE),
                },
            ).fetchone()
            if row is None:
                return False
            workflow = f"{run.intent_id}:execute:{row['execution_no']}"
            self._votes(c, run, votes, consumed_by=workflow)
            self._enqueue(c, "ExecutePlanWF", workflow, run.run_id, row["priority"])
            return True

        return transaction(self._pool, body)

    def reject(self, run: Run, votes: Sequence[Vote]) -> bool:
        who = ", ".join(f"{v.approver}: {v.reason}" if v.reason else v.approver for v in votes)

        def body(c: psycopg.Connection[DictRow]) -> bool:
            locked = c.execute(SQL["lock_run"], {"run_id": run.run_id}).fetchone()
            if locked is None or locked["digest"] != run.digest:
                return False  # these votes were about another plan
            if not self._move(c, run, Event.REJECT, reason="Rejected", error=f"rejected by {who}"[:1024]):
                return False
            self._votes(c, run, votes, consumed_by="reject")
            return True

        return transaction(self._pool, body)

    def expire(self, run: Run) -> bool:
        return change(self._pool, "expire", run_id=run.run_id) == 1

    def cancel(self, run: Run, *, reason: str) -> bool:
        def body(c: psycopg.Connection[DictRow]) -> bool:
            locked = c.execute(SQL["lock_run"], {"run_id": run.run_id}).fetchone()
            if self._move(c, run, Event.CANCEL_IDLE, reason=reason, error=None):
                return True
            moved = self._move(c, run, Event.CANCEL_BUSY, reason=reason, error=None)
            if moved and locked is not None and locked["stage"] != Stage.PLAN.value:
                c.execute(SQL["cancel_queued_tasks"], {"run_id": run.run_id})
                c.execute(SQL["close_canceled"], {"run_id": run.run_id})
            return moved

        return transaction(self._pool, body)

    def adjust(self, run: Run, *, partition: str, priority: int) -> bool:
        return change(self._pool, "adjust", run_id=run.run_id, partition=partition, priority=priority) == 1

    def retry(self, run: Run, *, count: int) -> bool:
        event = retry_event(run.status, run.stage)
        if event is None:
            return False

        def body(c: psycopg.Connection[DictRow]) -> bool:
            params = {"run_id": run.run_id, "count": count, **move_params(event)}
            if event is Event.RETRY:
                row = c.execute(SQL["reopen_plan"], {**params, "feedback": feedback.of_run(run)}).fetchone()
                if row is not None:
                    uid = row["intent_id"]
                    self._enqueue(c, "RunIntentWF", f"{uid}:plan:{row['plan_no']}", uid, row["priority"])
                return row is not None
            row = c.execute(SQL["reopen_execution"], params).fetchone()
            if row is None:
                note = f"spec.retry is used up: the policy allows {run.settings.max_executions} executions of one plan"
                c.execute(SQL["note_retry"], {"run_id": run.run_id, "count": count, "next_action": note})
                return False
            c.execute(SQL["requeue_failed_tasks"], {"run_id": run.run_id, "infra": INFRASTRUCTURE})
            workflow = f"{row['intent_id']}:execute:{row['execution_no']}"
            self._enqueue(c, "ExecutePlanWF", workflow, run.run_id, row["priority"])
            return True

        return transaction(self._pool, body)

    def open_runs(self) -> Sequence[Mapping[str, Any]]:
        return rows(self._pool, "open_runs")

    def progress(self) -> Mapping[str, str]:
        return {r["intent_id"]: r["mark"] for r in rows(self._pool, "progress")}

    def overdue(self) -> Sequence[str]:
        return [r["intent_id"] for r in rows(self._pool, "overdue")]

    def _enqueue(self, c: psycopg.Connection[DictRow], workflow: str, id_: str, arg: str, priority: int) -> None:
        params = {
            "workflow": workflow,
            "id": id_,
            "arg": arg,
            "version": self._version,
            "partition": None,
            "priority": priority,
        }
        c.execute(SQL["enqueue"], params)

    def _move(self, c: psycopg.Connection[DictRow], run: Run, event: Event, *, reason: str, error: str | None) -> bool:
        params = {"run_id": run.run_id, "reason": reason, "error": error, "next_action": None, **move_params(event)}
        return c.execute(SQL["move"], params).rowcount == 1

    def _votes(self, c: psycopg.Connection[DictRow], run: Run, votes: Sequence[Vote], *, consumed_by: str) -> None:
        for vote in votes:
            params = {
                "run_id": run.run_id,
                "approver": vote.approver,
                "verdict": vote.verdict,
                "reason": vote.reason,
                "consumed_by": consumed_by,
            }
            c.execute(SQL["insert_vote"], params)


def _run(row: DictRow) -> Run:
    tasks = Tasks(
        total=row["tasks_total"],
        queued=row["queued"] or 0,
        running=row["running"] or 0,
        succeeded=row["succeeded"] or 0,
        failed=row["failed"] or 0,
        unknown=row["unknown"] or 0,
        sandbox_ms=int(row["sandbox_ms"] or 0),
        failures=tuple(
            TaskFailure(task=f["task"], err_code=f["errCode"], message=f["message"]) for f in row["failures"] or ()
        ),
    )
    plain = (
        "intent_id last_step reason error next_action plan_no execution_no retry_count commit_id plan record digest patch_sha256 "
        "approval_name approval_uid approval_deadline requested_by result tokens started_at finished_at updated_at"
    )
    return Run(
        run_id=row["id"],
        status=Status(row["status"]),
        stage=Stage(row["stage"]),
        settings=Settings.from_json(row["settings"]),
        tasks=tasks,
        **{name: row[name] for name in plain.split()},
    )
