"""Migrations: DBOS' own, then ours, recorded with their hash, under an advisory lock; safe to run twice at once.

`NNNN_pre_*.sql` belongs before a rollout, `NNNN_post_*.sql` after it. Older code meets newer migrations when it is rolled
back: unknown `pre` ones are fine, unknown `post` ones are refused.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import psycopg
from dbos import DBOS

from controller.core.errors import Permanent

log = logging.getLogger(__name__)
_LOCK = 7_365_771_111
FOLDER = Path(__file__).resolve().parents[2] / "migrations"


def sqlalchemy_url(url: str) -> str:
    """DBOS speaks SQLAlchemy: the same database through psycopg 3."""
    return "postgresql+psycopg://" + url.split("://", 1)[1]


def migrate(url: str, *, folder: Path = FOLDER) -> list[str]:
    """Apply what is missing; the names that were applied now. Raises Permanent for a changed or an unknown `post` migration."""
    with psycopg.connect(url, autocommit=True) as c:
        # The session lock also covers DBOS' migrations, some of which cannot run in a transaction.
        _lock(c)
        try:
            DBOS.migrate(sqlalchemy_url(url), schema="dbos")
            applied = _ours(c, folder)
            with c.transaction():
                c.execute((folder / "grants.sql").read_bytes())
            return applied
        finally:
            c.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


def _lock(c: psycopg.Connection) -> None:
    """Poll instead of waiting in the server: a waiting statement holds a snapshot, and CREATE INDEX CONCURRENTLY waits for those."""
    while True:
        row = c.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()
        if row is not None and row[0]:
            return
        time.sleep(0.2)


def _ours(c: psycopg.Connection, folder: Path) -> list[str]:
    c.execute("CREATE SCHEMA IF NOT EXISTS app")
    c.execute(
        "CREATE TABLE IF NOT EXISTS app.migrations "
        "(name text PRIMARY KEY, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
    )
    done = {name: sha for name, sha in c.execute("SELECT name, sha256 FROM app.migrations").fetchall()}
    known = {p.name: p for p in sorted(folder.glob("[0-9]*.sql"))}
    _refuse_newer(set(done) - set(known))
    applied = []
    for name, path in known.items():
        text = path.read_text()
        sha = hashlib.sha256(text.encode()).hexdigest()
        if name in done:
            if done[name] != sha:
                raise Permanent(
                    f"migration {name} was applied with other contents; migrations are never edited, add a new one"
                )
            continue
        with c.transaction():
            c.execute(text.encode())
            c.execute("INSERT INTO app.migrations (name, sha256) VALUES (%s, %s)", (name, sha))
        log.info("migration applied", extra={"migration": name})
        applied.append(name)
    return applied


def _refuse_newer(unknown: set[str]) -> None:
    posts = sorted(n for n in unknown if "_post_" in n)
    if posts:
        raise Permanent(f"the database is newer than this code: it has {', '.join(posts)}; use the newer release")
    for name in sorted(unknown):
        log.info("newer migration tolerated", extra={"migration": name})
