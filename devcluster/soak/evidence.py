"""What there is to judge, read from SQL, from the sandboxes' start log and from the workers' logs. Nothing is concluded here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psycopg

from devcluster.errors import DevclusterError
from devcluster.soak.rows import Attempt, Evidence, Failure, Kept, Run, Start, Stream, Task

RUN = """
SELECT r.id, r.status, r.reason, r.closed, r.execution_no,
       ARRAY(SELECT t.status FROM app.run_transitions t WHERE t.run_id = r.id
              AND t.status IN ('succeeded','failed','retries_exceeded','canceled','rejected','expired') ORDER BY t.id),
       ARRAY(SELECT o.output FROM dbos.workflow_status w JOIN dbos.workflow_output o USING (workflow_uuid)
              WHERE w.name = 'FinishWF' AND w.status = 'SUCCESS' AND starts_with(w.workflow_uuid, r.intent_id || ':')),
       (SELECT count(*) FROM app.run_steps s WHERE s.run_id = r.id AND s.step_id = 'ExecuteST'),
       (SELECT s.output->'tasks' FROM app.run_steps s WHERE s.run_id = r.id AND s.step_id = 'ExecuteST' LIMIT 1)
  FROM app.runs r WHERE r.intent_id = %s"""
TASKS = """
SELECT t.task_id, t.task_key, t.status, t.err_code, (t.response->>'exit')::int, t.outcomes, t.fence,
       coalesce((SELECT sum(m.seen_count)::int FROM app.mock_receipts m WHERE starts_with(m.receipt_key, t.task_key || ':')), 0), t.junit
  FROM app.sbx_runs t WHERE t.run_id = %s ORDER BY t.generation, t.idx"""
ATTEMPTS = """
SELECT fence, task_key, attempt, state, executor, extract(epoch FROM created_at)::float, extract(epoch FROM ended_at)::float
  FROM app.sbx_attempts WHERE run_id = %s ORDER BY fence"""
KEPT = """
SELECT t.task_id, a.name, a.kind, a.attempt, a.sha256, encode(sha256(b.content), 'hex')
  FROM app.artifacts a JOIN app.sbx_runs t USING (run_id, task_key) JOIN app.blobs b ON b.sha256 = a.sha256 WHERE a.run_id = %s"""
STREAMS = """
SELECT c.task_key, c.attempt, coalesce(sum(length(c.data)) FILTER (WHERE c.kind = 'stdout'), 0)::int,
       count(*) FILTER (WHERE c.kind = 'stream_closed')::int, (array_agg(c.kind ORDER BY c.seq DESC))[1]
  FROM app.chunks c JOIN app.sbx_runs t USING (task_key) WHERE t.run_id = %s GROUP BY 1, 2"""
# What must not be there when all Intents have ended. A PENDING workflow whose executor lives, but that nobody runs, would stay here.
OPEN = """
SELECT 'task ' || task_id || ' is ' || status || ' under ' || coalesce(workflow_id, 'no workflow')
  FROM app.sbx_runs WHERE status IN ('queued','running')
UNION ALL
SELECT 'attempt ' || fence || ' of ' || executor || ' has no end' FROM app.sbx_attempts WHERE state = 'created'
UNION ALL
SELECT 'run ' || id || ' is ' || status || ' in ' || stage FROM app.runs
 WHERE status NOT IN ('succeeded','failed','retries_exceeded','canceled','rejected','expired')
