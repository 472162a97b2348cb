-- Every statement of the controller and the worker, by name. Functions that need a snapshot per statement are in migrations/.

-- name: store_id
SELECT id FROM app.store

-- name: store_mark
SELECT s.id, m.mark FROM app.store s, app.store_mark m

-- name: beat_store
UPDATE app.store_mark m SET mark = m.mark + 1 FROM app.store s RETURNING s.id, m.mark

-- name: store_compared
UPDATE app.store_mark SET compared_at = clock_timestamp() WHERE EXISTS (SELECT 1 FROM app.store WHERE id = %(id)s)

-- name: database_clock
SELECT clock_timestamp() AS now

-- name: compared_since
SELECT 1 AS yes FROM app.store_mark WHERE compared_at > %(since)s

-- name: another_store
SELECT id FROM app.another_store(%(id)s) AS a(id)

-- name: refuse_executions
-- Whatever an older copy was in the middle of: how far it came afterwards, nobody can tell from here.
WITH refused AS (
  UPDATE app.runs SET status = %(target)s, reason = 'ExecutionRefused', error = %(error)s, next_action = NULL,
         finished_at = clock_timestamp(), closed = closed + 1
   WHERE status = ANY(%(sources)s) AND stage = 'execute' RETURNING id
), tasks AS (
  UPDATE app.sbx_runs t SET status = 'failed', err_code = 'LOST', finished_at = clock_timestamp()
    FROM refused WHERE t.run_id = refused.id AND t.status IN ('queued','running')
), journal AS (
  UPDATE app.sbx_attempts a SET state = 'unknown', ended_at = clock_timestamp() FROM refused WHERE a.run_id = refused.id AND a.state = 'created'
)
SELECT id FROM refused

-- name: run
-- One run with its task counts and first failures: all that reconcile looks at, in one round trip.
SELECT r.*, i.requested_by, i.namespace, i.name AS intent_name,
       coalesce(t.total, 0) AS tasks_total, t.queued, t.running, t.succeeded, t.failed, t.unknown, t.sandbox_ms, t.failures
  FROM app.runs r JOIN app.intents i ON i.id = r.intent_id
  LEFT JOIN LATERAL (
    SELECT count(*) AS total,
           count(*) FILTER (WHERE s.status = 'queued') AS queued, count(*) FILTER (WHERE s.status = 'running') AS running,
           count(*) FILTER (WHERE s.status = 'succeeded') AS succeeded, count(*) FILTER (WHERE s.status = 'failed') AS failed,
           count(*) FILTER (WHERE s.err_code = 'LOST') AS unknown,
           coalesce(sum(s.spent_ms), 0)::bigint AS sandbox_ms,
           (SELECT jsonb_agg(jsonb_build_object('task', f.task_id, 'errCode', f.err_code,
                     'message', right(coalesce(nullif(f.response->>'stderr', ''), f.response->>'stdout', ''), 256)) ORDER BY f.idx)
              FROM (SELECT * FROM app.sbx_runs f WHERE f.run_id = r.id AND f.generation = r.plan_no AND f.status = 'failed'
                     ORDER BY f.idx LIMIT 10) f) AS failures
      FROM app.sbx_runs s WHERE s.run_id = r.id AND s.generation = r.plan_no AND r.total > 0) t ON true
 WHERE r.intent_id = %(intent_id)s

-- name: insert_intent
INSERT INTO app.intents (id, namespace, name, goal, payload, spec, requested_by)
VALUES (%(intent_id)s, %(namespace)s, %(name)s, %(goal)s, %(payload)s, %(spec)s, %(requested_by)s) ON CONFLICT DO NOTHING

-- name: insert_run
INSERT INTO app.runs (id, intent_id, workflow_id, status, settings, retry_count)
VALUES (%(run_id)s, %(intent_id)s, %(intent_id)s, 'queued', %(settings)s, %(retry_count)s) ON CONFLICT DO NOTHING

