"""The command line of the development cluster: `python -m devcluster build | up | down | status`.

`make up` and `make down` call it. Everything it starts is recorded in the state directory and ended from there.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from devcluster import build as builder
from devcluster.cache import cache_dir, locked, say
from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.identities import write_private
from devcluster.install import CHART, apply_chart, apply_people
from devcluster.postgres import Postgres

app = typer.Typer(
    help="A Kubernetes control plane and PostgreSQL on this machine, without Docker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Where the cluster keeps everything. Default: `dev` in the cache."),
]


@app.command()
def build() -> None:
    """Build the control plane and helm into the cache (about 8 minutes, once per version)."""
    with _plain_errors():
        for program in (builder.KCP, builder.HELM):
            print(f"{program.name}: {builder.ensure(program)}")


@app.command()
def up(
    state: State = None,
    chart: Annotated[bool, typer.Option(help="Apply charts/sisu-kodo and bind the three people to its roles.")] = True,
    values: Annotated[
        list[Path] | None, typer.Option("--values", metavar="FILE", help="Values file for the chart; may repeat.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value for the chart; may repeat.")
    ] = None,
    fsync: Annotated[bool, typer.Option(help="Let PostgreSQL wait for the disk.")] = True,
) -> None:
    """Start everything in the background and print the kubeconfigs. What already runs is left alone."""
    home = _home(state)
    with _plain_errors(), locked(home / "lock"):
        cluster = ControlPlane(home, detach=True)
        _start("control plane", cluster)
        if database := os.environ.get("DATABASE_URL"):
            say("PostgreSQL: DATABASE_URL is set, so yours is used")
        else:
            postgres = Postgres(home, fsync=fsync, detach=True)
            _start("PostgreSQL", postgres)
            database = postgres.dsn
        if chart:
            apply_chart(cluster, values=values or (), sets=sets or ())
            apply_people(cluster)
            say(f"applied {os.path.relpath(CHART)} and the people's roles")
        _write_env(home, cluster, database)
        _show(home, cluster)


@app.command()
def down(
    state: State = None,
    wipe: Annotated[bool, typer.Option("--wipe", help="Remove the state too: etcd, database, certificates.")] = False,
) -> None:
    """Stop exactly what `up` started. The data stays, unless --wipe."""
    home = _home(state)
    if not home.is_dir():
        say(f"nothing to stop in {home}")
        return
    with _plain_errors(), locked(home / "lock"):
        cluster, postgres = ControlPlane(home), Postgres(home)
        alive = [child.name for child in cluster.children.values() if child.alive()]
        alive += ["postgres"] if postgres.running else []
        cluster.stop()
        postgres.stop()
        say(f"stopped {', '.join(alive)}" if alive else f"nothing was running in {home}")
        if wipe:
            cluster.wipe()
            postgres.wipe()
            (home / "env").unlink(missing_ok=True)
            say(f"removed the state in {home}")


@app.command()
def status(state: State = None) -> None:
    """Say what runs, and where its kubeconfigs are. Exit code 1 when the control plane does not run."""
    home = _home(state)
    cluster, postgres = ControlPlane(home), Postgres(home)
    for child in (*cluster.children.values(), *([postgres.child] if postgres.child else [])):
        print(f"{child.name:<24} {'running' if child.alive() else 'ended':<8} pid {child.pid}")
    if not cluster.running:
        print(f"no control plane runs in {home}; start one with `python -m devcluster up`")
        raise typer.Exit(1)
    _show(home, cluster)


def _home(state: Path | None) -> Path:
    return (state or cache_dir() / "dev").expanduser().absolute()


def _start(what: str, part: ControlPlane | Postgres) -> None:
    if part.running:
        say(f"{what}: already running")
        return
    started = time.monotonic()
    part.start()
    say(f"{what}: started in {time.monotonic() - started:.1f} s")


def _write_env(home: Path, cluster: ControlPlane, database: str) -> None:
    """For `set -a; . env`. No KUBECONFIG: which cluster is meant must always be said."""
    facts = {"DATABASE_URL": database, "KUBECTL": str(cluster.kcp.with_name("kubectl"))}
    facts |= {f"KUBECONFIG_{name.upper()}": str(path) for name, path in cluster.kubeconfigs().items()}
    write_private(home / "env", "".join(f"{key}={shlex.quote(value)}\n" for key, value in facts.items()))


def _show(home: Path, cluster: ControlPlane) -> None:
    print(f"server      {cluster.server}")
    for name, path in cluster.kubeconfigs().items():
        print(f"{name:<11} {path}")
    print(f"kubectl     {cluster.kcp.with_name('kubectl')}")
    print(f"env         {home / 'env'}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Our own errors as one line and exit code 1, without a traceback."""
    try:
        yield
    except DevclusterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m devcluster")
