-- Run at the end of every migrate, so that a schema that was made anew is granted again. Idempotent.
-- Roles that a deployment's logins are members of. The controller decides, the worker executes: only the controller may
-- record a decision. Creating roles needs CREATEROLE; where the migrating login lacks it, an administrator creates them first.
DO $$
DECLARE r text;
BEGIN
  FOREACH r IN ARRAY ARRAY['sisukodo_controller', 'sisukodo_worker'] LOOP
    IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = r) THEN
      BEGIN
        EXECUTE format('CREATE ROLE %I NOLOGIN', r);
      EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;  -- another database of this cluster migrates at the same time
      END;
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA app, dbos TO %I', r);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA app TO %I', r);
    EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA app TO %I', r);
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA app, dbos TO %I', r);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA dbos TO %I', r);
    EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA dbos TO %I', r);
    EXECUTE format('GRANT INSERT, UPDATE ON app.runs, app.run_transitions, app.executor_leases TO %I', r);
  END LOOP;
END $$;
GRANT INSERT ON app.intents, app.plan_approvals TO sisukodo_controller;   -- append-only
GRANT INSERT, UPDATE ON app.run_steps, app.opencode_calls, app.sbx_runs, app.sbx_attempts, app.mock_receipts, app.blobs, app.artifacts, app.chunks,
  app.sandbox_buckets TO sisukodo_worker;
GRANT UPDATE ON app.sbx_runs TO sisukodo_controller;       -- a cancel takes queued tasks off
GRANT UPDATE ON app.store_mark, app.sbx_attempts TO sisukodo_controller;  -- the latter: what a restored backup was in the middle of
REVOKE EXECUTE ON FUNCTION app.another_store FROM PUBLIC, sisukodo_worker;
GRANT DELETE ON ALL TABLES IN SCHEMA dbos TO sisukodo_worker;
GRANT DELETE ON app.executor_leases TO sisukodo_worker;