-- name: enqueue
SELECT app.enqueue(%(workflow)s::app.workflow_name, %(id)s, %(arg)s, %(version)s, %(partition)s, %(priority)s)

-- name: move
-- The compare-and-set of law 4: sources and target come from controller/core/phases.py.
UPDATE app.runs SET status = %(target)s, stage = coalesce(%(stage)s, stage), reason = %(reason)s, error = %(error)s,
       next_action = %(next_action)s, finished_at = CASE WHEN %(terminal)s THEN clock_timestamp() END,
       closed = closed + (%(terminal)s AND stage IN ('execute','finish'))::int
 WHERE id = %(run_id)s AND status = ANY(%(sources)s)

-- name: adjust
UPDATE app.runs SET settings = settings || jsonb_build_object('priority', %(priority)s::int, 'partition',
       CASE WHEN stage IN ('plan','approve') THEN %(partition)s ELSE settings->>'partition' END)
 WHERE id = %(run_id)s AND status NOT IN ('succeeded','failed','retries_exceeded','canceled','rejected','expired')

-- name: fail_plan
UPDATE app.runs SET status = %(target)s, reason = %(reason)s, error = %(error)s, next_action = NULL, finished_at = clock_timestamp()
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND stage = 'plan' AND plan_no = %(plan_no)s

-- name: refuse_execution
-- With the tasks that a retry had put back: left queued, they would run under the next plan's approval.
WITH refused AS (
  UPDATE app.runs SET status = %(target)s, reason = 'ExecutionRefused', error = %(error)s, next_action = NULL,
         finished_at = clock_timestamp(), closed = closed + 1
   WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND stage = 'execute' AND execution_no = %(execution_no)s RETURNING id
), tasks AS (
  UPDATE app.sbx_runs t SET status = 'failed', err_code = 'SKIPPED', finished_at = clock_timestamp()
    FROM refused WHERE t.run_id = refused.id AND t.status = 'queued'
)
SELECT id FROM refused

-- name: record_approval_object
UPDATE app.runs SET approval_name = %(name)s, approval_uid = %(uid)s
 WHERE id = %(run_id)s AND status = 'waiting_input' AND digest = %(digest)s

-- name: approve
-- Votes read after the deadline do not count: the database's clock decides.
UPDATE app.runs SET status = %(target)s, stage = %(stage)s, execution_no = execution_no + 1, total = 0, reason = NULL, error = NULL,
       next_action = NULL, started_at = coalesce(started_at, clock_timestamp()), finished_at = NULL, executing_since = clock_timestamp(),
       deadline_at = clock_timestamp() + make_interval(secs => (settings->>'timeout_seconds')::int)
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND digest = %(digest)s AND approval_uid = %(approval_uid)s
   AND approval_deadline > clock_timestamp()
RETURNING execution_no, intent_id, (settings->>'priority')::int AS priority,
          extract(epoch FROM clock_timestamp() - waiting_at)::float AS waited_seconds

-- name: insert_vote
INSERT INTO app.plan_approvals (run_id, digest, approver, verdict, reason, approval_name, approval_uid, consumed_by)
SELECT %(run_id)s, r.digest, %(approver)s, %(verdict)s, %(reason)s, r.approval_name, r.approval_uid, %(consumed_by)s
  FROM app.runs r WHERE r.id = %(run_id)s
ON CONFLICT DO NOTHING

-- name: expire
UPDATE app.runs SET status = 'expired', reason = 'Expired', error = NULL, next_action = NULL, finished_at = clock_timestamp()
 WHERE id = %(run_id)s AND status = 'waiting_input' AND approval_deadline <= clock_timestamp()

-- name: lock_run
SELECT id, intent_id, status, stage, execution_no, plan_no, digest, record, settings, total FROM app.runs WHERE id = %(run_id)s FOR UPDATE

