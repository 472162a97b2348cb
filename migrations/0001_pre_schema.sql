-- Schema app: the truth about every Intent, beside DBOS' schema in the same database, so that one transaction spans both.
CREATE SEQUENCE app.fence_seq;          -- fencing tokens: strictly growing over all tasks and attempts

CREATE TABLE app.store (                -- law 10: which store this is; one row for ever
  only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  id         text NOT NULL DEFAULT gen_random_uuid()::text,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO app.store DEFAULT VALUES;

CREATE TABLE app.recipes (
  name text PRIMARY KEY,
  queue_name text NOT NULL CHECK (queue_name = 'intentQ'),
  spec jsonb NOT NULL DEFAULT '{}'
);
INSERT INTO app.recipes (name, queue_name) VALUES ('sandbox-default', 'intentQ');

CREATE TABLE app.intents (              -- what was asked, as it was when it started
  id           text PRIMARY KEY,        -- metadata.uid
  namespace    text NOT NULL,
  name         text NOT NULL,
  goal         text NOT NULL,
  payload      jsonb NOT NULL,          -- {inputs, constraints}
  spec         jsonb NOT NULL,
  requested_by text NOT NULL,
  created_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE app.runs (
  id              text PRIMARY KEY,
  intent_id       text NOT NULL UNIQUE REFERENCES app.intents,
  workflow_id     text NOT NULL UNIQUE,                 -- = intent_id (law 1)
  status          text NOT NULL CHECK (status IN ('queued','running','waiting_input','canceling','repairing','succeeded',
                    'failed','retries_exceeded','canceled','rejected','expired')),
  stage           text NOT NULL DEFAULT 'plan' CHECK (stage IN ('plan','approve','execute','finish')),
  last_step       text,
  reason          text,                                 -- closed list: controller/core/status.py
  error           text,                                 -- bounded, for people
  next_action     text,
  settings        jsonb NOT NULL,                       -- controller.core.settings.Settings
  plan_no         int NOT NULL DEFAULT 1,               -- n of <uid>:plan:<n>; 1 runs as <uid>
  execution_no    int NOT NULL DEFAULT 0,               -- n of <uid>:execute:<n>
  retry_count     int NOT NULL DEFAULT 0,               -- spec.retry that was carried out last
  feedback        text,                                 -- why the former plan failed, told to the next one
  commit_id       text,
  plan            jsonb,                                -- PlanOutput
  record          jsonb,                                -- the execution record that the digest is of
  digest          text,
  patch_sha256    text,
  approval_name   text,
  approval_uid    text,                                 -- votes count only on the object with this UID
  approval_deadline timestamptz,
  total           int NOT NULL DEFAULT 0,               -- tasks of the current execution; > 0 once ExecutePlanWF has committed
  depends         boolean NOT NULL DEFAULT false,       -- some task waits for another one
  result          jsonb,
  tokens          bigint NOT NULL DEFAULT 0,
  dispatches      int NOT NULL DEFAULT 0,               -- repairs of coordinators
  closed          int NOT NULL DEFAULT 0,               -- how often an execution was closed: execution_no at the end, or a bug
  created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
  waiting_at      timestamptz,
  started_at      timestamptz,
  deadline_at     timestamptz,
  executing_since timestamptz,                          -- of the plan that was approved last
  finished_at     timestamptz,
  updated_at      timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 70);               -- no task counters: tasks of one run must not queue up on its row
CREATE INDEX runs_open ON app.runs (status) WHERE status NOT IN ('succeeded','canceled');

CREATE TABLE app.run_steps (
  run_id text NOT NULL REFERENCES app.runs, step_id text NOT NULL, attempt int NOT NULL,
  phase text NOT NULL, output jsonb NOT NULL,
  started_at timestamptz NOT NULL, finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (run_id, step_id, attempt)
);

CREATE TABLE app.opencode_calls (       -- ledger v2: one row per logical model call; failures are kept, never served
  op_key text PRIMARY KEY,
  run_id text NOT NULL REFERENCES app.runs, step_id text NOT NULL, attempt int NOT NULL, seq int NOT NULL,
  agent text NOT NULL, session text, schema_hash text NOT NULL, prompt text NOT NULL,
  request jsonb NOT NULL, response jsonb, structured jsonb, raw_text text, tool_calls jsonb, timings jsonb,
  tokens jsonb NOT NULL,                -- {in, out} of all its tries, as far as they were reported; the answer's own are in response
  try_id text NOT NULL,                 -- the try that was written last
  err_code text, error text,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX opencode_calls_run ON app.opencode_calls (run_id, seq);

CREATE TABLE app.plan_approvals (       -- append-only: who decided what, on which bytes
  run_id text NOT NULL REFERENCES app.runs, digest text NOT NULL, approver text NOT NULL,
  verdict text NOT NULL CHECK (verdict IN ('Approve','Reject')), reason text,
  approval_name text NOT NULL, approval_uid text NOT NULL,
  consumed_by text NOT NULL,            -- the workflow that this decision started, or `reject`
  recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (run_id, digest, approver)
);

CREATE TABLE app.sbx_runs (             -- one row per task
  run_id text NOT NULL REFERENCES app.runs, step_id text NOT NULL DEFAULT 'ExecuteST', task_key text NOT NULL,
  task_id text NOT NULL, idx int NOT NULL, generation int NOT NULL,
  depends int[] NOT NULL DEFAULT '{}',  -- the idx of the tasks that must succeed first
  timeout_ms bigint NOT NULL,           -- what it may take at most: reserved while it has a window slot
  spent_ms bigint NOT NULL DEFAULT 0,   -- what its attempts that have ended took
  status text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued','running','succeeded','failed')),
  workflow_id text,                     -- the TaskWF that holds the window slot; NULL = waiting for a slot
  dispatches int NOT NULL DEFAULT 0,    -- > 1 only after a repair
  attempt int NOT NULL DEFAULT 0,       -- counts on over executions
  failures int NOT NULL DEFAULT 0,      -- attempts of this execution that infrastructure ended
  interruptions int NOT NULL DEFAULT 0, -- and those whose worker died, beside other tasks
  interruptions_alone int NOT NULL DEFAULT 0, -- and without any: these are held against it
  alone boolean NOT NULL DEFAULT false, -- the live attempt has its worker for itself
  fence bigint,                         -- fence of the live attempt: the only authority for accepting an outcome
  provider text, request jsonb NOT NULL, response jsonb, err_code text, metrics jsonb, junit jsonb,
  outcomes int NOT NULL DEFAULT 0,      -- effective (fence-accepted) outcomes: one per execution that ran it
  started_at timestamptz, finished_at timestamptz,
  PRIMARY KEY (run_id, step_id, task_key)
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX sbx_runs_order ON app.sbx_runs (run_id, generation, idx);
CREATE INDEX sbx_runs_waiting ON app.sbx_runs (run_id, generation, idx) WHERE status = 'queued' AND workflow_id IS NULL;
CREATE INDEX sbx_runs_holding ON app.sbx_runs (workflow_id) WHERE status IN ('queued','running') AND workflow_id IS NOT NULL;
CREATE INDEX sbx_runs_key ON app.sbx_runs (task_key);

CREATE TABLE app.sbx_attempts (         -- law 9: one row per intention to create a sandbox, written before the call
  fence bigint PRIMARY KEY,             -- travels as owner metadata of the sandbox
  run_id text NOT NULL, task_key text NOT NULL, attempt int NOT NULL,
  state text NOT NULL CHECK (state IN ('created','done','unknown')),
  executor text NOT NULL,
  admitted_by text,                     -- the provider whose limits let it in; NULL: not yet, or the provider has none
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(), ended_at timestamptz,
  UNIQUE (task_key, attempt)
) WITH (fillfactor = 70);
CREATE INDEX sbx_attempts_admitted ON app.sbx_attempts (admitted_by) WHERE state = 'created' AND admitted_by IS NOT NULL;

CREATE TABLE app.sandbox_buckets (      -- creates per second of a provider, shared by all workers
  provider text PRIMARY KEY, tokens double precision NOT NULL, refilled_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE app.mock_receipts (        -- the oracle of the source documents: seen_count > 1 is an effect that counted twice
  receipt_key text PRIMARY KEY, run_id text NOT NULL, seen_count int NOT NULL DEFAULT 1,
  first_attempt int NOT NULL, last_attempt int NOT NULL
);

CREATE TABLE app.blobs (
  sha256 text PRIMARY KEY, size bigint NOT NULL, content bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE app.blobs ALTER COLUMN content SET STORAGE EXTERNAL;   -- sliced reads; archives are already dense

CREATE TABLE app.artifacts (
  run_id text NOT NULL REFERENCES app.runs, step_id text NOT NULL, task_key text NOT NULL DEFAULT '', attempt int NOT NULL,
  name text NOT NULL, kind text NOT NULL, sha256 text NOT NULL REFERENCES app.blobs, size bigint NOT NULL, uri text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (run_id, step_id, task_key, attempt, name)
);

CREATE INDEX artifacts_uri ON app.artifacts (uri text_pattern_ops);

CREATE TABLE app.chunks (               -- stream sbx:<taskKey>
  task_key text NOT NULL, attempt int NOT NULL, seq int NOT NULL,
  kind text NOT NULL CHECK (kind IN ('stdout','stderr','stream_closed')), data bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (task_key, attempt, seq)
);

CREATE TABLE app.executor_leases (executor_id text PRIMARY KEY, expires_at timestamptz NOT NULL);

-- Every status that a run ever had, in commit order of its row: evidence for tests and for people.
CREATE TABLE app.run_transitions (
  id bigserial PRIMARY KEY, run_id text NOT NULL, status text NOT NULL, stage text NOT NULL, reason text,
  at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE FUNCTION app.log_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'INSERT' OR OLD.status IS DISTINCT FROM NEW.status OR OLD.stage IS DISTINCT FROM NEW.stage THEN
    INSERT INTO app.run_transitions (run_id, status, stage, reason) VALUES (NEW.id, NEW.status, NEW.stage, NEW.reason);
  END IF;
  -- Progress (steps, tokens, tasks) is looked up once a second instead, and a new run's row is read by whoever inserted it.
  IF TG_OP = 'UPDATE' AND OLD.status IS DISTINCT FROM NEW.status THEN PERFORM pg_notify('sisukodo_runs', NEW.intent_id); END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER run_transition AFTER INSERT OR UPDATE ON app.runs FOR EACH ROW EXECUTE FUNCTION app.log_transition();

CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.updated_at := clock_timestamp(); RETURN NEW; END $$;
CREATE TRIGGER run_touch BEFORE UPDATE ON app.runs FOR EACH ROW EXECUTE FUNCTION app.touch();

CREATE TYPE app.workflow_name AS ENUM ('RunIntentWF', 'ExecutePlanWF', 'TaskWF', 'FinishWF');

-- The one way to enqueue. DBOS keeps the first inputs of an id without a word, so they are compared here.
CREATE FUNCTION app.enqueue(p_workflow app.workflow_name, p_id text, p_arg text, p_version text,
                            p_partition text DEFAULT NULL, p_priority int DEFAULT 0) RETURNS text LANGUAGE plpgsql AS $$
DECLARE v_name text; v_inputs jsonb;
BEGIN
  PERFORM dbos.enqueue_workflow(
    workflow_name => p_workflow::text, queue_name => CASE p_workflow WHEN 'TaskWF' THEN 'sbxQ' ELSE 'intentQ' END,
    workflow_id => p_id, positional_args => ARRAY[to_json(p_arg)], queue_partition_key => p_partition,
    priority => 1000000 - p_priority,   -- DBOS runs the lowest number first
    app_version => p_version, application_name => 'sisu-kodo');
  SELECT w.name, i.inputs::jsonb INTO v_name, v_inputs
    FROM dbos.workflow_status w JOIN dbos.workflow_input i USING (workflow_uuid) WHERE w.workflow_uuid = p_id;
  IF v_name IS DISTINCT FROM p_workflow::text OR v_inputs->'positionalArgs' IS DISTINCT FROM jsonb_build_array(p_arg) THEN
    RAISE EXCEPTION 'workflow % exists as %(%)', p_id, v_name, v_inputs->'positionalArgs' USING ERRCODE = 'unique_violation';
  END IF;
  RETURN p_id;
END $$;

-- Is this artifact what became of its task or step? What an earlier attempt left is not, even where the newest left nothing of its name.
CREATE FUNCTION app.served(a app.artifacts) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT a.attempt = CASE WHEN a.task_key = ''
    THEN (SELECT max(s.attempt) FROM app.run_steps s WHERE s.run_id = a.run_id AND s.step_id = a.step_id)
    ELSE (SELECT max(j.attempt) FROM app.sbx_attempts j WHERE j.task_key = a.task_key AND j.state = 'done') END
$$;

-- May this task begin? All that it depends on has succeeded.
CREATE FUNCTION app.ready(t app.sbx_runs) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT t.depends = '{}' OR NOT EXISTS (
    SELECT 1 FROM app.sbx_runs d WHERE d.run_id = t.run_id AND d.generation = t.generation AND d.idx = ANY (t.depends) AND d.status <> 'succeeded')
$$;

-- Whether sandbox minutes could have been used up by now: by all slots, busy from the beginning. Until then nobody needs to count;
-- from then on whoever picks tasks holds the run's row lock.
CREATE FUNCTION app.minutes_matter(r app.runs) RETURNS boolean LANGUAGE sql VOLATILE AS $$
  SELECT coalesce((r.settings->>'parallelism')::int
         * (1000 * extract(epoch FROM clock_timestamp() - r.executing_since)::double precision + 1000 * (r.settings->>'task_timeout_seconds')::int)
         > (r.settings->>'max_sandbox_minutes')::bigint * 60000, true)
$$;

-- Milliseconds of sandboxes that the approved plan may still reserve; NULL: plenty. A task reserves its time limit when it gets a
-- window slot, and what its attempts really took stays.
CREATE FUNCTION app.sandbox_room(r app.runs) RETURNS bigint LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF NOT app.minutes_matter(r) THEN RETURN NULL; END IF;
  RETURN (r.settings->>'max_sandbox_minutes')::bigint * 60000 - (
    SELECT coalesce(sum(t.spent_ms + CASE WHEN t.status IN ('queued','running') AND t.workflow_id IS NOT NULL THEN t.timeout_ms ELSE 0 END), 0)
      FROM app.sbx_runs t WHERE t.run_id = r.id AND t.generation = r.plan_no);
END $$;

-- Fills the window of an executing run; how many TaskWF were enqueued. The caller has locked the run's row. Tasks are taken in the
-- plan's order: one whose time limit does not fit into what is left waits until a running one gives time back, and when none runs,
-- it and all after it are over.
CREATE FUNCTION app.top_up(p_run_id text, p_version text) RETURNS int LANGUAGE plpgsql AS $$
DECLARE v_run app.runs; v_open int; v_room bigint; v_n int;
BEGIN
  SELECT * INTO v_run FROM app.runs r WHERE r.id = p_run_id AND r.status = 'running' AND r.stage = 'execute';
  IF NOT FOUND THEN RETURN 0; END IF;
  SELECT count(*) INTO v_open FROM app.sbx_runs t
   WHERE t.run_id = p_run_id AND t.status IN ('queued','running') AND t.workflow_id IS NOT NULL;
  v_room := app.sandbox_room(v_run);
  WITH run AS (SELECT v_run.id, v_run.intent_id, v_run.execution_no, v_run.settings), waiting AS (
    SELECT t.task_key, t.idx, t.timeout_ms FROM app.sbx_runs t
     WHERE t.run_id = p_run_id AND t.generation = v_run.plan_no AND t.status = 'queued' AND t.workflow_id IS NULL AND app.ready(t)
     ORDER BY t.idx LIMIT greatest(0, (v_run.settings->>'parallelism')::int - v_open) FOR UPDATE SKIP LOCKED
  ), picked AS (
    SELECT w.task_key FROM (SELECT task_key, sum(timeout_ms) OVER (ORDER BY idx) AS needed FROM waiting) w
     WHERE v_room IS NULL OR w.needed <= v_room
  ), next AS (
    UPDATE app.sbx_runs t SET dispatches = t.dispatches + 1, workflow_id = run.intent_id || ':task:' || run.execution_no || ':' || t.task_key
    FROM picked, run WHERE t.run_id = run.id AND t.task_key = picked.task_key RETURNING t.workflow_id, t.idx
  )
  SELECT count(app.enqueue('TaskWF', n.workflow_id, run.id, p_version, run.settings->>'partition', (run.settings->>'priority')::int))
    INTO v_n FROM (SELECT * FROM next ORDER BY idx) n, run;
  IF v_room IS NOT NULL AND v_n = 0 AND v_open = 0 THEN
    UPDATE app.sbx_runs t SET status = 'failed', err_code = 'BUDGET', finished_at = clock_timestamp()
     WHERE t.run_id = p_run_id AND t.generation = v_run.plan_no AND t.status = 'queued';
  END IF;
  RETURN v_n;
END $$;

-- Tasks that wait for a failed one, directly or through others, will never run.
CREATE FUNCTION app.skip_dependents(p_run_id text, p_generation int, p_idx int) RETURNS void LANGUAGE sql AS $$
  -- Edges by themselves, so that one hash of them serves every round: a chain has as many rounds as tasks.
  WITH RECURSIVE edges AS MATERIALIZED (
    SELECT t.idx, needed FROM app.sbx_runs t, unnest(t.depends) AS needed WHERE t.run_id = p_run_id AND t.generation = p_generation
  ), lost(idx) AS (
    SELECT p_idx
    UNION
    SELECT edges.idx FROM lost JOIN edges ON edges.needed = lost.idx)
  UPDATE app.sbx_runs t SET status = 'failed', err_code = 'SKIPPED', finished_at = clock_timestamp()
   FROM lost WHERE t.run_id = p_run_id AND t.generation = p_generation AND t.idx = lost.idx AND t.status = 'queued'
$$;

-- After the first failure of a FailFast recipe nothing more begins; what runs ends by itself, so that its result is kept.
CREATE FUNCTION app.skip_waiting(p_run_id text, p_generation int) RETURNS void LANGUAGE sql AS $$
  UPDATE app.sbx_runs t SET status = 'failed', err_code = 'SKIPPED', finished_at = clock_timestamp()
   WHERE t.run_id = p_run_id AND t.generation = p_generation AND t.status = 'queued'
$$;

-- The outcome of one attempt and what follows from it: one transaction, one round trip (reference/fanout.md).
-- plpgsql, because each statement inside takes a new snapshot: "lock, then look" is not expressible in a single SQL statement.
--   1 fence check + result          2 take the next waiting task: SKIP LOCKED, so finishers of one run do not wait for each other
--   3 only when none waits (at most `window` times per run): lock the run row, look again, close by compare-and-set.
-- No row back: fenced off, nothing was changed. p_carry: the caller goes on with the next task itself, its attempt is begun here.
CREATE FUNCTION app.record_outcome(
  p_run_id text, p_task_key text, p_fence bigint, p_status text, p_err_code text, p_provider text, p_response jsonb, p_metrics jsonb,
  p_junit jsonb, p_artifacts jsonb, p_shas text[], p_blobs bytea[], p_chunk_kinds text[], p_chunk_data bytea[], p_chunk_base int,
  p_workflow_id text, p_executor text, p_carry boolean, p_version text)
RETURNS TABLE (run_status text, next_task_key text, next_attempt int, next_fence bigint, next_request jsonb)
LANGUAGE plpgsql AS $$
DECLARE v_run app.runs; v_task app.sbx_runs; v_next app.sbx_runs; v_priority int; v_partition text; v_room bigint; v_turns boolean; v_fast boolean;
BEGIN
  UPDATE app.sbx_runs t SET status = p_status, err_code = p_err_code, provider = p_provider, response = p_response,
         metrics = p_metrics, junit = p_junit, outcomes = t.outcomes + 1, finished_at = clock_timestamp(),
         spent_ms = t.spent_ms + coalesce((p_metrics->>'wallMs')::bigint, 0)
   WHERE t.run_id = p_run_id AND t.task_key = p_task_key AND t.fence = p_fence AND t.status = 'running' RETURNING * INTO v_task;
  IF NOT FOUND THEN RETURN; END IF;

  UPDATE app.sbx_attempts a SET state = CASE WHEN a.fence = p_fence THEN 'done' ELSE 'unknown' END, ended_at = clock_timestamp()
   WHERE a.task_key = p_task_key AND a.state = 'created';
  INSERT INTO app.blobs (sha256, size, content) SELECT s, length(b), b FROM unnest(p_shas, p_blobs) AS x(s, b) ON CONFLICT DO NOTHING;
  INSERT INTO app.artifacts (run_id, step_id, task_key, attempt, name, kind, sha256, size, uri)
    SELECT p_run_id, 'ExecuteST', p_task_key, v_task.attempt, a.name, a.kind, a.sha256, a.size, a.uri
      FROM jsonb_to_recordset(p_artifacts) AS a(name text, kind text, sha256 text, size bigint, uri text) ON CONFLICT DO NOTHING;
  INSERT INTO app.chunks (task_key, attempt, seq, kind, data)
    SELECT p_task_key, v_task.attempt, p_chunk_base + n - 1, k, d
      FROM unnest(p_chunk_kinds, p_chunk_data) WITH ORDINALITY AS c(k, d, n) ON CONFLICT DO NOTHING;

  -- KEY SHARE does not block other finishers; a canceler that closes the run (FOR UPDATE) waits for us, because we may begin an attempt.
  SELECT * INTO v_run FROM app.runs r WHERE r.id = p_run_id FOR KEY SHARE;
  INSERT INTO app.mock_receipts AS m (receipt_key, run_id, first_attempt, last_attempt)
    VALUES (p_task_key || ':' || v_run.execution_no, p_run_id, v_task.attempt, v_task.attempt)
    ON CONFLICT (receipt_key) DO UPDATE SET seen_count = m.seen_count + 1, last_attempt = excluded.last_attempt;

  IF v_run.status = 'running' AND v_run.stage = 'execute' THEN
    v_fast := p_status = 'failed' AND v_run.settings->>'on_failure' = 'FailFast';
    v_turns := v_run.depends OR app.minutes_matter(v_run);
    IF v_turns OR v_fast THEN
      -- Two finishers may together make a task ready that neither sees alone, or take the same minutes: they take turns.
      PERFORM 1 FROM app.runs r WHERE r.id = p_run_id FOR NO KEY UPDATE;
      IF v_run.depends AND p_status = 'failed' THEN PERFORM app.skip_dependents(p_run_id, v_task.generation, v_task.idx); END IF;
      IF v_fast THEN PERFORM app.skip_waiting(p_run_id, v_task.generation); END IF;
      v_room := app.sandbox_room(v_run);
    END IF;
    -- An attempt begins only under a live lease, here too; without one the next task is for others.
    p_carry := p_carry AND EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = p_executor AND l.expires_at > clock_timestamp());
    v_priority := (v_run.settings->>'priority')::int; v_partition := v_run.settings->>'partition';
    UPDATE app.sbx_runs t SET dispatches = t.dispatches + 1,
           workflow_id = CASE WHEN p_carry THEN p_workflow_id ELSE v_run.intent_id || ':task:' || v_run.execution_no || ':' || t.task_key END,
           status = CASE WHEN p_carry THEN 'running' ELSE 'queued' END,
           attempt = t.attempt + p_carry::int,
           fence = CASE WHEN p_carry THEN nextval('app.fence_seq') ELSE t.fence END,
           started_at = CASE WHEN p_carry THEN clock_timestamp() ELSE t.started_at END
     WHERE t.run_id = p_run_id AND t.task_key = (
             SELECT q.task_key FROM app.sbx_runs q
              WHERE q.run_id = p_run_id AND q.generation = v_run.plan_no AND q.status = 'queued' AND q.workflow_id IS NULL AND app.ready(q)
              ORDER BY q.idx LIMIT 1 FOR UPDATE SKIP LOCKED)
       AND (v_room IS NULL OR t.timeout_ms <= v_room)
    RETURNING * INTO v_next;
    IF FOUND AND p_carry THEN
      INSERT INTO app.sbx_attempts (fence, run_id, task_key, attempt, state, executor)
      VALUES (v_next.fence, p_run_id, v_next.task_key, v_next.attempt, 'created', p_executor);
      IF v_turns THEN PERFORM app.top_up(p_run_id, p_version); END IF;
      RETURN QUERY SELECT v_run.status, v_next.task_key, v_next.attempt, v_next.fence, v_next.request;
      RETURN;
    ELSIF FOUND THEN
      PERFORM app.enqueue('TaskWF', v_next.workflow_id, p_run_id, p_version, v_partition, v_priority);
      IF v_turns THEN PERFORM app.top_up(p_run_id, p_version); END IF;
    ELSE
      -- NO KEY UPDATE, not UPDATE: finishers hold KEY SHARE already, and an upgrade to UPDATE would deadlock two of them.
      PERFORM 1 FROM app.runs r WHERE r.id = p_run_id FOR NO KEY UPDATE;
      IF v_turns THEN PERFORM app.top_up(p_run_id, p_version); END IF;
      UPDATE app.runs r SET stage = 'finish' WHERE r.id = p_run_id AND r.status = 'running' AND r.stage = 'execute'
         AND NOT EXISTS (SELECT 1 FROM app.sbx_runs t WHERE t.run_id = p_run_id AND t.generation = r.plan_no AND t.status IN ('queued','running'));
      IF FOUND THEN
        PERFORM app.enqueue('FinishWF', v_run.intent_id || ':finish:' || v_run.execution_no, p_run_id, p_version, NULL, v_priority);
      END IF;
    END IF;
  END IF;
  RETURN QUERY SELECT v_run.status, NULL::text, NULL::int, NULL::bigint, NULL::jsonb;
END $$;

-- Seconds to wait before this attempt may create a sandbox; 0: it may, now. All workers take turns on the provider's row. A sandbox
-- counts until its attempt has ended, or until its executor is dead; nothing has to be given back.
CREATE FUNCTION app.admit_sandbox(p_provider text, p_fence bigint, p_per_second double precision, p_concurrent int)
RETURNS double precision LANGUAGE plpgsql AS $$
DECLARE v app.sandbox_buckets; v_burst double precision := greatest(1, p_per_second); v_now timestamptz;
BEGIN
  INSERT INTO app.sandbox_buckets (provider, tokens) VALUES (p_provider, v_burst) ON CONFLICT DO NOTHING;
  SELECT * INTO v FROM app.sandbox_buckets WHERE provider = p_provider FOR UPDATE;
  -- One that is in already asks again when the answer was lost: it must not wait until it has ended itself.
  IF EXISTS (SELECT 1 FROM app.sbx_attempts WHERE fence = p_fence AND state = 'created' AND admitted_by = p_provider) THEN RETURN 0; END IF;
  v_now := clock_timestamp();
  IF p_concurrent > 0 AND (
       SELECT count(*) FROM app.sbx_attempts a
        WHERE a.admitted_by = p_provider AND a.state = 'created'
          AND EXISTS (SELECT 1 FROM app.executor_leases l WHERE l.executor_id = a.executor AND l.expires_at > v_now)) >= p_concurrent THEN
    RETURN 1;
  END IF;
  IF p_per_second > 0 THEN
    v.tokens := least(v_burst, v.tokens + p_per_second * extract(epoch FROM v_now - v.refilled_at));
    IF v.tokens < 1 THEN
      RETURN (1 - v.tokens) / p_per_second;
    END IF;
    UPDATE app.sandbox_buckets SET tokens = v.tokens - 1, refilled_at = v_now WHERE provider = p_provider;
  END IF;
  UPDATE app.sbx_attempts SET admitted_by = p_provider WHERE fence = p_fence AND state = 'created';
  RETURN 0;
END $$;
