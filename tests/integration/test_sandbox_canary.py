"""The canary: what a Pod must not reach before its command begins. The script for real, and what the provider makes of it.

That NetworkPolicies hold it back, and how late, is in test_sandbox_network.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import ErrCode
from controller.sbx import kubernetes_canary
from controller.sbx.kubernetes_canary import API_SERVER, OFF, trial
from tests.support.pods_server import PodsServer
from tests.support.sandbox_kit import PODS, Kit, archive, pods_kit, upload

NOT_HELD = json.dumps(
    {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [{"reason": "ExitCode", "message": "1"}]}}
)


@contextlib.contextmanager
def listening(*, family: socket.AddressFamily = socket.AF_INET, silent: bool = False) -> Iterator[str]:
    """HOST:PORT of something that takes connections, and closes them at once unless it is silent."""
    with socket.create_server(("::1" if family is socket.AF_INET6 else "127.0.0.1", 0), family=family) as server:
        server.settimeout(0.1)
        kept, done = [], threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    kept.append(server.accept()[0])
                    if not silent:
                        kept.pop().close()

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = server.getsockname()[:2]
        yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        done.set()
        thread.join()
        for one in kept:
            one.close()


def tried(canary: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = trial(canary)
    assert script is not None
    command = ["/bin/sh", "-c", script]
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=False)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_canary, "PATIENCE", 1.0)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("silent", [False, True], ids=["closes", "silent"])
def test_what_takes_a_connection_is_reached(*, silent: bool) -> None:
    with listening(silent=silent) as place:
        done = tried(place)
    assert done.returncode == 1
    assert f"it still reaches {place}, which its egress does not allow" in done.stderr


@pytest.mark.usefixtures("hurried")
def test_the_address_that_the_kubelet_tells() -> None:
    with listening() as place:
        host, _, port = place.rpartition(":")
        env = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        assert tried(API_SERVER, **env).returncode == 1
    assert tried(API_SERVER, **env).returncode == 0
    missing = tried(API_SERVER)
    assert missing.returncode != 0 and "KUBERNETES_SERVICE_HOST" in missing.stderr


@pytest.mark.usefixtures("hurried")
def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with listening(family=socket.AF_INET6) as place:
        assert tried(place).returncode == 1
    assert tried(place).returncode == 0


def test_what_is_not_answered_is_out_of_reach() -> None:
    """A full backlog drops, as most network plugins do."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        started = time.monotonic()
        done = tried(f"127.0.0.1:{server.getsockname()[1]}")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5


def test_it_is_tried_until_the_walls_stand() -> None:
    """They come after 1.5 s."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(listening())
        done: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda: done.append(tried(place)))
        thread.start()
        time.sleep(1.5)
        assert thread.is_alive()
    thread.join()
    assert done[0].returncode == 0, done[0].stderr


def test_what_cannot_be_tried_is_not_held(tmp_path: Path) -> None:
    """For example an image without git."""
    (tmp_path / "git").write_text("#!/bin/sh\necho no such thing >&2; exit 127\n")
    (tmp_path / "git").chmod(0o755)
    done = tried("127.0.0.1:1", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 1 and "127.0.0.1:1 could not be tried: no such thing" in done.stderr


def test_a_canary_is_no_command(tmp_path: Path) -> None:
    tried(f"$(touch {tmp_path}/x)`touch {tmp_path}/y`;touch {tmp_path}/z:1")
    assert list(tmp_path.iterdir()) == []


def test_off_tries_nothing() -> None:
    assert trial(OFF) is None


# --------------------------------------------------------------------------- what the provider makes of it


@pytest.fixture
def both(root: Path) -> Iterator[tuple[Kit, PodsServer]]:
    with pods_kit(root, pods=replace(PODS, canary=API_SERVER)) as found:
        yield found


def test_a_held_pod_runs_its_task(both: tuple[Kit, PodsServer]) -> None:
    kit, _ = both
    out = kit.run("cat greeting", **upload(("archive", archive({"greeting": b"hello\n"}))))
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "hello\n")


@pytest.mark.parametrize("files", [{}, upload(("archive", archive({"greeting": b"hello\n"})))], ids=["bare", "files"])
def test_where_it_is_not_held_no_command_begins(both: tuple[Kit, PodsServer], files: dict[str, Any]) -> None:
    kit, server = both
    server.fail("exec", says=NOT_HELD, match="git ls-remote")
    out = kit.run("echo never", **files)
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.BOOT_FAIL, None, "")
    assert "the network of the Pod is not held" in out.res.stderr
    assert not kit.start_log.exists()


def test_a_pod_that_was_told_nothing_runs_nothing(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.told = {}
    out = kit.run("echo never")
    assert (out.res.err_code, out.res.stdout) == (ErrCode.BOOT_FAIL, "")
    assert "KUBERNETES_SERVICE_HOST" in out.res.stderr
