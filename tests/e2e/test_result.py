"""What a run leaves, in the hands of whoever asked for it: the README's ways to the patch, and the list of everything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.demo import example
from devcluster.gitserver import GitServer
from devcluster.stack import ROOT
from tests.e2e.product import Product

GOAL = "median() is wrong for an even number of values"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[GitServer]:
    example().make(tmp_path / "repositories" / "fix-median.git")
    with GitServer(tmp_path / "repositories") as running:
        yield running


def artifact(product: Product, reference: str) -> subprocess.CompletedProcess[bytes]:
    environ = {"PATH": os.environ["PATH"], "DATABASE_URL": product.database, "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "controller", "artifact", reference]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False)


def applied(repository: GitServer, where: Path, patch: bytes) -> str:
    """What the checkout differs in after `git apply`."""
    subprocess.run(["git", "clone", "-q", repository.url("fix-median.git"), str(where)], check=True)
    subprocess.run(["git", "apply"], cwd=where, input=patch, check=True)
    return subprocess.run(["git", "diff"], cwd=where, capture_output=True, text=True, check=True).stdout


def test_the_patch_applies_to_ones_own_checkout(product: Product, repository: GitServer, tmp_path: Path) -> None:
    product.start(SBX_MODE="live")
    source = {"git": {"url": repository.url("fix-median.git"), "ref": "main"}}
    product.apply("fix-median", GOAL, workspace=source, sandbox={"template": "python"})
    product.wait_phase("fix-median", "WaitingInput", "Failed")
    product.vote("fix-median")
    done = product.wait_phase("fix-median", "Succeeded", "Failed", seconds=60)
    assert done["phase"] == "Succeeded"

    shown = product.kubectl(
        "get", "pa", product.approval_of("fix-median"), "-o", "jsonpath={.spec.plan.patch.diff}", user="carol"
    )
    reference = product.kubectl("get", "intent", "fix-median", "-o", "jsonpath={.status.result.patchRef}", user="carol")
    exact = artifact(product, reference)
    assert exact.returncode == 0 and exact.stdout == shown.encode()
    first = applied(repository, tmp_path / "first", shown.encode())
    assert "median" in first and first == applied(repository, tmp_path / "second", exact.stdout)

    listed = artifact(product, f"artifact://run/{done['runId']}").stdout.decode()
    assert f"{len(exact.stdout):>10} {reference}\n" in listed
    assert done["result"]["artifactIndexRef"] in listed and "/junit.xml" in listed


def test_no_such_artifact_is_a_clear_error(product: Product) -> None:
    found = artifact(product, "artifact://run/run-0/step/x/y")
    assert found.returncode == 1 and found.stdout == b""
    assert b"artifact: artifact://run/run-0/step/x/y is no reference that this database has" in found.stderr
