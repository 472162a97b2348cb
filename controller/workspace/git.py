"""Runs git: an argument list, an environment of our own, bounded output, bounded time. Nothing else starts a process here.

The environment is built from nothing: no user's or system's configuration, no hooks, no prompts, no tracing, no other transport.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from controller.core.errors import Unavailable

MAX_STDERR = 8192
TICK = 0.1  # seconds between two looks at what a running fetch has written
CHUNK = 65536

# Always on. Values come from nowhere else: GIT_CONFIG_NOSYSTEM and an empty HOME leave no other configuration.
CONFIG: Mapping[str, str] = {
    "protocol.allow": "never",
    "protocol.https.allow": "always",
    "protocol.file.allow": "never",
    "protocol.ext.allow": "never",
    "http.followRedirects": "false",  # a redirect would carry the credentials, or lead inside the network
    "http.lowSpeedLimit": "1000",
    "http.lowSpeedTime": "30",
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.quotePath": "false",  # people read the patch; control characters in paths are refused elsewhere
    "core.packedGitWindowSize": "32m",
    "core.packedGitLimit": "256m",
    "core.bigFileThreshold": "128m",  # what is larger is not held in memory at once, where git can do without
    "pack.threads": "2",  # each takes address space, which is bounded
    "gc.auto": "0",
    "maintenance.auto": "false",
    "fetch.recurseSubmodules": "false",
    "fetch.writeCommitGraph": "false",
    "fetch.unpackLimit": "1",  # always a pack, so that its growth can be watched in one folder
    "tar.umask": "0022",
}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a command ended. `cut` says that it was stopped because it had more output than was wanted."""

    code: int
    out: bytes
    err: str
    cut: bool = False


class TimedOut(Unavailable):
    """git did not end in time and was killed."""


class Git:
    """One git executable with one home directory. `environ` may add proxies and certificate paths, nothing of git's own."""

    def __init__(self, home: Path, *, environ: Mapping[str, str] | None = None) -> None:
        found = shutil.which("git")
        if found is None:
            raise Unavailable("git is not on PATH: install git 2.39 or newer")
        self._git = found
        self._base = {
            **{k: v for k, v in (environ or {}).items() if not k.upper().startswith(("GIT_", "SSH_"))},
            "PATH": os.pathsep.join((str(Path(found).parent), os.defpath)),
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_LITERAL_PATHSPECS": "1",
        }

    def run(
        self,
        args: Sequence[str],
        *,
        max_output: int,
        seconds: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        config: Mapping[str, str] | None = None,
        memory_bytes: int | None = None,
        watch: Callable[[], None] | None = None,
        keep_open: int | None = None,
    ) -> Ran:
        """Run `git args`. Stops it at max_output bytes; raises TimedOut after `seconds`.

        `watch` is called every TICK and may raise to stop the command. `config` travels in the environment, so secrets
        stay out of the argument list. `keep_open` is a file descriptor that the command inherits.
        """
        settings = {**CONFIG, **(config or {})}
        environ = {**self._base, **(env or {}), **config_environ(settings), "GIT_ALLOW_PROTOCOL": allowed(settings)}
        child = subprocess.Popen(
            [self._git, *args],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            start_new_session=True,
            pass_fds=() if keep_open is None else (keep_open,),
        )
        try:
            _limit_memory(child, memory_bytes)
            out, err, cut = _Pump(child, stdin=stdin, max_output=max_output, watch=watch).run(
                until=time.monotonic() + seconds
            )
        except _TimeUpError:
            raise TimedOut(f"git {verb(args)} took longer than {seconds:g} s and was stopped") from None
        finally:
            _kill(child)
        return Ran(code=child.returncode, out=out, err=err.decode("utf-8", "replace").strip(), cut=cut)


def verb(args: Sequence[str]) -> str:
    """The subcommand, for messages: arguments may be hostile text."""
    return next((arg for arg in args if not arg.startswith("-")), "")


def allowed(settings: Mapping[str, str]) -> str:
    """The value of GIT_ALLOW_PROTOCOL that says the same as the `protocol.*.allow` settings."""
    names = (key.split(".")[1] for key, value in settings.items() if key.count(".") == 2 and value == "always")
    return ":".join(sorted(name for name in names if name in ("https", "http")))


def config_environ(settings: Mapping[str, str]) -> dict[str, str]:
    """Configuration as GIT_CONFIG_COUNT, GIT_CONFIG_KEY_n and GIT_CONFIG_VALUE_n."""
    environ = {"GIT_CONFIG_COUNT": str(len(settings))}
    for n, (key, value) in enumerate(settings.items()):
        environ |= {f"GIT_CONFIG_KEY_{n}": key, f"GIT_CONFIG_VALUE_{n}": value}
    return environ


class _TimeUpError(Exception):
    pass


class _Pump:
    """Feeds and drains one child without ever holding more than it may."""

    def __init__(
        self, child: subprocess.Popen[bytes], *, stdin: bytes, max_output: int, watch: Callable[[], None] | None
    ) -> None:
        self._child, self._left, self._max, self._watch = child, memoryview(stdin), max_output, watch
        self._out, self._err = bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()

    def run(self, *, until: float) -> tuple[bytes, bytes, bool]:
        child = self._child
        assert child.stdout is not None and child.stderr is not None
        with self._selector:
            self._register(child.stdout, selectors.EVENT_READ)
            self._register(child.stderr, selectors.EVENT_READ)
            if child.stdin is not None:
                self._register(child.stdin, selectors.EVENT_WRITE)
            while self._selector.get_map():
                if (left := until - time.monotonic()) <= 0:
                    raise _TimeUpError
                for key, _ in self._selector.select(min(left, TICK)):
                    self._turn(key.fileobj)
                if self._watch is not None:
                    self._watch()
                if len(self._out) > self._max:
                    return bytes(self._out[: self._max]), bytes(self._err), True
        try:
            child.wait(max(0.01, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise _TimeUpError from None
        return bytes(self._out), bytes(self._err), False

    def _register(self, stream: IO[bytes], event: int) -> None:
        os.set_blocking(stream.fileno(), False)
        self._selector.register(stream, event)

    def _turn(self, stream: object) -> None:
        if stream is self._child.stdin:
            self._feed()
            return
        source = self._child.stdout if stream is self._child.stdout else self._child.stderr
        assert source is not None
        data = os.read(source.fileno(), CHUNK)
        if not data:
            self._selector.unregister(source)
        elif source is self._child.stdout:
            self._out += data
        elif len(self._err) < MAX_STDERR:
            self._err += data[: MAX_STDERR - len(self._err)]

    def _feed(self) -> None:
        sink = self._child.stdin
        assert sink is not None
        try:
            self._left = self._left[os.write(sink.fileno(), self._left[:CHUNK]) :]
        except BrokenPipeError:  # it ended early; its exit code and stderr tell why
            self._left = self._left[:0]
        if not self._left:
            self._selector.unregister(sink)
            sink.close()


def _limit_memory(child: subprocess.Popen[bytes], most: int | None) -> None:
    """Cap the address space (Linux). From outside, because Python code between fork and exec is not safe with threads."""
    if most is not None and hasattr(resource, "prlimit"):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(child.pid, resource.RLIMIT_AS, (most, most))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and the helpers it started, for good."""
    if child.returncode is None:  # not reaped, so the number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    child.wait()