-- name: cancel_queued_tasks
-- Tasks that never started end with the run; those that run end by themselves and close it.
UPDATE app.sbx_runs SET status = 'failed', err_code = 'CANCELED', finished_at = clock_timestamp()
 WHERE run_id = %(run_id)s AND status = 'queued'

-- name: cancel_queued_tasks_of_canceling
UPDATE app.sbx_runs t SET status = 'failed', err_code = 'CANCELED', finished_at = clock_timestamp()
  FROM app.runs r WHERE r.id = %(run_id)s AND r.status = 'canceling' AND t.run_id = r.id AND t.status = 'queued'

-- name: close_canceled
-- Second statement of a transaction whose first is lock_run: it sees every attempt that began before the lock was granted.
UPDATE app.runs r SET status = 'canceled', finished_at = clock_timestamp(), closed = closed + (r.stage IN ('execute','finish'))::int
 WHERE id = %(run_id)s AND status = 'canceling'
   AND NOT EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = r.id AND t.status = 'running')

-- name: reopen_plan
UPDATE app.runs SET status = %(target)s, stage = %(stage)s, plan_no = plan_no + 1, retry_count = %(count)s, total = 0,
       feedback = %(feedback)s,
       reason = NULL, error = NULL, next_action = NULL, finished_at = NULL, digest = NULL, record = NULL, plan = NULL, result = NULL,
       approval_name = NULL, approval_uid = NULL, approval_deadline = NULL
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND retry_count < %(count)s
RETURNING plan_no, intent_id, (settings->>'priority')::int AS priority

-- name: reopen_execution
-- The same digest and approval; finished tasks are kept, those that infrastructure failed run again.
UPDATE app.runs SET status = %(target)s, stage = %(stage)s, execution_no = execution_no + 1, retry_count = %(count)s, total = 0,
       reason = NULL, error = NULL, next_action = NULL, finished_at = NULL, result = NULL,
       deadline_at = clock_timestamp() + make_interval(secs => (settings->>'timeout_seconds')::int)
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND retry_count < %(count)s
   -- The first execution of this plan is the one that consumed its approvals; those of former plans do not count.
   AND execution_no - coalesce((SELECT min(substring(a.consumed_by FROM ':execute:([0-9]+)$')::int) FROM app.plan_approvals a
                                 WHERE a.run_id = app.runs.id AND a.digest = app.runs.digest), 1) + 1 < (settings->>'max_executions')::int
RETURNING execution_no, intent_id, (settings->>'priority')::int AS priority

-- name: requeue_failed_tasks
UPDATE app.sbx_runs t SET status = 'queued', workflow_id = NULL, fence = NULL, err_code = NULL, finished_at = NULL,
       failures = 0, interruptions = 0, interruptions_alone = 0, alone = false
  FROM app.runs r WHERE r.id = %(run_id)s AND t.run_id = r.id AND t.generation = r.plan_no
   AND t.status = 'failed' AND t.err_code = ANY(%(infra)s)

-- name: note_retry
UPDATE app.runs SET retry_count = %(count)s, next_action = %(next_action)s WHERE id = %(run_id)s AND retry_count < %(count)s

-- name: open_runs
SELECT r.intent_id, r.id AS run_id, r.status, r.stage, i.namespace, i.name FROM app.runs r JOIN app.intents i ON i.id = r.intent_id
 WHERE r.status NOT IN ('succeeded','failed','retries_exceeded','canceled','rejected','expired')

-- name: progress
-- Runs at work, and what of them changes while their status stays: what NOTIFY does not tell.
SELECT r.intent_id, concat_ws(' ', r.stage, coalesce(r.last_step, '-'), r.tokens, count(t.run_id) FILTER (WHERE t.status IN ('succeeded','failed')),
                              count(t.run_id) FILTER (WHERE t.status = 'running')) AS mark
  FROM app.runs r LEFT JOIN app.sbx_runs t ON t.run_id = r.id AND r.stage = 'execute'
 WHERE r.status IN ('running','canceling') GROUP BY r.id

