"""devcluster/e2b as the unmodified SDK sees it, apart from our provider: what a person at a laptop would try."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2b import CommandExitException, Sandbox
from e2b.exceptions import (
    AuthenticationException,
    FileNotFoundException,
    RateLimitException,
    SandboxException,
    SandboxNotRunningException,
    TimeoutException,
)

from controller.sbx import templates
from controller.sbx.limits import CgroupTree
from devcluster.e2b.api import Server, application
from devcluster.e2b.host import Host
from tests.support.sandbox_kit import eventually

CGROUPS = f"sisu-kodo-e2b-server-{os.getpid()}"


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    host = Host(root / "state", templates={"tmplbase": templates.base()}, limit=2, cgroups=CGROUPS)
    with Server(application(host, key="right")) as found:
        yield found
    # An expired box is removed by a thread of its own.
    assert eventually(lambda: not list((root / "state" / "boxes").iterdir()), seconds=10)
    for directory in CgroupTree.find(parent=CGROUPS).roots:
        directory.rmdir()


def create(server: Server, **options: Any) -> Sandbox:
    values: dict[str, Any] = {"template": "tmplbase", "timeout": 60, "allow_internet_access": False, "retries": 0}
    values |= {"api_key": "right", "api_url": server.url, "sandbox_url": server.url}
    return Sandbox.create(**(values | options))


def test_what_create_refuses(server: Server) -> None:
    with pytest.raises(AuthenticationException):
        create(server, api_key="wrong")
    with pytest.raises(SandboxException, match="not found"):
        create(server, template="another")
    with pytest.raises(SandboxException, match="no network"):
        create(server, allow_internet_access=True)
    boxes = [create(server), create(server)]
    with pytest.raises(RateLimitException, match="maximum number"):
        create(server)
    assert [box.kill() for box in boxes] == [True, True]
    assert boxes[0].kill() is False
    create(server).kill()


def test_commands_and_files(server: Server) -> None:
    box = create(server, envs={"A": "a"})
    assert box.commands.run("echo $A $B; pwd", envs={"B": "b"}, cwd="/tmp").stdout == "a b\n/tmp\n"
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("echo out; echo err >&2; exit 7")
    assert (failed.value.exit_code, failed.value.stdout, failed.value.stderr) == (7, "out\n", "err\n")
    with pytest.raises(TimeoutException):
        box.commands.run("sleep 30", timeout=0.3)
    assert eventually(lambda: box.commands.list() == [])
    content = os.urandom(3 << 20)
    box.files.write("/tmp/a/b c", content, use_octet_stream=True)
    assert bytes(box.files.read("/tmp/a/b c", format="bytes")) == content
    with pytest.raises(FileNotFoundException):
        box.files.read("/tmp/none")
    assert len(box.commands.run("head -c 3000000 /dev/zero | tr '\\0' a").stdout) == 3_000_000


def test_a_box_ends_when_its_time_is_over(server: Server) -> None:
    box = create(server)
    assert box.is_running()
    box.set_timeout(1)
    running = box.commands.run("sleep 30", background=True, timeout=0)
    with pytest.raises(SandboxNotRunningException):
        running.wait()
    assert not box.is_running()
    assert server.host.sandboxes == {}


def test_by_hand(root: Path, repo_root: Path) -> None:
    """The command line: it tells where it is, serves, and leaves nothing when it is ended."""
    port = root / "port"
    argv = [sys.executable, "-m", "devcluster.e2b", "--port-file", str(port), "--root", str(root / "state")]
    with subprocess.Popen([*argv, "--key", "right"], cwd=repo_root, stdout=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: port.exists() and port.read_text(), seconds=60)
            url = f"http://127.0.0.1:{port.read_text().strip()}"
            box = Sandbox.create(
                "tmplpython", api_key="right", api_url=url, sandbox_url=url, allow_internet_access=False
            )
            assert "pytest" in box.commands.run("pytest --version").stdout
        finally:
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[0]
    assert (process.returncode, list((root / "state" / "boxes").iterdir())) == (0, [])
    assert f"E2B_API_URL={url}" in said and "SBX_E2B_TEMPLATES=base=tmplbase,python=tmplpython" in said
