"""WorkStore over PostgreSQL: what the workflows read and record. One statement or one transaction per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from controller.core.contract import ErrCode, SBXReq
from controller.core.digest import canonical, sha256
from controller.core.errors import Drift
from controller.core.model import Artifact, Chunk
from controller.core.phases import Event, Stage, Status
from controller.core.settings import Settings
from controller.core.visible import visible
from controller.core.work import Attempt, Context, Execution, Outcome, TaskResult
from controller.db.artifacts import artifact_uri
from controller.db.blobs import read_blob, read_blobs
from controller.db.pool import SQL, Pool, change, one, rows, transaction
from controller.db.runs import move_params

SEND_BYTES = 64 * 1024


class PgWorkStore:
    """`executor` is this process incarnation: an attempt begins only under its live lease."""

    def __init__(self, pool: Pool, *, app_version: str, executor: str) -> None:
        self._pool = pool
        self._version = app_version
        self._executor = executor

    def context(self, intent_id: str) -> Context | None:
        row = one(self._pool, "context", intent_id=intent_id)
        return None if row is None else _context(row)

    def context_of_run(self, run_id: str) -> Context | None:
        row = one(self._pool, "context_of_run", run_id=run_id)
        return None if row is None else _context(row)

    def start_plan(self, ctx: Context) -> bool:
        return (
            change(self._pool, "start_plan", run_id=ctx.run_id, plan_no=ctx.plan_no, **move_params(Event.START_PLAN))
            == 1
        )

    def steps(self, run_id: str, attempt: int) -> Mapping[str, Mapping[str, Any]]:
        return {r["step_id"]: r["output"] for r in rows(self._pool, "steps", run_id=run_id, attempt=attempt)}

    def save_step(
        self,
        run_id: str,
        step_id: str,
        attempt: int,
        *,
        output: Mapping[str, Any],
        artifacts: Sequence[Artifact],
        commit: str | None,
    ) -> Mapping[str, Any]:
        key: dict[str, Any] = {"run_id": run_id, "step_id": step_id, "attempt": attempt}

        def body(c: psycopg.Connection[DictRow]) -> Mapping[str, Any]:
            params = {**key, "phase": step_id, "output": Jsonb(dict(output)), "started_at": datetime.now(UTC)}
            fresh = c.execute(SQL["insert_step"], params).rowcount == 1
            for artifact in artifacts:
                self._artifact(c, artifact, **key)
            if fresh:
                c.execute(SQL["mark_step"], {"run_id": run_id, "step_id": step_id, "commit_id": commit})
                return output
            stored = c.execute(SQL["step"], key).fetchone()
            kept: Mapping[str, Any] = stored["output"] if stored else output
            if canonical(dict(kept)) != canonical(dict(output)):
                raise Drift(f"step {step_id} attempt {attempt} of {run_id} is recorded with another output")
            return kept

        return transaction(self._pool, body)

    def put_blob(self, content: bytes) -> str:
        digest = sha256(content)
        if len(content) > SEND_BYTES and one(self._pool, "has_blob", sha256=digest) is not None:
            return digest  # a snapshot of a commit that is known: megabytes need not travel
        change(self._pool, "insert_blob", sha256=digest, size=len(content), content=content)
        return digest

    def blob(self, sha: str) -> bytes:
        return read_blob(self._pool, sha)

    def check_blobs(self, shas: Sequence[str]) -> None:
        read_blobs(self._pool, shas)

    def planned(
        self,
        ctx: Context,
        *,
        plan: Mapping[str, Any],
        record: Mapping[str, Any],
        digest: str,
        patch_sha256: str,
        approval_name: str,
    ) -> bool:
        return (
            change(
                self._pool,
                "planned",
                run_id=ctx.run_id,
                plan_no=ctx.plan_no,
                plan=Jsonb(dict(plan)),
                record=Jsonb(dict(record)),
                digest=digest,
                patch_sha256=patch_sha256,
                approval_name=approval_name,
                **move_params(Event.PLANNED),
            )
            == 1
        )

    def fail_plan(self, ctx: Context, *, reason: str, error: str) -> bool:
        params = {"run_id": ctx.run_id, "plan_no": ctx.plan_no, "reason": reason, "error": visible(error)[:2048]}
        return change(self._pool, "fail_plan", **params, **move_params(Event.PLAN_FAILED)) == 1

    def refuse_execution(self, ctx: Context, *, error: str) -> bool:
        params = {"run_id": ctx.run_id, "execution_no": ctx.execution_no, "error": visible(error)[:2048]}
        return change(self._pool, "refuse_execution", **params, **move_params(Event.EXECUTE_REFUSED)) == 1

    def close_canceled(self, run_id: str) -> bool:
        def body(c: psycopg.Connection[DictRow]) -> bool:
            c.execute(SQL["lock_run"], {"run_id": run_id})
            c.execute(SQL["cancel_queued_tasks_of_canceling"], {"run_id": run_id})
            return c.execute(SQL["close_canceled"], {"run_id": run_id}).rowcount == 1

        return transaction(self._pool, body)

    def begin_execution(self, execution: Execution) -> bool:
        place = {t.task_id: idx for idx, t in enumerate(execution.tasks)}
        columns = {
            "keys": [t.task_key for t in execution.tasks],
            "ids": [t.task_id for t in execution.tasks],
            "requests": [canonical(t.request.model_dump(mode="json", by_alias=True)).decode() for t in execution.tasks],
            "depends": [canonical([place[d] for d in t.depends_on]).decode() for t in execution.tasks],
        }

        def body(c: psycopg.Connection[DictRow]) -> bool:
            p = {"run_id": execution.run_id, "generation": execution.generation, "version": self._version}
            run = c.execute(SQL["lock_run"], p).fetchone()
            if (
                run is None
                or (run["status"], run["stage"]) != ("running", "execute")
                or run["execution_no"] != execution.execution_no
            ):
                return False
            c.execute(SQL["insert_tasks"], {**p, **columns})
            c.execute(SQL["count_tasks"], p)
            c.execute(SQL["top_up"], p)
            c.execute(SQL["close_empty"], p)
            return True

        return transaction(self._pool, body)

    def approved_votes(self, run_id: str, digest: str) -> int:
        row = one(self._pool, "approvals_of", run_id=run_id, digest=digest)
        return 0 if row is None else int(row["n"])

    def begin_attempt(self, run_id: str, workflow_id: str, *, failed: int | None = None) -> Attempt:
        params = {"run_id": run_id, "workflow_id": workflow_id, "executor": self._executor, "failed": failed or 0}
        row = one(self._pool, "begin_attempt", **params)
        if row is None:
            raise Drift(f"run {run_id} does not exist")
        return Attempt(
            run_id=run_id,
            run_status=Status(row["run_status"]),
            leased=row["leased"],
            deadline=row["deadline_at"],
            task_key=row["task_key"] or "",
            attempt=row["attempt"] or 0,
            failures=row["failures"] or 0,
            interruptions=row["interruptions"] or 0,
            interruptions_alone=row["interruptions_alone"] or 0,
            fence=row["fence"],
            request=SBXReq.model_validate(row["request"]) if row["request"] else None,
            superseded=tuple((int(f), int(a)) for f, a in row["superseded"] or ()),
        )

    def note_alone(self, attempt: Attempt) -> None:
        change(self._pool, "note_alone", run_id=attempt.run_id, task_key=attempt.task_key, fence=attempt.fence)

    def record_outcome(self, attempt: Attempt, outcome: Outcome, *, workflow_id: str, carry: bool) -> Attempt | None:
        res = outcome.response
        contents = {sha256(a.content): a.content for a in outcome.artifacts}
        row = one(
            self._pool,
            "record_outcome",
            run_id=attempt.run_id,
            task_key=attempt.task_key,
            fence=attempt.fence,
            status="succeeded" if res.err_code is ErrCode.NONE else "failed",
            err_code=res.err_code.value,
            provider=outcome.provider,
            response=Jsonb(res.model_dump(mode="json", by_alias=True)),
            metrics=Jsonb(res.metrics.model_dump(mode="json", by_alias=True)),
            junit=Jsonb(dict(outcome.junit)) if outcome.junit else None,
            artifacts=Jsonb([_row(attempt, a) for a in outcome.artifacts]),
            shas=list(contents),
            blobs=list(contents.values()),
            chunk_kinds=[c.kind for c in outcome.chunks],
            chunk_data=[c.data for c in outcome.chunks],
            chunk_base=outcome.chunk_base,
            workflow_id=workflow_id,
            executor=self._executor,
            carry=carry,
            version=self._version,
        )
        if row is None:
            return None
        return Attempt(
            run_id=attempt.run_id,
            run_status=Status(row["run_status"]),
            deadline=attempt.deadline,
            task_key=row["next_task_key"] or "",
            attempt=row["next_attempt"] or 0,
            fence=row["next_fence"],
            request=SBXReq.model_validate(row["next_request"]) if row["next_request"] else None,
        )

    def add_chunks(self, attempt: Attempt, chunks: Sequence[Chunk], *, base: int) -> None:
        change(
            self._pool,
            "insert_chunks",
            run_id=attempt.run_id,
            task_key=attempt.task_key,
            attempt=attempt.attempt,
            fence=attempt.fence,
            base=base,
            kinds=[c.kind for c in chunks],
            data=[c.data for c in chunks],
        )

    def held(self, workflow_id: str) -> Sequence[Attempt]:
        return [
            Attempt(
                run_id=r["run_id"],
                run_status=Status.CANCELING,
                task_key=r["task_key"],
                attempt=r["attempt"],
                fence=r["fence"],
            )
            for r in rows(self._pool, "held_attempts", workflow_id=workflow_id)
        ]

    def abandon(self, workflow_id: str) -> None:
        change(self._pool, "abandon_task", workflow_id=workflow_id)

    def canceling(self) -> frozenset[str]:
        return frozenset(r["id"] for r in rows(self._pool, "canceling"))

    def results(self, run_id: str, generation: int) -> Sequence[TaskResult]:
        return [_result(r) for r in rows(self._pool, "results", run_id=run_id, generation=generation)]

    def finish(
        self, ctx: Context, *, execution_no: int, event: str, reason: str, error: str | None, result: Mapping[str, Any]
    ) -> bool:
        moved = move_params(Event(event))
        return (
            change(
                self._pool,
                "finish",
                run_id=ctx.run_id,
                execution_no=execution_no,
                reason=reason,
                error=error,
                result=Jsonb(dict(result)),
                next_action=None,
                **moved,
            )
            == 1
        )

    def _artifact(
        self, c: psycopg.Connection[DictRow], artifact: Artifact, *, run_id: str, step_id: str, attempt: int
    ) -> None:
        digest = sha256(artifact.content)
        c.execute(SQL["insert_blob"], {"sha256": digest, "size": len(artifact.content), "content": artifact.content})
        row = {
            "run_id": run_id,
            "step_id": step_id,
            "task_key": "",
            "attempt": attempt,
            "name": artifact.name,
            "kind": artifact.kind,
        }
        uri = artifact_uri(run_id, step_id, "", artifact.name)
        c.execute(SQL["insert_artifact"], {**row, "sha256": digest, "size": len(artifact.content), "uri": uri})


def _row(attempt: Attempt, a: Artifact) -> dict[str, Any]:
    uri = artifact_uri(attempt.run_id, "ExecuteST", attempt.task_key, a.name)
    return {"name": a.name, "kind": a.kind, "sha256": sha256(a.content), "size": len(a.content), "uri": uri}


def _result(r: DictRow) -> TaskResult:
    return TaskResult(
        task_id=r["task_id"],
        task_key=r["task_key"],
        status=r["status"],
        err_code=ErrCode(r["err_code"]) if r["err_code"] else None,
        attempt=r["attempt"],
        exit=int(r["exit"]) if r["exit"] is not None else None,
        wall_ms=(r["metrics"] or {}).get("wallMs"),
        junit=r["junit"],
    )


def _context(row: DictRow) -> Context:
    plain = "intent_id intent_name namespace goal plan_no execution_no total feedback digest record patch_sha256"
    return Context(
        run_id=row["id"],
        status=Status(row["status"]),
        stage=Stage(row["stage"]),
        inputs=row["payload"]["inputs"],
        constraints=row["payload"]["constraints"],
        workspace=(row["spec"].get("workspace") or {}).get("git"),
        settings=Settings.from_json(row["settings"]),
        **{name: row[name] for name in plain.split()},
    )
