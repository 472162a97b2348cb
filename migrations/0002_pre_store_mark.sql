-- Law 10, a restored backup is another store (docs/adr/0009): a mark that only grows, and a copy of which is kept outside PostgreSQL.
ALTER TABLE app.store
  ADD COLUMN mark bigint NOT NULL DEFAULT 0,      -- grows with every beat of a controller; the copy outside is never ahead of it
  ADD COLUMN compared_at timestamptz;             -- when a controller last found that this is so: workers begin after that, not before