UNION ALL
SELECT 'workflow ' || w.workflow_uuid || ' is ' || w.status || ' of ' || coalesce(w.executor_id, 'nobody') || ', whose lease '
       || CASE WHEN EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = w.executor_id AND l.expires_at > clock_timestamp())
               THEN 'lives' ELSE 'does not live' END
  FROM dbos.workflow_status w WHERE w.status IN ('ENQUEUED','PENDING','DELAYED')"""
DOUBLES = "SELECT task_key, COUNT(*) FROM app.sbx_runs GROUP BY task_key HAVING COUNT(*) > 1"
PROGRESS = """
SELECT count(*) FILTER (WHERE t.status IN ('succeeded','failed'))::int, count(*) FILTER (WHERE t.status = 'running')::int
  FROM app.sbx_runs t JOIN app.runs r ON r.id = t.run_id WHERE r.intent_id = %s"""
BUSY = "SELECT regexp_replace(executor, '-[^-]*$', ''), count(*)::int FROM app.sbx_attempts WHERE state = 'created' GROUP BY 1"
CONTESTED = "SELECT task_key, array_agg(fence ORDER BY fence) FROM app.sbx_attempts WHERE state = 'created' GROUP BY 1 HAVING count(*) > 1"
SUPERSEDED = "SELECT 1 FROM app.sbx_attempts WHERE starts_with(executor, %s) AND state = 'unknown' LIMIT 1"
EXPIRE = "UPDATE app.executor_leases SET expires_at = clock_timestamp() WHERE starts_with(executor_id, %s)"
PACE = """
SELECT extract(epoch FROM r.finished_at
         - (SELECT min(t.at) FROM app.run_transitions t WHERE t.run_id = r.id AND t.stage = 'execute'))::float,
       extract(epoch FROM (SELECT max(s.finished_at) - min(s.started_at) FROM app.sbx_runs s WHERE s.run_id = r.id))::float
  FROM app.runs r WHERE r.intent_id = %s"""


class Store:
    """The product's database, over one connection of our own."""

    def __init__(self, database: str, *, start_log: Path) -> None:
        self._connection = psycopg.connect(database, autocommit=True)
        self._start_log = start_log

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def ask(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        return self._connection.execute(query.encode(), params or None).fetchall()

    def progress(self, uid: str) -> tuple[int, int]:
        """Tasks of this Intent that have ended, and that run."""
        ended, running = self.ask(PROGRESS, uid)[0]
        return ended, running

    def run_id(self, uid: str) -> str:
        """The Intent's run."""
        return str(self.ask("SELECT id FROM app.runs WHERE intent_id = %s", uid)[0][0])

    def busy(self) -> Mapping[str, int]:
        """Attempts without an end, by worker."""
        return dict(self.ask(BUSY))

    def expire(self, worker: str) -> None:
        """Its lease runs out now, as if the database's clock had jumped."""
        self._connection.execute(EXPIRE, (f"{worker}-",))

    def superseded(self, worker: str) -> bool:
        """Whether some attempt of this worker was taken over by another."""
        return bool(self.ask(SUPERSEDED, f"{worker}-"))

    def contested(self) -> list[str]:
        """Tasks with two attempts of which neither has an end: for no moment, for one statement ends the old and begins the new."""
        return [f"task {key}: fences {fences}" for key, fences in self.ask(CONTESTED)]

    def open(self) -> list[str]:
        """Everything that is not over."""
        return [row[0] for row in self.ask(OPEN)]

    def doubles(self) -> list[str]:
        """Task keys with more than one row: the triage query of the source documents, as it stands there."""
        return [str(row) for row in self.ask(DOUBLES)]

    def tasks(self) -> int:
        """Of all Intents."""
        return int(self.ask("SELECT count(*) FROM app.sbx_runs")[0][0])

    def pace(self, uid: str) -> tuple[float, float]:
        """Seconds from the approval to the close, and from the first task's begin to the last one's end."""
        closing, executing = self.ask(PACE, uid)[0]
        return closing or 0.0, executing or 0.0

    def starts(self) -> list[Start]:
        """The whole log."""
        text = self._start_log.read_text() if self._start_log.exists() else ""
        lines = [line.split() for line in text.splitlines()]
        return [Start(task_key=key, attempt=int(attempt), fence=int(fence)) for key, attempt, fence in lines]

    def strangers(self) -> list[str]:
        """Starts of tasks that no Intent has."""
        known = {row[0] for row in self.ask("SELECT task_key FROM app.sbx_runs")}
        return [str(one) for one in self.starts() if one.task_key not in known]

    def gather(self, uid: str, *, shown: Mapping[str, int], largest: int) -> Evidence:
        """Everything of one Intent."""
        found = self.ask(RUN, uid)
        if not found:
            raise DevclusterError(f"Intent {uid} has no run")
        run_id, status, reason, closed, executions, endings, finishers, steps, result = found[0]
        tasks = tuple(Task(**dict(zip(Task.__dataclass_fields__, row, strict=True))) for row in self.ask(TASKS, run_id))
        keys = {one.task_key for one in tasks}
        return Evidence(
            run=Run(
                status=status,
                reason=reason,
                closed=closed,
                executions=executions,
                endings=tuple(endings),
                finishers=tuple(finishers),
                steps=steps,
                result=tuple((one["task"], one["status"]) for one in result or ()),
            ),
            tasks=tasks,
            attempts=tuple(
                Attempt(**dict(zip(Attempt.__dataclass_fields__, row, strict=True)))
                for row in self.ask(ATTEMPTS, run_id)
            ),
            starts=tuple(one for one in self.starts() if one.task_key in keys),
            shown=shown,
            largest=largest,
            kept=tuple(
                Kept(**dict(zip(Kept.__dataclass_fields__, row, strict=True))) for row in self.ask(KEPT, run_id)
            ),
            streams=tuple(
                Stream(**dict(zip(Stream.__dataclass_fields__, row, strict=True))) for row in self.ask(STREAMS, run_id)
            ),
        )


def failures(logs: Iterable[Path]) -> list[Failure]:
    """`attempt failed` of these workers, who log JSON."""
    found = []
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if '"event": "attempt failed"' in line:
                said = json.loads(line)
                found.append(Failure(task_key=said["task_key"], attempt=said["attempt"], err_code=said["err_code"]))
    return found
