"""The truth about this process on ADMIN_PORT: /healthz (should it be restarted?), /readyz (does it do its work?), /metrics."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

Check = Callable[[], str | None]


def app(*, alive: Mapping[str, Check], ready: Mapping[str, Check], collect: Callable[[], None]) -> FastAPI:
    """Each check returns None when fine, else what is wrong. `collect` refreshes gauges before they are read."""
    api = FastAPI(title="sisu-kodo admin", docs_url=None, redoc_url=None, openapi_url=None)

    def answer(checks: Mapping[str, Check]) -> JSONResponse:
        found = {name: check() for name, check in checks.items()}
        ok = all(wrong is None for wrong in found.values())
        return JSONResponse(
            {"status": "ok" if ok else "failing", "checks": {k: v or "ok" for k, v in found.items()}},
            status_code=200 if ok else 503,
        )

    @api.get("/healthz")
    def healthz() -> JSONResponse:
        return answer(alive)

    @api.get("/readyz")
    def readyz() -> JSONResponse:
        return answer({**alive, **ready})

    @api.get("/metrics")
    def metrics() -> Response:
        collect()
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return api


class AdminServer:
    """uvicorn in its own thread, so that it still answers when the main loop does not. Port 0 takes a free one."""

    def __init__(self, api: FastAPI, *, host: str, port: int) -> None:
        self._socket = socket.create_server((host, port))
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(api, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()

    def _run(self) -> None:
        # Off the main thread uvicorn installs no signal handlers.
        asyncio.run(self._server.serve(sockets=[self._socket]))
