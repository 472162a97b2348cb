"""`make up` and `make down` as a person uses them: the cluster stays, the controller works with real sandboxes, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.stack import ROOT, Stack
from tests.e2e.product import Product


def devcluster(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`python -m devcluster ARGS --state STATE`, without a database of somebody else's."""
    env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "devcluster", *args, "--state", str(state)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A state directory below one that other users cannot enter, as root's home is."""
    tmp_path.chmod(0o700)
    state = tmp_path / "state"
    yield state
    devcluster(state, "down", "--wipe")


def test_up_runs_an_intent_in_a_real_sandbox_and_down_leaves_nothing(home: Path) -> None:
    up = devcluster(home, "up", "--no-fsync")
    assert up.returncode == 0, up.stderr
    product = Product(Stack(home, detach=True), name="default", title="up")
    product.apply("hello", "say hello")
    product.wait_phase("hello", "WaitingInput")
    product.vote("hello")
    done = product.wait_phase("hello", "Succeeded", "Failed")
    assert done["phase"] == "Succeeded", json.dumps(done)

    place = Stack(home).sandboxes()
    assert place.is_dir(), "the sandbox had its files here"
    down = devcluster(home, "down", "--wipe")
    assert down.returncode == 0, down.stderr
    assert "controller" in down.stderr
    assert not place.exists()
    assert [path.name for path in home.iterdir()] == ["lock"]