-- name: overdue
SELECT intent_id FROM app.runs WHERE status = 'waiting_input' AND approval_deadline <= clock_timestamp()

-- name: gauge_queues
SELECT queue_name AS queue, status, count(*) AS depth,
       coalesce(extract(epoch FROM clock_timestamp()) - min(created_at) / 1000.0, 0)::float AS oldest
  FROM dbos.workflow_status WHERE status IN ('ENQUEUED','PENDING','DELAYED') AND queue_name IN ('intentQ','sbxQ') GROUP BY 1, 2

-- name: gauge_runs
SELECT status, count(*) AS n, coalesce(max(extract(epoch FROM clock_timestamp() - updated_at)), 0)::float AS oldest
  FROM app.runs GROUP BY 1

-- name: gauge_stranded
SELECT application_version AS version, count(*) AS n FROM dbos.workflow_status
 WHERE status = 'ENQUEUED' AND queue_name IN ('intentQ','sbxQ') AND application_version <> %(version)s GROUP BY 1

-- ------------------------------------------------------------------------------------------------ worker

-- name: context
SELECT r.*, i.goal, i.payload, i.spec, i.namespace, i.name AS intent_name, i.requested_by
  FROM app.runs r JOIN app.intents i ON i.id = r.intent_id WHERE r.intent_id = %(intent_id)s

-- name: context_of_run
SELECT r.*, i.goal, i.payload, i.spec, i.namespace, i.name AS intent_name, i.requested_by
  FROM app.runs r JOIN app.intents i ON i.id = r.intent_id WHERE r.id = %(run_id)s

-- name: start_plan
UPDATE app.runs SET status = %(target)s, stage = %(stage)s, reason = NULL, error = NULL, started_at = coalesce(started_at, clock_timestamp())
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND plan_no = %(plan_no)s

-- name: step
SELECT output FROM app.run_steps WHERE run_id = %(run_id)s AND step_id = %(step_id)s AND attempt = %(attempt)s

-- name: steps
SELECT step_id, output FROM app.run_steps WHERE run_id = %(run_id)s AND attempt = %(attempt)s AND step_id <> 'ExecuteST'

-- name: insert_step
INSERT INTO app.run_steps (run_id, step_id, attempt, phase, output, started_at)
VALUES (%(run_id)s, %(step_id)s, %(attempt)s, %(phase)s, %(output)s, %(started_at)s) ON CONFLICT DO NOTHING

-- name: mark_step
UPDATE app.runs SET last_step = %(step_id)s, commit_id = coalesce(%(commit_id)s, commit_id) WHERE id = %(run_id)s

-- name: insert_blob
INSERT INTO app.blobs (sha256, size, content) VALUES (%(sha256)s, %(size)s, %(content)s) ON CONFLICT DO NOTHING

-- name: has_blob
SELECT 1 AS found FROM app.blobs WHERE sha256 = %(sha256)s

-- name: blobs
SELECT sha256, content FROM app.blobs WHERE sha256 = ANY(%(shas)s)

-- name: artifact
SELECT a.sha256 FROM app.artifacts a WHERE a.uri = %(uri)s AND app.served(a)

-- name: artifacts_below
SELECT a.uri, a.size FROM app.artifacts a WHERE starts_with(a.uri, %(folder)s) AND app.served(a) ORDER BY a.uri

-- name: insert_artifact
INSERT INTO app.artifacts (run_id, step_id, task_key, attempt, name, kind, sha256, size, uri)
VALUES (%(run_id)s, %(step_id)s, %(task_key)s, %(attempt)s, %(name)s, %(kind)s, %(sha256)s, %(size)s, %(uri)s) ON CONFLICT DO NOTHING

