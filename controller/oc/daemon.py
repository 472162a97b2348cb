"""OpenCode's daemon as a child process: pinned version, a home of its own, a password, no network but the model's.

It works in one empty folder and reads no project configuration, so no repository can configure it (see SECURITY below).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from controller.core.errors import Permanent, Unavailable
from controller.oc.client import USER

START_SECONDS = 120.0  # 3 s on an idle machine, 30 s on a busy one
STOP_SECONDS = 5.0
# A request that arrives just as the port is bound is never answered: ask again soon, on a new connection.
PROBE_SECONDS = 0.8
PROBE_PAUSE = 0.1

OFFLINE: Mapping[str, str] = {
    "OPENCODE_DISABLE_PROJECT_CONFIG": "1",  # SECURITY: else the working folder's plugins run inside the daemon
    "OPENCODE_PURE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_SHARE": "1",
    "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    "OPENCODE_DISABLE_EXTERNAL_SKILLS": "1",
    "OPENCODE_DISABLE_CLAUDE_CODE": "1",
    "OPENCODE_DISABLE_EMBEDDED_WEB_UI": "1",
    "OPENCODE_DISABLE_TERMINAL_TITLE": "1",
    "OPENCODE_EXPERIMENTAL_DISABLE_FILEWATCHER": "1",
    "npm_config_registry": "http://127.0.0.1:9/",  # it would install a plugin package in the background
    "npm_config_fetch_retries": "0",
}


class Daemon:
    """`with Daemon(binary, root=…, config=…, version=…) as daemon: OpenCodeClient(daemon.base_url, password=daemon.password)`.

    `root` is a private folder for its state and log; `environ` holds what `config` reads by {env:NAME}, such as the model's key.
    """

    def __init__(
        self,
        binary: Path,
        *,
        root: Path,
        config: Path,
        version: str,
        environ: Mapping[str, str],
        port: int = 0,
        password: str | None = None,
    ) -> None:
        self._binary, self._root, self._config, self._version = binary, root, config, version
        self._environ = dict(environ)
        self.port = port or free_port()
        self.password = password or secrets.token_hex(16)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Where it listens: loopback only."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Start it and wait until it is healthy. Raises Unavailable, or Permanent when it is not the pinned version."""
        if self.pid is not None:
            return
        folders = {name: self._root / name.lower() for name in ("HOME", "DATA", "CONFIG", "STATE", "CACHE", "EMPTY")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        environ = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "HOME": str(folders["HOME"]),
            **{f"XDG_{name}_HOME": str(folders[name]) for name in ("DATA", "CONFIG", "STATE", "CACHE")},
            **self._environ,
            **OFFLINE,
            "OPENCODE_CONFIG": str(self._config),
            "OPENCODE_SERVER_USERNAME": USER,
            "OPENCODE_SERVER_PASSWORD": self.password,
        }
        command = [str(self._binary), "serve", "--hostname", "127.0.0.1", "--port", str(self.port), "--print-logs"]
        try:
            with (self._root / "opencode.log").open("ab") as log:
                self._child = subprocess.Popen(
                    command,
                    cwd=folders["EMPTY"],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as e:
            raise Permanent(f"{self._binary} cannot be started: {e}; install it by `python -m opencode.install`") from e
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._child is None or self._child.poll() is not None:
                raise Unavailable(f"OpenCode ended while it started; see {self._root / 'opencode.log'}")
            if (health := self.health()) is not None:
                if health.get("version") != self._version:
                    raise Permanent(
                        f"{self._binary} is OpenCode {health.get('version')}, but {self._version} is pinned"
                    )
                return
            time.sleep(PROBE_PAUSE)
        raise Unavailable(f"OpenCode was not healthy within {START_SECONDS:g} s; see {self._root / 'opencode.log'}")

    def health(self, *, seconds: float = PROBE_SECONDS) -> dict[str, Any] | None:
        """{healthy, version} as the daemon says, None when it does not answer in time. A busy daemon takes up to 3 s."""
        try:
            response = httpx.get(
                f"{self.base_url}/global/health", auth=(USER, self.password), timeout=seconds, trust_env=False
            )
            return dict(response.json()) if response.status_code == 200 else None
        except (httpx.HTTPError, json.JSONDecodeError):
            return None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for its process group when that was not enough for STOP_SECONDS."""
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def free_port() -> int:
    """A port that was free just now. OpenCode's own `--port 0` takes a fixed one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
