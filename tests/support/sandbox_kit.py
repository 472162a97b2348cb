"""Sandbox providers as tests use them: the real ones on what they need, each with short ways to run a task and look at the outcome."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, FileIn, Limits, SBXReq, SBXRes
from controller.core.model import Artifact, Chunk, Owner
from controller.ports import SandboxProvider
from controller.sbx import kubernetes_claims, kubernetes_pod, templates
from controller.sbx.e2b import E2BProvider
from controller.sbx.e2b_api import Account
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_api import Bounds
from controller.sbx.kubernetes_canary import API_SERVER, OFF
from controller.sbx.kubernetes_pod import PodSettings
from controller.sbx.limits import CgroupTree
from controller.sbx.local import LocalProvider
from devcluster.e2b.api import Server, application
from devcluster.e2b.host import Host
from devcluster.node import NodeCluster
from tests.support.pods_server import IMAGE, NAMESPACE, PodsServer

STORE = "store-1"
FENCES = count(1)
OUTPUT_LIMIT = 100_000
SANDBOXES = "sisu-kodo-sandboxes"
BOUNDS = Bounds(api=1.5, tool=5.0, probe=0.4, busy=4.0, grace=0.8, reason=0.8, gone=1.0, sweeps=(0.3, 0.5, 1.0, 2.0))
PODS = PodSettings(namespace=NAMESPACE, boot=2.0, canary=OFF)  # one command less to be counted
REAL = ("local", "e2b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kubernetes", "claims")))
POD_LIMITS = Limits(cpu_millis=400, memory_mb=128)  # several must fit on a node of two cores


@dataclass(kw_only=True)
class Outcome:
    """Everything that one run gave back."""

    res: SBXRes
    artifacts: Sequence[Artifact]
    chunks: list[Chunk]
    seconds: float

    def text(self, kind: str) -> str:
        return b"".join(chunk.data for chunk in self.chunks if chunk.kind == kind).decode(errors="replace")


@dataclass(kw_only=True)
class Kit:
    """A provider and short ways to use it."""

    provider: SandboxProvider
    start_log: Path
    template: str = "base"
    real: bool = True
    limits: Limits = field(default_factory=Limits)
    live: list[Chunk] = field(default_factory=list)

    def request(self, cmd: str, **changes: Any) -> SBXReq:
        values: dict[str, Any] = {
            "intent_id": "i",
            "run_id": "r",
            "step_id": "ExecuteST",
            "task_id": "t",
            "generation": 1,
        }
        values |= {"cmd": cmd, "files_in": (), "env": {}}
        values["env_ref"] = changes.get("env_ref") or self.provider.resolve(self.template)
        values |= {"workdir": "/workspace", "timeout_ms": 20_000, "limits": self.limits, "egress": Egress()}
        return SBXReq(**(values | changes))

    def owner(self, *, attempt: int = 1, store: str = STORE) -> Owner:
        return Owner(store_id=store, run_id="r", task_key="k" * 64, attempt=attempt, fence=next(FENCES))

    def run(
        self,
        cmd: str,
        *,
        owner: Owner | None = None,
        files: Mapping[str, bytes] | None = None,
        canceled: Callable[[], bool] = lambda: False,
        **changes: Any,
    ) -> Outcome:
        chunks: list[Chunk] = []
        started = time.monotonic()
        res, artifacts = self.provider.run(
            self.request(cmd, **changes),
            owner=owner or self.owner(),
            files=files or {},
            emit=lambda chunk: (chunks.append(chunk), self.live.append(chunk))[0],  # type: ignore[func-returns-value]
            canceled=canceled,
        )
        return Outcome(res=res, artifacts=artifacts, chunks=chunks, seconds=time.monotonic() - started)

    def begin(self, cmd: str, **options: Any) -> Callable[[], Outcome]:
        """Runs in another thread; the answer waits for its outcome."""
        found: list[Outcome] = []
        thread = threading.Thread(target=lambda: found.append(self.run(cmd, **options)))
        thread.start()

        def join() -> Outcome:
            thread.join(30)
            assert found, "the run did not end"
            return found[0]

        return join


def eventually(check: Callable[[], Any], *, seconds: float = 5.0) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.01)
    return answer


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def upload(*parts: tuple[str, bytes]) -> dict[str, Any]:
    """files_in and files for run()."""
    hashed = [(kind, hashlib.sha256(content).hexdigest(), content) for kind, content in parts]
    names = tuple(FileIn(kind=kind, sha256=sha) for kind, sha, _ in hashed)
    return {"files_in": names, "files": {sha: content for _, sha, content in hashed}}


def open_directory() -> Path:
    """pytest's own tmp_path is closed to other users; the outer uid of a sandbox must be able to pass."""
    path = Path(tempfile.mkdtemp(prefix="sisu-kodo-test-"))
    path.chmod(0o711)
    return path


