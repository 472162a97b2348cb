"""OpenCode's daemon as a child process: pinned version, a home of its own, a password, no network but the model's.

It works in one empty folder and reads no project configuration, so no repository can configure it (see SECURITY below).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from controller.core.errors import Permanent, Unavailable
from controller.oc.client import USER

STALL_MS = "20000"  # opencode.json: silence on the wire to the model, before and between its answer's pieces
START_SECONDS = 120.0  # 3 s on an idle machine, 30 s on a busy one
STOP_SECONDS = 5.0
# A request that arrives just as the port is bound is never answered: ask again soon, on a new connection.
PROBE_SECONDS = 0.8
PROBE_PAUSE = 0.1
LOG_BYTES = 8 * 1024 * 1024

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

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
    Start it from the main thread: the kernel ends it together with the thread that started it.
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

    @property
    def log(self) -> Path:
        """What it printed: warnings and errors."""
        return self._root / "opencode.log"

    def start(self) -> None:
        """Start it and wait until it is healthy. Raises Unavailable, or Permanent when it is not the pinned version."""
        if self.pid is not None:
            return
        self.launch()
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start it without waiting. Raises Permanent when the binary cannot be executed, or its folder not be written."""
        folders = self._folders()
        command = [str(self._binary), "serve", "--hostname", "127.0.0.1", "--port", str(self.port)]
        command += ["--print-logs", "--log-level", "WARN"]
        try:
            for folder in (self._root, *folders.values()):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.log.open("ab") as log:
                self._child = subprocess.Popen(
                    command,
                    cwd=folders["EMPTY"],
                    env=self._environment(folders),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_dies_with(os.getpid()),
                )
        except OSError as e:
            raise Permanent(f"OpenCode cannot be started: {self._binary} in {self._root}: {e}") from e

    def _environment(self, folders: Mapping[str, Path]) -> dict[str, str]:
        """All that the child gets: nothing is inherited."""
        return {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "HOME": str(folders["HOME"]),
            "TMPDIR": str(folders["TMP"]),
            **{f"XDG_{name}_HOME": str(folders[name]) for name in ("DATA", "CONFIG", "STATE", "CACHE")},
            "OC_STALL_MS": STALL_MS,
            **self._environ,
            **OFFLINE,
            "OPENCODE_CONFIG": str(self._config),
            "OPENCODE_SERVER_USERNAME": USER,
            "OPENCODE_SERVER_PASSWORD": self.password,
        }

    def _folders(self) -> dict[str, Path]:
        return {
            name: self._root / name.lower() for name in ("HOME", "DATA", "CONFIG", "STATE", "CACHE", "TMP", "EMPTY")
        }

    def forget(self) -> None:
        """Remove its home, sessions and all, and begin another log. Only while it does not run."""
        for folder in self._folders().values():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # none yet, or not writable, which launch() says better
            self.log.replace(self.log.with_suffix(".log.1"))

    def exit_code(self) -> int | None:
        """How the child that was started has ended (-9: by SIGKILL); None while it runs, or when none was started."""
        return None if self._child is None else self._child.poll()

    def rss_mb(self) -> int:
        """Resident memory of the child in MiB; 0 when it is gone."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
        return found[0] // 1024 if found else 0

    def shorten_log(self) -> None:
        """Empty the log when it is too long. The child appends, so it goes on at the beginning."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            os.truncate(self.log, 0)

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._child is None or self._child.poll() is not None:
                raise Unavailable(f"OpenCode ended while it started; see {self.log}")
            if (health := self.health()) is not None:
                if health.get("version") != self._version:
                    raise Permanent(
                        f"{self._binary} is OpenCode {health.get('version')}, but {self._version} is pinned"
                    )
                return
            time.sleep(PROBE_PAUSE)
        raise Unavailable(f"OpenCode was not healthy within {START_SECONDS:g} s; see {self.log}")

    def health(self, *, seconds: float = PROBE_SECONDS) -> dict[str, Any] | None:
        """{healthy, version} as the daemon says, None when it does not answer in time. A busy daemon takes up to 3 s."""
        try:
            response = httpx.get(
                f"{self.base_url}/global/health", auth=(USER, self.password), timeout=seconds, trust_env=False
            )
            return dict(response.json()) if response.status_code == 200 else None
        except (httpx.HTTPError, json.JSONDecodeError):
            return None

    def stop(self, *, seconds: float = STOP_SECONDS) -> int | None:
        """SIGTERM, and SIGKILL for its process group when that was not enough for so many seconds: stopped ones end, too.

        Returns how it ended, None when none was started.
        """
        child, self._child = self._child, None
        if child is None:
            return None
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return child.returncode

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _dies_with(parent: int) -> Callable[[], None]:
    def setup() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died before the setting took hold
            os._exit(1)

    return setup


def free_port() -> int:
    """A port that was free just now. OpenCode's own `--port 0` takes a fixed one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