-- name: planned
UPDATE app.runs SET status = %(target)s, stage = %(stage)s, plan = %(plan)s, record = %(record)s, digest = %(digest)s,
       patch_sha256 = %(patch_sha256)s, approval_name = %(approval_name)s, approval_uid = NULL, reason = 'plan_not_approved',
       next_action = 'APPROVE_PLAN', waiting_at = clock_timestamp(), last_step = 'DecideST',
       approval_deadline = date_trunc('second', clock_timestamp()) + make_interval(secs => (settings->>'expires_after_seconds')::int)
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND stage = 'plan' AND plan_no = %(plan_no)s

-- name: approvals_of
SELECT count(DISTINCT approver) AS n FROM app.plan_approvals
 WHERE run_id = %(run_id)s AND digest = %(digest)s AND verdict = 'Approve' AND consumed_by <> 'reject'

-- name: insert_tasks
INSERT INTO app.sbx_runs (run_id, task_key, task_id, idx, generation, request, timeout_ms, depends)
SELECT %(run_id)s, k, t, n - 1, %(generation)s, q, (q->>'timeoutMs')::bigint, ARRAY(SELECT jsonb_array_elements(d)::int)
  FROM unnest(%(keys)s::text[], %(ids)s::text[], %(requests)s::jsonb[], %(depends)s::jsonb[]) WITH ORDINALITY AS x(k, t, q, d, n)
ON CONFLICT DO NOTHING

-- name: count_tasks
UPDATE app.runs SET total = (SELECT count(*) FROM app.sbx_runs t WHERE t.run_id = %(run_id)s AND t.generation = plan_no),
       depends = EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = %(run_id)s AND t.generation = plan_no AND t.depends <> '{}')
 WHERE id = %(run_id)s AND status = 'running' AND stage = 'execute'

-- name: top_up
-- Fills the window. Run it after a statement that locked the run's row, so that its snapshot sees every committed outcome.
SELECT app.top_up(%(run_id)s, %(version)s) AS enqueued

-- name: close_empty
-- An execution whose tasks had all ended before (a retry that found nothing to do) goes straight to FinishWF.
WITH done AS (
  UPDATE app.runs r SET stage = 'finish' WHERE id = %(run_id)s AND status = 'running' AND stage = 'execute' AND total > 0
   AND NOT EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = r.id AND t.generation = r.plan_no AND t.status IN ('queued','running')) RETURNING *)
SELECT count(app.enqueue('FinishWF', intent_id || ':finish:' || execution_no, id, %(version)s, NULL, (settings->>'priority')::int)) AS closed FROM done