@contextmanager
def e2b_kit(root: Path, **options: Any) -> Iterator[tuple[Kit, Server]]:
    """The e2b provider, the unmodified SDK, and the local server behind it."""
    cgroups = f"sisu-kodo-e2b-{os.getpid()}"
    host = Host(root / "state", templates={"tmplbase": templates.base()}, cgroups=cgroups)
    try:
        with Server(application(host, key="e2b_test", page=2)) as server:
            account = Account(key="e2b_test", domain="e2b.invalid", api_url=server.url, sandbox_url=server.url)
            provider = E2BProvider(
                account,
                templates={"base": "tmplbase"},
                start_log=root / "starts",
                output_limit=OUTPUT_LIMIT,
                **options,
            )
            yield Kit(provider=provider, start_log=root / "starts"), server
            assert server.host.sandboxes == {}, "no box is left on the server"
            provider.close()
        assert list((root / "state" / "boxes").iterdir()) == []
    finally:
        for directory in CgroupTree.find(parent=cgroups).roots:
            directory.rmdir()


@contextmanager
def node_kit(
    cluster: NodeCluster, root: Path, *, claims: bool = False, canary: str = API_SERVER, **options: Any
) -> Iterator[Kit]:
    """The kubernetes provider with the rights that the chart gives it, and real Pods. At the end there is none."""
    provider = KubernetesProvider(
        cluster.kubeconfig("controller"),
        templates={"base": cluster.image("python")},
        pods=PodSettings(namespace=SANDBOXES, boot=60, claims=claims, canary=canary),
        start_log=root / "starts",
        **{"output_limit": OUTPUT_LIMIT, "bounds": Bounds(grace=1.0), **options},
    )
    yield Kit(provider=provider, start_log=root / "starts", limits=POD_LIMITS)
    provider.close()
    kind = "sandboxclaims" if claims else "pods"
    assert cluster.kubectl("get", kind, "-n", SANDBOXES, "-o", "name").stdout == ""


def give_pool(cluster: NodeCluster, *, replicas: int, **changes: Any) -> None:
    """A warm pool for POD_LIMITS, as `sandbox-pool` prints it but for `changes`; returns when its Pods wait."""
    pods = PodSettings(namespace=SANDBOXES)
    pod = kubernetes_pod.template(POD_LIMITS, Egress(), image=cluster.image("python"), settings=pods)
    pod["spec"] |= changes
    objects = kubernetes_claims.pool("warm", pod, settings=pods, replicas=replicas)
    cluster.kubectl("apply", "-f", "-", stdin="---\n".join(map(json.dumps, objects)))
    look = (
        "get",
        "sandboxes",
        "-n",
        SANDBOXES,
        "-o",
        "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}",
    )
    eventually(lambda: cluster.kubectl(*look).stdout.split().count("True") == replicas, seconds=60)


@contextmanager
def local_kit(root: Path) -> Iterator[Kit]:
    """The local provider. At the end no box is left."""
    provider = LocalProvider(
        state_root=root / "state", start_log=root / "starts", output_limit=OUTPUT_LIMIT, grace_seconds=0.5
    )
    yield Kit(provider=provider, start_log=root / "starts")
    provider.close()
    assert list((root / "state" / "boxes").iterdir()) == []


@contextmanager
def pods_kit(root: Path, *, pods: PodSettings = PODS, **options: Any) -> Iterator[tuple[Kit, PodsServer]]:
    """The provider and the server that it talks to. At the end there is no Pod."""
    cgroups = f"sisu-kodo-pods-{os.getpid()}"
    try:
        with PodsServer(root, cgroups=cgroups) as server:
            provider = KubernetesProvider(
                server.kubeconfig,
                templates={"base": IMAGE},
                pods=pods,
                start_log=root / "starts",
                output_limit=OUTPUT_LIMIT,
                bounds=BOUNDS,
                **options,
            )
            yield Kit(provider=provider, start_log=root / "starts"), server
            server.plan.clear()
            eventually(lambda: not server.pods and not server.claims, seconds=10)
            provider.close()
    finally:
        for directory in CgroupTree.find(parent=cgroups).roots:
            directory.rmdir()


@contextmanager
def real_kit(name: str, root: Path, request: pytest.FixtureRequest) -> Iterator[Kit]:
    """One of REAL."""
    if name == "local":
        with local_kit(root) as found:
            yield found
    elif name == "e2b":
        with e2b_kit(root) as (found, _):
            yield found
    elif name == "kubernetes":
        with node_kit(request.getfixturevalue("sandbox_cluster"), root) as found:
            yield found
    else:
        give_pool(warm := request.getfixturevalue("warm_cluster"), replicas=1)
        with node_kit(warm, root, claims=True) as found:
            yield found
