"""Connections to PostgreSQL: a server that is gone without a word (its host lost power, a firewall forgot us) is noticed."""

from __future__ import annotations

import os
import socket

from controller.db.pool import open_pool


def options(url: str, *names: int) -> list[int]:
    pool = open_pool(url, size=1, name="options")
    try:
        with pool.connection() as c, socket.socket(fileno=os.dup(c.fileno())) as tcp:
            return [tcp.getsockopt(socket.IPPROTO_TCP, name) for name in names]
    finally:
        pool.close()


def test_a_dead_connection_is_given_up_within_a_minute(database: str) -> None:
    idle, interval, count, unanswered = options(
        database, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT
    )
    assert idle + interval * count <= 60 and 0 < unanswered <= 60_000


def test_what_the_url_says_wins(database: str) -> None:
    url = f"{database}{'&' if '?' in database else '?'}keepalives_idle=77&tcp_user_timeout=88000"
    assert options(url, socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT) == [77, 88_000]
