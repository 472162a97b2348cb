"""One PostgreSQL for all integration tests; each module has a migrated database of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.db.migrate import migrate
from devcluster import node
from devcluster.install import apply_chart
from devcluster.node import NodeCluster
from devcluster.postgres import Postgres
from tests.support import agent_sandbox
from tests.support.sandbox_kit import open_directory


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The server; its data goes with the test session."""
    server = Postgres(tmp_path_factory.mktemp("postgres"), fsync=False)
    try:
        with server:
            yield server
    finally:
        server.wipe()


@pytest.fixture(scope="module")
def database(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """URL of a migrated database that only this module uses."""
    url = postgres.create_database(f"db_{request.module.__name__.rpartition('.')[2]}"[:60])
    migrate(url)
    return url


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that sandboxes of other users can pass."""
    path = open_directory()
    yield path
    # A relapse may have left what an ordinary removal cannot remove.
    subprocess.run(["chmod", "-R", "u+rwx", str(path)], check=False)
    subprocess.run(["rm", "-rf", str(path)], check=True)


@pytest.fixture(scope="session")
def sandbox_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """A control plane, one real node, and the chart's objects for sandboxes that are Pods. Skips aloud where no node can be had."""
    if reason := node.missing():
        pytest.skip(f"no node: {reason}")
    cluster = NodeCluster(tmp_path_factory.mktemp("node"))
    try:
        with cluster:
            apply_chart(cluster.control_plane, sets=("sandbox.provider=kubernetes",))
            yield cluster
    finally:
        cluster.wipe()


@pytest.fixture(scope="session")
def warm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    """As `sandbox_cluster`, with agent-sandbox. Skips aloud where it cannot be had."""
    if reason := node.missing() or agent_sandbox.missing():
        pytest.skip(f"no claims: {reason}")
    cluster = NodeCluster(tmp_path_factory.mktemp("warm-node"))
    try:
        with cluster, agent_sandbox.running(cluster.control_plane, tmp_path_factory.mktemp("agent-sandbox")):
            apply_chart(cluster.control_plane, sets=("sandbox.provider=kubernetes", "sandbox.kubernetes.claims=true"))
            yield cluster
    finally:
        cluster.wipe()