-- name: begin_attempt
-- Journal before the sandbox. KEY SHARE on the run: the closer of a canceled run (FOR UPDATE) waits for attempts that are just
-- starting; tasks do not block each other. An executor without a live lease starts nothing (a zombie cannot supersede its successor).
WITH run AS (
  SELECT id, status, stage, deadline_at FROM app.runs WHERE id = %(run_id)s FOR KEY SHARE
), leased AS (
  SELECT EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = %(executor)s AND l.expires_at > clock_timestamp()) AS ok
), task AS (
  -- What the attempt before took is spent, whatever became of it. It was interrupted unless the caller says that it failed.
  UPDATE app.sbx_runs t SET status = 'running', attempt = t.attempt + 1, fence = nextval('app.fence_seq'), started_at = clock_timestamp(),
         spent_ms = t.spent_ms + CASE t.status WHEN 'running' THEN least(t.timeout_ms, 1000 * extract(epoch FROM clock_timestamp() - t.started_at))::bigint ELSE 0 END,
         failures = t.failures + (t.status = 'running' AND t.fence = %(failed)s)::int,
         interruptions = t.interruptions + (t.status = 'running' AND t.fence <> %(failed)s AND NOT t.alone)::int,
         interruptions_alone = t.interruptions_alone + (t.status = 'running' AND t.fence <> %(failed)s AND t.alone)::int,
         alone = false
  FROM run, leased
  WHERE t.run_id = run.id AND t.workflow_id = %(workflow_id)s AND t.status IN ('queued','running')
    AND run.status = 'running' AND run.stage = 'execute' AND leased.ok
  RETURNING t.task_key, t.attempt, t.fence, t.request, t.failures, t.interruptions, t.interruptions_alone
), superseded AS (
  UPDATE app.sbx_attempts a SET state = 'unknown', ended_at = clock_timestamp() FROM task
  WHERE a.task_key = task.task_key AND a.state = 'created' RETURNING a.fence, a.attempt
), before AS (
  -- Also those that somebody superseded who died before their sandboxes were gone. What came before an accepted outcome is over.
  SELECT a.fence, a.attempt FROM task JOIN app.sbx_attempts a ON a.task_key = task.task_key AND a.state = 'unknown'
   WHERE a.attempt > coalesce((SELECT max(d.attempt) FROM app.sbx_attempts d WHERE d.task_key = a.task_key AND d.state = 'done'), 0)
  UNION ALL SELECT fence, attempt FROM superseded
), journal AS (
  INSERT INTO app.sbx_attempts (fence, run_id, task_key, attempt, state, executor)
  SELECT fence, %(run_id)s, task_key, attempt, 'created', %(executor)s FROM task
)
SELECT run.status AS run_status, leased.ok AS leased, run.deadline_at, task.task_key, task.attempt, task.fence, task.request,
       task.failures, task.interruptions, task.interruptions_alone,
       (SELECT jsonb_agg(jsonb_build_array(fence, attempt) ORDER BY attempt) FROM before) AS superseded
  FROM run CROSS JOIN leased LEFT JOIN task ON true

-- name: note_alone
UPDATE app.sbx_runs SET alone = true WHERE run_id = %(run_id)s AND task_key = %(task_key)s AND fence = %(fence)s AND status = 'running'

-- name: admit_sandbox
SELECT app.admit_sandbox(%(provider)s, %(fence)s, %(per_second)s, %(concurrent)s) AS seconds

-- name: live_attempts
-- Of these fences: those whose attempt has not ended and whose executor lives.
SELECT a.fence FROM app.sbx_attempts a
 WHERE a.fence = ANY(%(fences)s) AND a.state = 'created'
   AND EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = a.executor AND l.expires_at > clock_timestamp())

-- name: record_outcome
SELECT * FROM app.record_outcome(%(run_id)s, %(task_key)s, %(fence)s, %(status)s, %(err_code)s, %(provider)s, %(response)s, %(metrics)s,
  %(junit)s, %(artifacts)s, %(shas)s, %(blobs)s, %(chunk_kinds)s, %(chunk_data)s, %(chunk_base)s,
  %(workflow_id)s, %(executor)s, %(carry)s, %(version)s)

-- name: insert_chunks
-- Only the live attempt may speak: a superseded one finds no row under its fence.
INSERT INTO app.chunks (task_key, attempt, seq, kind, data)
SELECT %(task_key)s, %(attempt)s, %(base)s + n - 1, k, d FROM unnest(%(kinds)s::text[], %(data)s::bytea[]) WITH ORDINALITY AS c(k, d, n)
 WHERE EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = %(run_id)s AND t.task_key = %(task_key)s AND t.fence = %(fence)s)
ON CONFLICT DO NOTHING

-- name: abandon_task
-- A canceling run: the task of this workflow ends without an outcome (its sandbox is gone).
WITH task AS (
  UPDATE app.sbx_runs t SET status = 'failed', err_code = 'CANCELED', fence = nextval('app.fence_seq'), finished_at = clock_timestamp()
  FROM app.runs r WHERE t.workflow_id = %(workflow_id)s AND t.status IN ('queued','running') AND r.id = t.run_id AND r.status = 'canceling'
  RETURNING t.task_key)
UPDATE app.sbx_attempts a SET state = 'unknown', ended_at = clock_timestamp() FROM task WHERE a.task_key = task.task_key AND a.state = 'created'

