"""The command line of the development cluster: `python -m devcluster build | up | down | status`.

`make up` and `make down` call it. Everything it starts is recorded in the state directory and ended from there.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psycopg
import typer

from devcluster import build as builder
from devcluster import ocdaemon
from devcluster.cache import cache_dir, locked, say
from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.identities import write_private
from devcluster.install import CHART
from devcluster.node import Node, missing
from devcluster.postgres import Postgres
from devcluster.processes import Child
from devcluster.sandbox_python import toolchain
from devcluster.stack import ROOT, Controller, Stack

app = typer.Typer(
    help="A Kubernetes control plane and PostgreSQL on this machine, without Docker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RECORD = "controller.json"
Sandboxes = Annotated[str, typer.Option(help="live (bubblewrap) or mock")]
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
    controller: Annotated[bool, typer.Option(help="Start the controller, too.")] = True,
    chart: Annotated[bool, typer.Option(help="Apply charts/sisu-kodo and bind the three people to its roles.")] = True,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One value for the chart; may repeat.")
    ] = None,
    fsync: Annotated[bool, typer.Option(help="Let PostgreSQL wait for the disk.")] = True,
    node: Annotated[bool, typer.Option("--node", help="A real node that runs Pods, too; needs root.")] = False,
) -> None:
    """Start everything in the background and print the kubeconfigs. What already runs is left alone."""
    home = _home(state)
    with _plain_errors(), locked(home / "lock"):
        ocdaemon.mode(os.environ)
        stack = _stack(home, fsync=fsync, sets=tuple(sets or ()), node=node)
        _start_cluster(stack)
        if stack.database_url:
            say("PostgreSQL: DATABASE_URL is set, so yours is used")
            stack.database = stack.database_url
        else:
            stack.postgres = Postgres(home, fsync=fsync, detach=True)
            _start("PostgreSQL", stack.postgres)
            stack.database = stack.postgres.dsn
        if chart:
            stack.install()
            say(f"applied {os.path.relpath(CHART)} and the people's roles; admission is in force")
        _write_env(home, stack.cluster, stack.database)
        if chart and controller:
            _start_controller(stack, home)
        _show(home, stack.cluster, stack.machine)


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
        cluster, postgres, running = ControlPlane(home), Postgres(home), _running(home)
        machine, daemon = Node(cluster), ocdaemon.running(home)
        alive = ["controller"] if running is not None else []
        alive += ["opencode"] if daemon is not None else []
        parts = (*machine.children.values(), *cluster.children.values())
        alive += [child.name for child in parts if child.alive()]
        alive += ["postgres"] if postgres.running else []
        if running is not None:
            running.stop()
        if daemon is not None:
            daemon.stop()
        for record in (RECORD, ocdaemon.RECORD):
            (home / record).unlink(missing_ok=True)
        machine.stop()
        cluster.stop()
        postgres.stop()
        say(f"stopped {', '.join(alive)}" if alive else f"nothing was running in {home}")
        if wipe:
            stack = _stack(home)
            stack.postgres = postgres
            stack.wipe()
            say(f"removed the state in {home}")


@app.command()
def start(state: State = None, sandboxes: Sandboxes = "live") -> None:
    """Run the controller in the foreground on what `up --no-controller` started. Ctrl-C ends it."""
    home = _home(state)
    with _plain_errors():
        stack = _stack(home)
        if not stack.cluster.running:
            raise DevclusterError("no control plane runs; start it with `make up CONTROLLER=0`")
        if _running(home) is not None:
            raise DevclusterError("a controller runs already; `make down` ends it")
        stack.postgres = None if stack.database_url else Postgres(home)
        stack.database = stack.database_url or (stack.postgres.dsn if stack.postgres else "")
        settings = {"SBX_MODE": sandboxes, "ADMIN_PORT": os.environ.get("ADMIN_PORT", "3002"), **_opencode(home)}
        if sandboxes == "live":
            settings |= stack.pods() if stack.machine.running else {"SBX_TOOLCHAINS": str(toolchain())}
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "controller", "run"], stack.environment(**settings))


@app.command("oc-daemon")
def oc_daemon(state: State = None) -> None:
    """Keep an OpenCode daemon in the foreground, with a scripted model unless OC_MODEL_BASE_URL is set. Ctrl-C ends it."""
    with _plain_errors():
        raise typer.Exit(ocdaemon.foreground(_home(state), os.environ))


@app.command("db-reset")
def db_reset(
    state: State = None,
    system: Annotated[
        bool, typer.Option("--system", help="DBOS' schema instead of ours: queues and workflow history.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Although Intents refer to this store.")] = False,
) -> None:
    """Empty schema `app` (or with --system `dbos`) and migrate again. Refuses while a controller runs or Intents refer to it."""
    home = _home(state)
    with _plain_errors():
        stack = _stack(home)
        postgres = Postgres(home)
        if not stack.database_url and not postgres.running:
            raise DevclusterError("no PostgreSQL runs; `make up CONTROLLER=0` starts it")
        stack.database = stack.database_url or postgres.dsn
        if _running(home) is not None:
            raise DevclusterError("a controller runs; `make down` ends it, `make up CONTROLLER=0` brings the rest back")
        if stack.cluster.running and not force:
            started = stack.kubectl("get", "intents", "-A", "-o", "jsonpath={.items[*].status.storeId}").stdout.split()
            if started:
                raise DevclusterError(
                    f"{len(started)} Intents refer to this store and would be StoreBehind; delete them or use --force"
                )
        with psycopg.connect(stack.database, autocommit=True) as c:
            c.execute("DROP SCHEMA IF EXISTS dbos CASCADE" if system else "DROP SCHEMA IF EXISTS app CASCADE")
        stack.migrate(stack.database)
        say(f"schema {'dbos' if system else 'app'} is empty again")


@app.command()
def status(state: State = None) -> None:
    """Say what runs, and where its kubeconfigs are. Exit code 1 when the control plane does not run."""
    home = _home(state)
    cluster, postgres = ControlPlane(home), Postgres(home)
    machine, running, daemon = Node(cluster), _running(home), ocdaemon.running(home)
    parts = [
        *cluster.children.values(),
        *machine.children.values(),
        *([postgres.child] if postgres.child else []),
        *([running.child] if running else []),
        *([daemon.child] if daemon else []),
    ]
    for child in parts:
        print(f"{child.name:<24} {'running' if child.alive() else 'ended':<8} pid {child.pid}")
    if not cluster.running:
        print(f"no control plane runs in {home}; start one with `python -m devcluster up`")
        raise typer.Exit(1)
    _show(home, cluster, machine)


def _home(state: Path | None) -> Path:
    return (state or cache_dir() / "dev").expanduser().absolute()


def _stack(home: Path, *, fsync: bool = True, sets: tuple[str, ...] = (), node: bool = False) -> Stack:
    url = os.environ.get("DATABASE_URL", "")
    return Stack(home, detach=True, fsync=fsync, sets=sets, database_url=url, node=node)


def _running(home: Path) -> Controller | None:
    """The controller that `up` started, if it lives."""
    if not (home / RECORD).exists():
        return None
    found = json.loads((home / RECORD).read_text())
    child = Child.from_record(found["child"])
    return Controller(child=child, log=home / "controller.log", admin=found["admin"]) if child.alive() else None


def _start_controller(stack: Stack, home: Path) -> None:
    running = _running(home)
    if running is None:
        if ocdaemon.mode(os.environ) != "replay" and ocdaemon.running(home) is None:
            _start_opencode(home)
        sandboxes = stack.pods() if stack.machine.running else {"SBX_MODE": "live", "SBX_PROVIDER": "local"}
        running = stack.controller(**sandboxes, **_opencode(home))
        (home / RECORD).write_text(json.dumps({"child": running.child.record(), "admin": running.admin}))
        say(f"controller: started; it logs to {running.log}")
    print(f"admin       {running.admin}  (/healthz /readyz /metrics)")


def _start_opencode(home: Path) -> None:
    behind = ocdaemon.provider(os.environ)
    if not behind:
        raise DevclusterError(
            "OC_MODE is not replay, so `make up` needs OC_MODEL_BASE_URL and OC_MODEL: a scripted model would end with it."
            " `make demo` and `make oc-daemon-up` have one of their own"
        )
    ocdaemon.start(home, behind=behind, detach=True).save(home)
    say(f"opencode: started, with {behind['OC_MODEL']} at OC_MODEL_BASE_URL; it logs to {home / 'oc-daemon.log'}")


def _opencode(home: Path) -> dict[str, str]:
    """The controller's OC_* settings: the caller's mode, and the daemon that the caller or this state directory names."""
    wanted = ocdaemon.mode(os.environ)
    settings = {"OC_MODE": wanted, **ocdaemon.fixtures(os.environ)}
    if wanted == "replay":
        return settings
    daemon = ocdaemon.running(home)
    names = ("OC_BASE_URL", "OPENCODE_SERVER_PASSWORD", "OC_MODEL")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if daemon is None and "OC_BASE_URL" not in given:
        raise DevclusterError(
            f"OC_MODE is {wanted}, but no daemon runs; `make oc-daemon-up` in another terminal starts one"
        )
    return {**settings, **(daemon.settings if daemon else {}), **given}


def _start_cluster(stack: Stack) -> None:
    if stack.node and (reason := missing()):
        raise DevclusterError(reason)
    _start("control plane", stack.cluster)
    if stack.node and not stack.cluster.node:
        raise DevclusterError("the control plane runs without a node; `make down` ends it, and its data stays")
    if stack.node:
        _start("node", stack.machine)


def _start(what: str, part: ControlPlane | Node | Postgres) -> None:
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


def _show(home: Path, cluster: ControlPlane, machine: Node) -> None:
    print(f"server      {cluster.server}")
    for name, path in cluster.kubeconfigs().items():
        print(f"{name:<11} {path}")
    print(f"kubectl     {cluster.kcp.with_name('kubectl')}")
    print(f"env         {home / 'env'}")
    if machine.running:
        print(f"image       {machine.images.reference('python')}")


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
