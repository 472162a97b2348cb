"""python -m devcluster.e2b: the server by hand, until Ctrl-C. Loopback only."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from aiohttp import web

from controller.sbx import templates
from devcluster.e2b.api import application
from devcluster.e2b.host import Host
from devcluster.sandbox_python import toolchain


def serve(
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 0,
    port_file: Annotated[Path | None, typer.Option(help="gets the port that was taken")] = None,
    root: Annotated[Path, typer.Option(help="where boxes keep their files")] = Path("/tmp/sisu-kodo-e2b"),
    key: Annotated[str, typer.Option(help="the API key; random when absent")] = "",
    limit: Annotated[int, typer.Option(help="boxes at once")] = 20,
) -> None:
    """Templates: tmplbase (the host's /usr) and tmplpython (the locked toolchain)."""
    offered = {"tmplbase": templates.base(), "tmplpython": templates.load(toolchain())}
    key = key or f"e2b_{secrets.token_hex(20)}"

    def ready(taken: int) -> None:
        if port_file is not None:
            port_file.write_text(f"{taken}\n")
        url = f"http://127.0.0.1:{taken}"
        print(f"SBX_MODE=live SBX_PROVIDER=e2b E2B_API_KEY={key} E2B_API_URL={url} E2B_SANDBOX_URL={url}")
        print("SBX_E2B_TEMPLATES=base=tmplbase,python=tmplpython", flush=True)

    asyncio.run(_serve(application(Host(root, templates=offered, limit=limit), key=key), port, ready))


async def _serve(app: web.Application, port: int, ready: Callable[[int], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    ready(runner.addresses[0][1])
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    typer.run(serve)
