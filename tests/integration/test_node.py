"""A real node: what runs on it behaves as Kubernetes says, nothing gets out of it, and nothing of it stays on the host.

It needs root; the first run on a machine builds the kubelet and fetches Debian packages, which takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devcluster.node import NodeCluster, images, missing
from devcluster.stack import Stack, scratch
from tests.support import host_state

REPO = Path(__file__).parents[2]
SECONDS = 60.0
REASON = missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(REASON is not None, reason=f"a real node is NOT tested: {REASON}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeCluster]:
    with NodeCluster(tmp_path_factory.mktemp("node")) as running:
        yield running


def eventually(true: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def manifest(cluster: NodeCluster, name: str, *command: str, **spec: object) -> dict[str, Any]:
    """A Pod as strict as the `restricted` standard and a read-only root allow."""
    container = {
        "name": "main",
        "image": cluster.image("python"),
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "resources": {"limits": {"memory": "128Mi", "cpu": "1"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "work", "mountPath": "/work"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "work", "emptyDir": {}}],
            **spec,
        },
    }


@contextmanager
def pod(cluster: NodeCluster, name: str, *command: str, **spec: object) -> Iterator[str]:
    """A Pod that has been created, gone at the end."""
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(manifest(cluster, name, *command, **spec)))
    try:
        yield name
    finally:
        cluster.kubectl("delete", "pod", name, "--grace-period=0", "--force", "--ignore-not-found")


@contextmanager
def running(cluster: NodeCluster, name: str, *command: str) -> Iterator[str]:
    """A Pod that runs."""
    with pod(cluster, name, *(command or ("sleep", "600"))) as created:
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{created}", "--timeout=60s")
        yield created


def status(cluster: NodeCluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("get", "pod", name, "-o", "json").stdout)["status"]
    return found


def ended(cluster: NodeCluster, name: str) -> dict[str, Any]:
    """The status of a Pod that has come to its end."""
    eventually(lambda: status(cluster, name)["phase"] in {"Succeeded", "Failed"}, f"{name} ends")
    return status(cluster, name)


def of_node(cluster: NodeCluster) -> dict[str, str]:
    """The node's name on the host and its address."""
    found: dict[str, str] = json.loads((cluster.node.home / "keeper.json").read_text())
    return found


def test_the_node_is_ready_and_anonymous_callers_are_not_heard(cluster: NodeCluster) -> None:
    (node,) = json.loads(cluster.kubectl("get", "nodes", "-o", "json").stdout)["items"]
    assert {c["type"]: c["status"] for c in node["status"]["conditions"]}["Ready"] == "True"
    assert node["status"]["nodeInfo"]["kubeletVersion"] == "v1.36.3"
    context = ssl.create_default_context(cafile=str(cluster.control_plane.state / "pki" / "node-ca.crt"))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"https://{of_node(cluster)['address']}:10250/pods", context=context)


def test_a_strict_pod_runs_by_digest_without_a_registry(cluster: NodeCluster) -> None:
    script = (
        "id -u; touch /x 2>/dev/null || echo read-only; touch /work/x && echo writable; grep NoNewPrivs /proc/1/status"
    )
    with pod(
        cluster, "strict", "sh", "-c", f"{script}; TMPDIR=/work python3 -m pytest --version; git --version"
    ) as name:
        done = ended(cluster, name)
        said = cluster.kubectl("logs", name).stdout
    assert done["phase"] == "Succeeded", said
    assert done["containerStatuses"][0]["imageID"] == cluster.image("python")
    lines = said.split("\n")
    assert lines[:4] == ["1000", "read-only", "writable", "NoNewPrivs:\t1"]
    assert lines[4].startswith("pytest 7") and lines[5].startswith("git version")


def test_an_image_that_is_not_there_is_not_found_anywhere(cluster: NodeCluster) -> None:
    body = manifest(cluster, "absent", "true")
    body["spec"]["containers"][0]["image"] = "localhost/sisu-kodo/python@sha256:" + "0" * 64
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(body))
    try:
        eventually(lambda: "ImagePull" in json.dumps(status(cluster, "absent")), "the kubelet gives up")
    finally:
        cluster.kubectl("delete", "pod", "absent", "--grace-period=0", "--force")