-- name: canceling
SELECT id FROM app.runs WHERE status = 'canceling'

-- name: results
SELECT task_id, task_key, idx, status, err_code, attempt, metrics, junit, response->>'exit' AS exit
  FROM app.sbx_runs WHERE run_id = %(run_id)s AND generation = %(generation)s ORDER BY idx

-- name: finish
UPDATE app.runs SET status = %(target)s, reason = %(reason)s, error = %(error)s, result = %(result)s, next_action = %(next_action)s,
       last_step = 'ExecuteST', closed = closed + 1, finished_at = clock_timestamp()
 WHERE id = %(run_id)s AND status = ANY(%(sources)s) AND stage = 'finish' AND execution_no = %(execution_no)s

-- name: ledger_look
-- One row always: the call, if it was ever made, beside what all calls of the run took.
SELECT o.op_key, o.session, o.structured, o.raw_text, o.tool_calls, o.response->'tokens' AS tokens, o.timings,
       o.response->>'problem' AS problem, o.err_code, s.spent
  FROM (SELECT coalesce(sum((tokens->>'in')::bigint + (tokens->>'out')::bigint), 0) AS spent
          FROM app.opencode_calls WHERE run_id = %(run_id)s) s
  LEFT JOIN app.opencode_calls o ON o.op_key = %(op_key)s

-- name: ledger_put
-- A failed call is kept until the same call succeeds; a success is never overwritten. What its tries took adds up, each once: a write
-- whose commit was not answered comes again under the same try_id.
INSERT INTO app.opencode_calls AS o (op_key, run_id, step_id, attempt, seq, agent, session, schema_hash, prompt, request, response, structured,
                                     raw_text, tool_calls, timings, tokens, try_id, err_code, error)
VALUES (%(op_key)s, %(run_id)s, %(step_id)s, %(attempt)s, %(seq)s, %(agent)s, %(session)s, %(schema_hash)s, %(prompt)s, %(request)s, %(response)s,
        %(structured)s, %(raw_text)s, %(tool_calls)s, %(timings)s, %(tokens)s, %(try_id)s, %(err_code)s, %(error)s)
ON CONFLICT (op_key) DO UPDATE SET session = excluded.session, response = excluded.response, structured = excluded.structured,
       raw_text = excluded.raw_text, tool_calls = excluded.tool_calls, timings = excluded.timings,
       tokens = jsonb_build_object('in', (o.tokens->>'in')::bigint + (excluded.tokens->>'in')::bigint,
                                   'out', (o.tokens->>'out')::bigint + (excluded.tokens->>'out')::bigint),
       try_id = excluded.try_id, err_code = excluded.err_code, error = excluded.error
 WHERE o.err_code IS NOT NULL AND o.try_id <> excluded.try_id

-- name: add_tokens
UPDATE app.runs SET tokens = coalesce((SELECT sum((o.tokens->>'in')::bigint + (o.tokens->>'out')::bigint) FROM app.opencode_calls o
                                        WHERE o.run_id = %(run_id)s), 0)
 WHERE id = %(run_id)s

-- ------------------------------------------------------------------------------------------------ leases and repair

-- name: take_lease
INSERT INTO app.executor_leases (executor_id, expires_at) VALUES (%(executor)s, clock_timestamp() + make_interval(secs => %(ttl)s))
ON CONFLICT (executor_id) DO UPDATE SET expires_at = excluded.expires_at

-- name: renew_lease
-- A lease that has run out stays so: its executor's workflows may already run elsewhere, under the same ids.
UPDATE app.executor_leases SET expires_at = clock_timestamp() + make_interval(secs => %(ttl)s)
 WHERE executor_id = %(executor)s AND expires_at > clock_timestamp()

-- name: release
DELETE FROM app.executor_leases WHERE executor_id = %(executor)s

