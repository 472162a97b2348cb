"""Both soaks as people run them: the commands end with 0, and their JSON says what was looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from devcluster import node
from devcluster.stack import ROOT


def soak(to: Path, *args: str) -> list[dict[str, Any]]:
    """The parts of the verdict. Fails with all that the command said."""
    command = [sys.executable, "-m", "devcluster.soak", *args, "--json", str(to)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    body = json.loads(to.read_text())
    assert body["violations"] == 0
    parts: list[dict[str, Any]] = body["parts"]
    for part in parts:
        assert all(one["looked_at"] and not one["violations"] for one in part["checks"])
    return parts


def looked_at(part: dict[str, Any], check: str) -> int:
    """How many rows."""
    return int(next(one["looked_at"] for one in part["checks"] if one["name"] == check))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_tasks_count_once_while_workers_are_killed(tmp_path: Path) -> None:
    (part,) = soak(tmp_path / "verdict.json", "fanout", "--kills", "2")
    assert looked_at(part, "one outcome accepted per task") == 1000
    assert looked_at(part, "start log: every start is a journaled attempt") >= 1000
    assert Counter(part["faults"]) == {"a worker is killed": 2, "a worker's lease is taken from it": 1}
    assert part["figures"]["attempts that did not count"][0] > 0, "the kills hit something"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_real_sandboxes_count_once_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    parts = soak(tmp_path / "verdict.json", "sandbox", "--tasks", "60", "--kills", "2", "--stops", "1")
    assert [part["name"] for part in parts] == ["local", "e2b"]
    for part in parts:
        assert looked_at(part, "mixed: one outcome accepted per task") == 60
        assert looked_at(part, "canceled: shown as Canceled when nothing of it was left") == 1
        assert part["figures"]["attempts that did not count"][0] > 0
    assert "E2B is restarted" in parts[1]["faults"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pods_count_once_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    if reason := node.missing():
        pytest.skip(f"no node: {reason}")
    args = ("--provider", "kubernetes", "--tasks", "24", "--kills", "1", "--stops", "0")
    (part,) = soak(tmp_path / "verdict.json", "sandbox", *args)
    assert looked_at(part, "mixed: one outcome accepted per task") == 24
    assert looked_at(part, "no sandbox lived on beside the start of a newer one") > 0, "Pods were seen"
    assert part["figures"]["attempts that did not count"][0] > 0
