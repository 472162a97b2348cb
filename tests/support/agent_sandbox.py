"""The real agent-sandbox beside a control plane, from a checkout of kubernetes-sigs/agent-sandbox that AGENT_SANDBOX_SOURCE names.

Its module cannot be had from every Go proxy, and we keep no copy of it; so without the variable its tests are skipped, aloud.
`python -m tests.support.agent_sandbox` builds it, which takes longer than a test may: `make full` does that first.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from devcluster.cache import cache_dir, locked
from devcluster.cluster import ControlPlane
from devcluster.install import wait_established
from devcluster.processes import spawn, wait_ready
from devcluster.toolchain import find_go

VARIABLE = "AGENT_SANDBOX_SOURCE"
PACKAGE = "./cmd/agent-sandbox-controller"
CRDS = (
    "sandboxes.agents.x-k8s.io",
    *(f"{kind}.extensions.agents.x-k8s.io" for kind in ("sandboxclaims", "sandboxtemplates", "sandboxwarmpools")),
)


def missing() -> str | None:
    """Why there is none, or None."""
    source = os.environ.get(VARIABLE, "")
    if not source:
        return f"{VARIABLE} names no checkout of kubernetes-sigs/agent-sandbox"
    if not (Path(source) / PACKAGE).is_dir():
        return f"{VARIABLE}={source} is no checkout of agent-sandbox"
    return (
        None if _binary(Path(source)).exists() else "agent-sandbox is not built: python -m tests.support.agent_sandbox"
    )


@contextmanager
def running(cluster: ControlPlane, folder: Path) -> Iterator[None]:
    """Its kinds and its controller, as a process of ours with the administrator's rights; ends with the context."""
    source = Path(os.environ[VARIABLE]).absolute()
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=_kinds(source))
    wait_established(cluster, CRDS)
    log = folder / "agent-sandbox.log"
    command: list[str | Path] = [_binary(source), "--extensions", "--leader-elect=false", "--enable-webhook=false"]
    command += ["--metrics-bind-address=127.0.0.1:0", "--health-probe-bind-address=127.0.0.1:0"]
    command += ["--kubeconfig", cluster.kubeconfig("admin")]
    child = spawn("agent-sandbox", command, log=log, detach=False, cwd=folder)
    try:
        started = "Starting workers"  # of each of its four controllers
        wait_ready(child, lambda: log.exists() and log.read_text().count(started) >= 4, log=log, timeout=60)
        yield
    finally:
        child.stop()


def build() -> None:
    """Builds it, once for each version; does nothing without a checkout."""
    if not (source := os.environ.get(VARIABLE, "")):
        return
    path = _binary(Path(source))
    with locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local"}
            scratch = path.with_name(f"{path.name}.building")
            command: list[str | Path] = [find_go(), "build", "-trimpath", "-buildvcs=false", "-o", scratch, PACKAGE]
            subprocess.run(command, cwd=source, env=env, check=True)
            scratch.rename(path)


def _binary(source: Path) -> Path:
    command: list[str | Path] = ["git", "-C", source, "describe", "--always", "--dirty", "--abbrev=40"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return cache_dir() / "agent-sandbox" / version


def _kinds(source: Path) -> str:
    """Its CRDs. Nobody serves their conversion here, and only v1beta1 is used."""
    kinds = [yaml.safe_load(path.read_text()) for path in sorted((source / "k8s" / "crds").glob("*.yaml"))]
    for kind in kinds:
        kind["spec"]["conversion"] = {"strategy": "None"}
    return yaml.safe_dump_all(kinds)


if __name__ == "__main__":
    build()