-- name: dead_executors
SELECT DISTINCT executor_id FROM dbos.workflow_status w
 WHERE status = 'PENDING' AND executor_id IS NOT NULL AND queue_name IN ('intentQ','sbxQ')
   AND NOT EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = w.executor_id AND l.expires_at > clock_timestamp())

-- name: try_sweep_lock
SELECT pg_try_advisory_xact_lock(123501) AS ok

-- name: repairable
SELECT id AS run_id FROM app.runs WHERE status IN ('queued','running','repairing','canceling')
   AND updated_at < clock_timestamp() - interval '2 seconds'

-- name: redispatch_lost
-- A slot leaks when a TaskWF ended without an outcome. Its id cannot be enqueued again, so a repair gets a suffix.
WITH run AS (SELECT * FROM app.runs WHERE id = %(run_id)s AND status IN ('running','canceling') AND stage = 'execute'),
next AS (
  UPDATE app.sbx_runs t SET dispatches = t.dispatches + 1,
         workflow_id = run.intent_id || ':task:' || run.execution_no || ':' || t.task_key || ':r' || (t.dispatches + 1)
  FROM run WHERE t.run_id = run.id AND t.workflow_id IS NOT NULL
   AND (t.status = 'running' OR (t.status = 'queued' AND run.status = 'running'))
   AND NOT EXISTS (SELECT 1 FROM dbos.workflow_status w WHERE w.workflow_uuid = t.workflow_id AND w.status IN ('ENQUEUED','PENDING','DELAYED'))
  RETURNING t.workflow_id)
SELECT count(app.enqueue('TaskWF', next.workflow_id, run.id, %(version)s, run.settings->>'partition', (run.settings->>'priority')::int)) AS n FROM next, run

-- name: redispatch_coordinator
-- A coordinator that ended without moving its run on (an exception in its body): dispatched again under a suffix, and each time later,
-- up to every five minutes: what ends it may be there to stay, and each time may ask the model anew.
WITH run AS (
  UPDATE app.runs r SET dispatches = dispatches + 1
  WHERE id = %(run_id)s AND (stage = 'plan' AND status IN ('queued','running','repairing','canceling')
                             OR status IN ('running','canceling') AND (stage = 'finish' OR (stage = 'execute' AND total = 0)))
    AND updated_at < clock_timestamp() - make_interval(secs => least(300, power(2, least(dispatches, 10))))
    AND NOT EXISTS (SELECT 1 FROM dbos.workflow_status w WHERE w.status IN ('ENQUEUED','PENDING','DELAYED')
      AND (w.workflow_uuid = r.intent_id AND r.stage = 'plan'
           OR starts_with(w.workflow_uuid, r.intent_id || CASE r.stage WHEN 'plan' THEN ':plan:' WHEN 'finish' THEN ':finish:' ELSE ':execute:' END)))
  RETURNING *)
SELECT count(app.enqueue((CASE stage WHEN 'plan' THEN 'RunIntentWF' WHEN 'finish' THEN 'FinishWF' ELSE 'ExecutePlanWF' END)::app.workflow_name,
    intent_id || CASE stage WHEN 'plan' THEN ':plan:' || plan_no WHEN 'finish' THEN ':finish:' || execution_no ELSE ':execute:' || execution_no END
      || ':r' || dispatches,
    CASE stage WHEN 'plan' THEN intent_id ELSE id END, %(version)s, NULL, (settings->>'priority')::int)) AS n FROM run

-- name: held_attempts
SELECT a.run_id, a.fence, a.attempt, a.task_key FROM app.sbx_runs t JOIN app.sbx_attempts a ON a.task_key = t.task_key AND a.state IN ('created','unknown')
 WHERE t.workflow_id = %(workflow_id)s AND t.status IN ('queued','running')
   AND a.attempt > coalesce((SELECT max(d.attempt) FROM app.sbx_attempts d WHERE d.task_key = a.task_key AND d.state = 'done'), 0)
