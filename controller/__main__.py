"""The command line: `python -m controller run | oc-daemon | migrate | artifact`. Exit codes: 0 fine, 2 bad configuration, 75 fenced off."""

from __future__ import annotations

import enum
import logging
import sys
from typing import Annotated

import typer

from controller import config, log
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


if __name__ == "__main__":
    cli()