def test_exec_gives_exit_codes_and_keeps_the_streams_apart(cluster: NodeCluster) -> None:
    with running(cluster, "streams") as name:
        done = cluster.kubectl("exec", name, "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
        assert (done.returncode, done.stdout) == (7, "out\n")
        assert done.stderr.splitlines()[0] == "err"
        echoed = cluster.kubectl("exec", "-i", name, "--", "cat", stdin="through and back\n")
        assert echoed.stdout == "through and back\n"

        slow: list[str | Path] = [
            cluster.control_plane.kcp,
            "kubectl",
            "--kubeconfig",
            cluster.kubeconfig("admin"),
            "exec",
            name,
            "--",
        ]
        slow += ["sh", "-c", "echo first; sleep 600"]
        with subprocess.Popen(slow, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "first\n", "a line arrives before the command has ended"
            child.kill()


def test_a_deadline_ends_a_pod(cluster: NodeCluster) -> None:
    with pod(cluster, "late", "sleep", "600", activeDeadlineSeconds=2, terminationGracePeriodSeconds=0) as name:
        done = ended(cluster, name)
    assert (done["phase"], done["reason"]) == ("Failed", "DeadlineExceeded")


def test_too_much_memory_is_a_kill_with_a_reason(cluster: NodeCluster) -> None:
    with pod(cluster, "greedy", "python3", "-c", "x = bytearray(400 * 2**20); print(len(x))") as name:
        state = ended(cluster, name)["containerStatuses"][0]["state"]["terminated"]
    assert (state["reason"], state["exitCode"]) == ("OOMKilled", 137)


def test_processes_are_counted(cluster: NodeCluster) -> None:
    fork = "for i in $(seq 600); do sleep 600 < /dev/null > /dev/null 2>&1 & done"
    with running(cluster, "many") as name:
        done = cluster.kubectl("exec", name, "--", "sh", "-c", fork, check=False)
    assert "Cannot fork" in done.stderr


def test_deletion_without_grace_ends_the_processes_at_once(cluster: NodeCluster) -> None:
    marker = f"{os.getpid()}6"
    with running(cluster, "gone", "sh", "-c", f"trap '' TERM; sleep {marker} & wait; sleep {marker}") as name:
        assert sleepers(marker)
        began = time.monotonic()
        cluster.kubectl("delete", "pod", name, "--grace-period=0", "--force")
        eventually(lambda: not sleepers(marker), "its processes are gone", 20.0)
    assert time.monotonic() - began < 20, "30 s of grace would have passed otherwise"


def sleepers(seconds: str) -> list[str]:
    """Processes `sleep SECONDS`, anywhere on the machine."""
    words = f"sleep\0{seconds}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found += [entry.name] if (entry / "cmdline").read_bytes() == words else []
        except OSError:
            continue
    return found


def test_no_way_leads_out_of_a_pod(cluster: NodeCluster) -> None:
    """Not to the host's loopback, its end of the link, the API server, the kubelet, or the Internet; only to other Pods."""
    address = of_node(cluster)["address"]
    host = address.rpartition(".")[0] + "." + str(int(address.rpartition(".")[2]) - 1)
    port = re.findall(r":(\d+)$", cluster.server)[0]
    with (
        socket.create_server(("0.0.0.0", 0)) as everywhere,
        running(cluster, "inmate"),
        running(cluster, "other", "python3", "-m", "http.server", "8000", "--directory", "/work"),
    ):
        outside = str(everywhere.getsockname()[1])
        targets = [("127.0.0.1", port), ("127.0.0.1", outside), (host, outside), (host, port), (address, "10250")]
        targets += [("10.244.0.1", "10250"), ("10.0.0.1", "443"), ("169.254.169.254", "80"), ("1.1.1.1", "443")]
        script = "exec 3<>/dev/tcp/$0/$1 && echo connected"
        # The node itself can, so a refusal says something about the Pod.
        for place in ((host, outside), ("127.0.0.1", port), (address, "10250")):
            assert "connected" in cluster.node.run("bash", "-c", script, *place)
        inside = ["exec", "inmate", "--", "timeout", "5", "bash", "-c", script]
        reached = [t for t in targets if "connected" in cluster.kubectl(*inside, *t, check=False).stdout]
        assert reached == []
        other = status(cluster, "other")["podIP"]
        eventually(
            lambda: "connected" in cluster.kubectl(*inside, other, "8000", check=False).stdout, "Pods reach each other"
        )


def test_a_kubelet_that_is_killed_leaves_pods_alone_and_comes_back(cluster: NodeCluster) -> None:
    with running(cluster, "survivor") as name:
        before = status(cluster, name)["containerStatuses"][0]["containerID"]
        first = cluster.pids()["kubelet"]
        cluster.kill_kubelet()
        assert not Path(f"/proc/{first}").exists()
        assert cluster.kubectl("exec", name, "--", "true", check=False).returncode != 0
        cluster.restart_kubelet()
        echo = ("exec", name, "--", "echo", "still here")
        eventually(
            lambda: cluster.kubectl(*echo, check=False).stdout == "still here\n", "the kubelet knows its Pods again"
        )
        assert status(cluster, name)["containerStatuses"][0]["containerID"] == before


def test_two_nodes_live_side_by_side(cluster: NodeCluster, tmp_path: Path) -> None:
    with NodeCluster(tmp_path) as second:
        assert of_node(cluster)["name"] != of_node(second)["name"]
        assert of_node(cluster)["address"] != of_node(second)["address"]
        for one in (cluster, second):
            with running(one, "twin") as name:
                assert one.kubectl("exec", name, "--", "echo", "here").stdout == "here\n"
        name = of_node(second)["name"]
    assert host_state.traces(name) == []
    with running(cluster, "still") as name:
        assert cluster.kubectl("exec", name, "--", "echo", "here").stdout == "here\n"


def test_the_host_is_afterwards_as_it_was(tmp_path: Path) -> None:
    machine = images.ensure().machine
    before, settings = host_state.facts(machine), host_state.settings()
    with NodeCluster(tmp_path) as cluster:
        name = of_node(cluster)["name"]
        assert len(host_state.traces(name)) > 2, "it is there, so its absence means something"
        with running(cluster, "guest"):
            assert changed(settings) == {}, "not even while it runs"
    assert changed(settings) == {}
    assert host_state.facts(machine) == before
    assert host_state.traces(name) == []
    assert host_state.processes_of(tmp_path) == []
    cluster.wipe()
    assert list(tmp_path.iterdir()) == []


def changed(before: dict[str, str]) -> dict[str, str | None]:
    """What the kernel's settings are now, where that is something else."""
    now = host_state.settings()
    return {key: now.get(key) for key, value in before.items() if now.get(key) != value}


STARTER = """
import pathlib, sys, time
from devcluster.node import NodeCluster
with NodeCluster(pathlib.Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


@contextmanager
def starter(state: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has started a node."""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", STARTER, str(state)]
    with subprocess.Popen(command, env=env, cwd="/", stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "up\n"
            yield child
        finally:
            child.kill()


def test_a_node_goes_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    with starter(tmp_path) as child:
        name = of_node(NodeCluster(tmp_path))["name"]
        assert host_state.traces(name)
        child.kill()
        child.wait()
        eventually(lambda: not host_state.traces(name), "link and cgroups are gone")
        eventually(lambda: host_state.processes_of(tmp_path) == [], "its processes are gone")


def test_what_a_killed_keeper_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with starter(tmp_path) as child:
        left = NodeCluster(tmp_path)
        name = of_node(left)["name"]
        for pid in (child.pid, left.node.children["keeper"].pid):
            os.kill(pid, signal.SIGSTOP)  # so that neither sees the other's end
        for pid in (left.node.children["keeper"].pid, child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()
        eventually(lambda: host_state.processes_of(tmp_path) == [], "its processes are gone")
        assert host_state.traces(name), "nobody was left to remove them"
        with NodeCluster(tmp_path) as again, running(again, "after") as pod_name:
            assert host_state.traces(name) == []
            assert again.kubectl("exec", pod_name, "--", "echo", "here").stdout == "here\n"


def devcluster(state: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`python -m devcluster ARGS --state STATE`, without a database of somebody else's."""
    env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "devcluster", *args, "--state", str(state)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_up_and_down_with_a_node(tmp_path: Path) -> None:
    quick = ("--no-chart", "--no-fsync")
    try:
        up = devcluster(tmp_path, "up", *quick, "--node")
        assert up.returncode == 0, up.stderr
        cluster = NodeCluster(tmp_path)
        name, pids = of_node(cluster)["name"], cluster.pids()
        assert f"image       {cluster.image('python')}\n" in up.stdout
        assert devcluster(tmp_path, "up", *quick, "--node").stderr.count("already running") == 3
        assert cluster.pids() == pids
        assert devcluster(tmp_path, "status").stdout.count("running") == 8, (
            "four, keeper, containerd, kubelet, PostgreSQL"
        )
        with running(cluster, "kept") as pod_name:
            assert cluster.kubectl("exec", pod_name, "--", "echo", "here").stdout == "here\n"
    finally:
        down = devcluster(tmp_path, "down")
    assert down.returncode == 0, down.stderr
    assert {"keeper", "containerd", "kubelet", "kube-scheduler"} <= set(re.split(r"[ ,\n]+", down.stderr))
    assert (host_state.traces(name), host_state.processes_of(tmp_path)) == ([], [])
    try:
        assert devcluster(tmp_path, "up", *quick).returncode == 0
        refused = devcluster(tmp_path, "up", *quick, "--node")
        assert refused.returncode == 1 and "runs without a node" in refused.stderr
    finally:
        assert devcluster(tmp_path, "down", "--wipe").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_stack_may_have_a_node() -> None:
    with scratch() as state:
        with Stack(state, fsync=False, node=True) as stack:
            name = json.loads((stack.machine.home / "keeper.json").read_text())["name"]
            assert stack.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").stdout == "node1"
            assert host_state.traces(name)
        assert (host_state.traces(name), host_state.processes_of(state)) == ([], [])
        assert not (state / "node").exists()
