-- Law 10, a restored backup is another store (docs/adr/0009): a mark that only grows, and a copy of which is kept outside PostgreSQL.
CREATE TABLE app.store_mark (            -- one row for ever
  only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
  mark        bigint NOT NULL DEFAULT 0, -- grows with every beat of a controller; the copy outside is never ahead of it
  compared_at timestamptz                -- when a controller last found that this is so: workers begin after that, not before
);
INSERT INTO app.store_mark DEFAULT VALUES;

-- The one change of the store's id: to a new one, by the controller, who may not write app.store otherwise. No row: it has another id.
CREATE FUNCTION app.another_store(p_id text) RETURNS SETOF text LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog AS $$
  UPDATE app.store_mark SET compared_at = NULL WHERE EXISTS (SELECT 1 FROM app.store s WHERE s.id = p_id);
  UPDATE app.store SET id = gen_random_uuid()::text WHERE id = p_id RETURNING id
$$;
