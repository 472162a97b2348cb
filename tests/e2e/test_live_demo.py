"""The main job with a live OpenCode daemon, whose model is scripted: the demo, and a recording that replays to the same plan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from devcluster import ocdaemon
from devcluster.demo import example
from devcluster.gitserver import GitServer
from devcluster.stack import ROOT, Stack
from opencode.scenarios import load
from opencode.scripted_model import ScriptedModel
from tests.e2e.product import Product
from tests.e2e.test_demo import left_behind, scratch

__all__ = ["scratch"]
pytestmark = pytest.mark.timeout(300)  # the daemon's start and first turn on a busy machine
GOAL = "median() is wrong for an even number of values"
HELLO = "say hello"
OURS = ("YES", "DATABASE_URL", "OC_MODE", "OC_FIXTURES", "OC_MODEL", "OC_MODEL_BASE_URL", "OC_MODEL_API_KEY")


@pytest.fixture(scope="module", autouse=True)
def _installed(opencode_binary: Path) -> None:
    """Without the daemon nothing here can be tested."""


def demo(root: Path, scratch: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`YES=1 make demo` without its set-up."""
    environ = {k: v for k, v in os.environ.items() if k not in OURS}
    environ |= {"YES": "1", "TMPDIR": str(scratch), "TERM": "dumb", "COLUMNS": "200", **more}
    command = [sys.executable, "-m", "devcluster.demo"]
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False, timeout=240)


def test_the_demo_with_a_live_daemon(repo_root: Path, scratch: Path) -> None:
    done = demo(repo_root, scratch, OC_MODE="live")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "model: scripted" in done.stdout and "OpenCode: live at http://127.0.0.1:" in done.stdout
    assert "after: 8 tests, 0 failures" in done.stdout and "test | 1 | 1 | 1" in done.stdout
    assert left_behind(scratch) == []
    scratch.rmdir()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"OC_MODE": "lively"}, "OC_MODE holds 'lively'; it may hold: replay, live, record"),
        ({"OC_MODE": "record"}, "OC_MODE=record needs OC_FIXTURES"),
        ({"OC_MODE": "live", "OC_MODEL_BASE_URL": "https://models.example/v1"}, "OC_MODEL is not set"),
    ],
)
def test_a_wrong_mode_ends_the_demo_before_anything_starts(
    repo_root: Path, scratch: Path, more: dict[str, str], says: str
) -> None:
    done = demo(repo_root, scratch, **more)
    assert done.returncode == 1 and f"demo: {says}" in done.stdout
    assert "control plane" not in done.stdout
    scratch.rmdir()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitServer]:
    root = tmp_path_factory.mktemp("repositories")
    example().make(root / "fix-median.git")
    with GitServer(root) as running:
        yield running


def planned(product: Product, server: GitServer) -> tuple[str, bytes]:
    """The demo's Intent: digest and patch of its plan."""
    source = {"git": {"url": server.url("fix-median.git"), "ref": "main"}}
    product.apply("fix-median", GOAL, workspace=source, sandbox={"template": "python"})
    digest = product.wait_phase("fix-median", "WaitingInput", "Failed", seconds=120)["plan"]["digest"]
    with psycopg.connect(product.database) as c:
        query = "SELECT b.content FROM app.artifacts a JOIN app.blobs b USING (sha256) WHERE a.name = 'patch.diff'"
        ((patch,),) = c.execute(query).fetchall()
    return str(digest), bytes(patch)


def test_a_recording_replays_to_the_same_digest(cluster: Stack, server: GitServer, tmp_path: Path) -> None:
    fixtures = {"OC_MODE": "record", "OC_FIXTURES": str(tmp_path / "turns")}
    with (
        Product(cluster, name="recorded", title="record") as first,
        ocdaemon.beside(tmp_path, fixtures) as settings,
    ):
        first.start(**settings)
        recorded = planned(first, server)
    turns = sorted(path.name for path in (tmp_path / "turns").iterdir())
    assert len(turns) == 2, "what it asks to see, and the plan"

    with Product(cluster, name="replayed", title="replay") as second:
        second.start(**{**fixtures, "OC_MODE": "replay"})
        assert planned(second, server) == recorded
    checkout = Path(__file__).parents[2] / "opencode" / "fixtures"
    assert set(turns) <= {path.name for path in checkout.iterdir()}, "the same turns as the checkout's"


@pytest.mark.slow
def test_up_with_a_provider_and_down_leaves_no_daemon(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def devcluster(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if k not in OURS} | {"PYTHONPATH": str(ROOT), **more}
        command = [sys.executable, "-m", "devcluster", *args, "--state", str(state)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=240)

    try:
        refused = devcluster("up", "--no-fsync", OC_MODE="live")
        assert refused.returncode == 1 and "`make up` needs OC_MODEL_BASE_URL" in refused.stderr
        with ScriptedModel(load()) as provider:
            up = devcluster("up", "--no-fsync", OC_MODE="live", **provider.environ())
            assert up.returncode == 0, up.stderr
            daemon = ocdaemon.running(state)
            assert daemon is not None and (state / ocdaemon.RECORD).stat().st_mode & 0o077 == 0
            assert daemon.settings["OPENCODE_SERVER_PASSWORD"] not in up.stdout + up.stderr
            product = Product(Stack(state, detach=True), name="default", title="up")
            product.apply("hello", HELLO)
            product.wait_phase("hello", "WaitingInput", seconds=90)
            assert len(provider.requests) == 1
        down = devcluster("down", "--wipe")
        assert down.returncode == 0 and "opencode" in down.stderr
        assert not daemon.child.alive() and [path.name for path in state.iterdir()] == ["lock"]
    finally:
        devcluster("down", "--wipe")
    assert left_behind(state) == [str(state / "lock")]
