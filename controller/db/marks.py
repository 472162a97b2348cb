"""The store's mark (docs/adr/0009): it grows with every beat, so that an older copy of the database is recognised from outside.

Used by roles/control, which compares, and roles/opening, which waits for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import psycopg
from psycopg.rows import DictRow

from controller.core.phases import Event
from controller.db.pool import SQL, Pool, change, one, transaction
from controller.db.runs import move_params

RESTORED = (
    "the database is an older copy, taken while this was executing; what was approved may have been carried out further than it says: "
    "look at what it did before you make a new plan"
)


def read(pool: Pool) -> tuple[str, int]:
    """Store id and mark."""
    return _mark(one(pool, "store_mark"))


def beat(pool: Pool) -> tuple[str, int]:
    """The same, one further."""
    return _mark(one(pool, "beat_store"))


def compared(pool: Pool, store_id: str) -> None:
    """This store is not behind, now."""
    change(pool, "store_compared", id=store_id)


def clock(pool: Pool) -> datetime:
    """The database's."""
    row = one(pool, "database_clock")
    assert row is not None
    now: datetime = row["now"]
    return now


def compared_since(pool: Pool, since: datetime) -> bool:
    """Whether a controller has compared after that moment of the database's clock."""
    return one(pool, "compared_since", since=since) is not None


def another(pool: Pool, store_id: str) -> Sequence[str] | None:
    """Make this copy a store of its own, in which nothing is being executed. The runs that were; None when somebody did it before."""

    def body(c: psycopg.Connection[DictRow]) -> Sequence[str] | None:
        if c.execute(SQL["another_store"], {"id": store_id}).fetchone() is None:
            return None
        params = {"error": RESTORED, **move_params(Event.EXECUTE_REFUSED)}
        return [str(row["id"]) for row in c.execute(SQL["refuse_executions"], params).fetchall()]

    return transaction(pool, body)


def _mark(row: DictRow | None) -> tuple[str, int]:
    if row is None:
        raise LookupError("app.store is empty; run `python -m controller migrate`")
    return str(row["id"]), int(row["mark"])
