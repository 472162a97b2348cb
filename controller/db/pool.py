"""The connection pool and the named statements of queries.sql. Used by db/ only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, LiteralString, TypeVar, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from controller.core.errors import Unavailable

Pool = ConnectionPool[psycopg.Connection[DictRow]]
T = TypeVar("T")


def _statements() -> dict[str, LiteralString]:
    text = resources.files("controller.db").joinpath("queries.sql").read_text()
    parts = re.split(r"^-- name: (\w+).*$", text, flags=re.MULTILINE)[1:]
    return {name: cast("LiteralString", body.strip()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


SQL: Mapping[str, LiteralString] = _statements()
# A server whose host is gone says nothing. By Linux' own patience a statement waits for 15 minutes, whoever listens for two hours.
NOTICED = {
    "keepalives_idle": "20",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
    "connect_timeout": "10",
}


def noticing(url: str) -> str:
    """The URL as a conninfo, with what makes a dead connection noticed; what the URL itself says about that wins."""
    said = conninfo_to_dict(url)
    return make_conninfo(url, **{name: value for name, value in NOTICED.items() if name not in said})


def open_pool(url: str, *, size: int, name: str) -> Pool:
    """A pool in autocommit: one statement is one round trip and one commit. Raises Unavailable when the server does not answer."""
    pool: Pool = ConnectionPool(
        noticing(url),
        min_size=min(2, size),
        max_size=size,
        open=False,
        timeout=20,
        kwargs={"autocommit": True, "row_factory": dict_row, "application_name": name},
    )
    try:
        pool.open(wait=True, timeout=20)
    except psycopg.Error as e:
        pool.close()
        raise Unavailable(f"PostgreSQL does not answer: {type(e).__name__}") from e
    return pool


def retrying(pool: Pool, call: Callable[[], T]) -> T:
    """Repeat on a lost connection. Safe: every write is a compare-and-set or an insert that ignores its own repetition.

    After a restart of the server every idle connection is dead: without check() each retry would meet the next one.
    """
    retry = Retrying(
        retry=retry_if_exception_type((psycopg.OperationalError, psycopg.InterfaceError)),
        stop=stop_after_attempt(7),
        wait=wait_exponential(multiplier=0.05, max=3),
        before_sleep=lambda _: pool.check(),
        reraise=True,
    )
    try:
        return retry(call)
    except (psycopg.OperationalError, psycopg.InterfaceError) as e:
        raise Unavailable(f"PostgreSQL does not answer: {type(e).__name__}") from e


def one(pool: Pool, statement: str, /, **params: Any) -> DictRow | None:
    """The first row of one named statement, or None."""

    def call() -> DictRow | None:
        with pool.connection() as c:
            return c.execute(SQL[statement], params).fetchone()

    return retrying(pool, call)


def rows(pool: Pool, statement: str, /, **params: Any) -> list[DictRow]:
    """All rows of one named statement."""

    def call() -> list[DictRow]:
        with pool.connection() as c:
            return c.execute(SQL[statement], params).fetchall()

    return retrying(pool, call)


def change(pool: Pool, statement: str, /, **params: Any) -> int:
    """How many rows one named statement changed."""

    def call() -> int:
        with pool.connection() as c:
            return c.execute(SQL[statement], params).rowcount

    return retrying(pool, call)


def transaction(pool: Pool, body: Callable[[psycopg.Connection[DictRow]], T]) -> T:
    """Run body in one transaction; repeated as a whole on a lost connection."""

    def call() -> T:
        with pool.connection() as c, c.transaction():
            return body(c)

    return retrying(pool, call)
