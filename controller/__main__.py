"""The command line: `python -m controller run | oc-daemon | migrate | artifact | orphans | sandbox-pool`.

Exit codes: 0 fine, 2 bad configuration, 75 fenced off.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import sys
from typing import Annotated, Literal

import typer
import yaml

from controller import config, log
from controller.core.contract import Egress, Limits
from controller.core.errors import SisuError

cli = typer.Typer(
    help="Sisu-Kodo: goals become approved, sandboxed, durable work.", no_args_is_help=True, add_completion=False
)


class Role(enum.StrEnum):
    """What a process does."""

    ALL = "all"
    CONTROLLER = "controller"
    WORKER = "worker"


def _settings() -> config.Settings:
    try:
        settings = config.load()
    except config.ConfigError as e:
        typer.echo(f"configuration: {e}", err=True)
        raise typer.Exit(2) from None
    log.configure(as_json=settings.log_format == "json", level=settings.log_level)
    return settings


@cli.command()
def run(
    role: Annotated[Role, typer.Option(help="controller: watches and decides; worker: plans and executes")] = Role.ALL,
) -> None:
    """Run until SIGTERM. Settings come from the environment; docs/configuration.md lists them."""
    from controller import main  # imports every adapter: slow, and needless for --help

    settings = _settings()
    try:
        code = main.run(settings, role=role.value)
    except (SisuError, config.ConfigError) as e:
        logging.getLogger(__name__).critical("cannot start", extra={"error": str(e)})
        code = 2
    sys.exit(code)


@cli.command("oc-daemon")
def oc_daemon() -> None:
    """Run the pinned OpenCode daemon and keep it well, until SIGTERM. docs/configuration.md lists the settings.

    It listens on loopback only. Exit code 1: the binary is not the pinned version, or cannot be executed.
    """
    from controller.oc import supervise

    try:
        settings = config.load_daemon()
        log.configure(as_json=settings.log_format == "json", level=settings.log_level)
        code = supervise.run(settings)
    except config.ConfigError as e:
        typer.echo(f"configuration: {e}", err=True)
        code = 2
    sys.exit(code)


@cli.command()
def migrate(
    database_url: Annotated[
        str, typer.Option(envvar="DATABASE_URL", help="PostgreSQL, as a role that may create schemas")
    ],
) -> None:
    """Bring the database to this release's schema. Idempotent; safe to run twice at once."""
    from controller.db.migrate import migrate as apply

    log.configure(as_json=False, level="INFO")
    try:
        applied = apply(database_url)
    except SisuError as e:
        typer.echo(f"migrate: {e}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"migrated: {', '.join(applied) or 'nothing to do'}")


@cli.command()
def artifact(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="artifact://run/…, as status.result has it; a shorter one lists")
    ],
    database_url: Annotated[str, typer.Option(envvar="DATABASE_URL", help="PostgreSQL, as a role that may read")],
) -> None:
    """Write an artifact's bytes to standard output, for example a patch: … | git apply. Exit code 1: there is none."""
    from controller.db import artifacts, pool

    try:
        with pool.open_pool(database_url, size=1, name="sisu-kodo-artifact") as db:
            content = artifacts.read(db, reference)
            listed = artifacts.below(db, reference) if content is None else ()
    except SisuError as e:
        typer.echo(f"artifact: {e}", err=True)
        raise typer.Exit(1) from None
    if content is not None:
        sys.stdout.buffer.write(content)
        return
    if not listed:
        typer.echo(f"artifact: {reference} is no reference that this database has, nor the beginning of one", err=True)
        raise typer.Exit(1)
    for uri, size in listed:
        typer.echo(f"{size:>10} {uri}")


@cli.command()
def orphans(
    cancel: Annotated[bool, typer.Option("--cancel", help="end them, as runs of deleted Intents")] = False,
) -> None:
    """List open runs whose Intent is gone: namespace, name, uid, phase. Settings come from the environment.

    Up to ten at once are taken for deletions, and canceled without being asked; more wait until somebody has looked.
    """
    from controller.roles import orphans as gone

    try:
        found = asyncio.run(gone.find(_settings(), cancel=cancel))
    except SisuError as e:
        typer.echo(f"orphans: {e}", err=True)
        raise typer.Exit(1) from None
    for row in found:
        typer.echo("{namespace} {name} {intent_id} {phase}".format(**row))
    typer.echo(f"{len(found)} runs without their Intent{', canceled' if cancel and found else ''}", err=True)


@cli.command("sandbox-pool")
def sandbox_pool(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE", help="one of SBX_KUBERNETES_TEMPLATES")],
    name: Annotated[str, typer.Option(help="of the two objects; default: TEMPLATE and the egress")] = "",
    replicas: Annotated[int, typer.Option(min=0, help="Pods that wait for a task")] = 2,
    egress: Annotated[Literal["None", "Public"], typer.Option(help="of the tasks that it serves")] = "None",
    cpu_millis: Annotated[int, typer.Option(min=1, help="limits of the tasks that it serves")] = Limits().cpu_millis,
    memory_mb: Annotated[int, typer.Option(min=1, metavar="MIB")] = Limits().memory_mb,
    disk_mb: Annotated[int, typer.Option(min=1, metavar="MIB")] = Limits().disk_mb,
) -> None:
    """Print a warm pool of agent-sandbox for `kubectl apply -f -`; needs SBX_KUBERNETES_CLAIMS=true. See docs/sandbox-pods.md.

    A pool serves the tasks whose image, limits and egress are exactly its own. Print it again after an upgrade.
    """
    from controller import main
    from controller.sbx import kubernetes_claims, kubernetes_pod

    settings = _settings()
    image = settings.kubernetes_templates.get(template)
    if image is None:
        known = ", ".join(sorted(settings.kubernetes_templates)) or "nothing"
        typer.echo(f"sandbox-pool: {template!r} is unknown; SBX_KUBERNETES_TEMPLATES has: {known}", err=True)
        raise typer.Exit(2)
    limits = Limits(cpu_millis=cpu_millis, memory_mb=memory_mb, disk_mb=disk_mb)
    pods = main.pod_settings(settings)
    pod = kubernetes_pod.template(limits, Egress(mode=egress), image=image, settings=pods)
    name = name or f"{template}-{egress.lower()}"
    objects = kubernetes_claims.pool(name, pod, settings=pods, replicas=replicas)
    typer.echo(yaml.safe_dump_all(objects, sort_keys=False), nl=False)


if __name__ == "__main__":
    cli()
