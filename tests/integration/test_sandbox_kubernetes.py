"""What the kubernetes provider promises beyond the common contract, on real Pods: hostile tasks, Pods that cannot be, and none left.

The node is devcluster's: cgroup v1, 512 processes per Pod, Pods without a route out, no enforcer of NetworkPolicies.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import ErrCode, Limits
from controller.core.model import Owner
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_api import Bounds
from controller.sbx.kubernetes_pod import PodSettings, name_of
from devcluster.node import NodeCluster
from tests.support.sandbox_kit import (
    SANDBOXES,
    STORE,
    Kit,
    archive,
    eventually,
    node_kit,
    upload,
)

pytestmark = pytest.mark.slow
SMALL = Limits(cpu_millis=400, memory_mb=64, disk_mb=32)


@pytest.fixture
def kit(sandbox_cluster: NodeCluster, root: Path) -> Iterator[Kit]:
    with node_kit(sandbox_cluster, root) as found:
        yield found


def another(cluster: NodeCluster, *, identity: str = "controller", image: str = "", **settings: Any) -> Kit:
    """A second provider on the same cluster."""
    bounds = settings.pop("bounds", Bounds(grace=1.0, busy=2.0))
    provider = KubernetesProvider(
        cluster.kubeconfig(identity),
        templates={"base": image or cluster.image("python")},
        pods=PodSettings(**{"namespace": SANDBOXES, "boot": 60, **settings}),
        bounds=bounds,
    )
    return Kit(provider=provider, start_log=Path("/nonexistent"), limits=SMALL)


# --------------------------------------------------------------------------- what a task is


def test_no_privilege_is_left(kit: Kit) -> None:
    out = kit.run(
        "grep -E '^(Cap|NoNewPrivs|Uid|Gid|Seccomp:)' /proc/self/status; unshare --user true && echo nested; ulimit -c"
    )
    lines = dict(line.split(":\t", 1) for line in out.res.stdout.splitlines() if ":\t" in line)
    assert {value for name, value in lines.items() if name.startswith("Cap")} == {"0" * 16}
    assert (lines["NoNewPrivs"], lines["Uid"].split()[0], lines["Gid"].split()[0]) == ("1", "1000", "1000")
    assert lines["Seccomp"] == "2" and "nested" not in out.res.stdout and out.res.stdout.endswith("\n0\n")


def test_only_its_own_places_are_writable(kit: Kit) -> None:
    out = kit.run(
        "for d in / /usr /etc /dev /proc /bin /var; do touch $d/x && echo $d; done;"
        ' touch /workspace/x /tmp/x /output/x "$HOME/x" && pwd'
    )
    assert (out.res.stdout, out.res.err_code) == ("/workspace\n", ErrCode.NONE)


def test_its_environment_holds_nothing_of_ours(kit: Kit) -> None:
    out = kit.run(
        "env | cut -d= -f1; cat /proc/1/environ | tr '\\0' '\\n' | cut -d= -f1; ls /var/run/secrets /run/secrets"
    )
    found = {name for name in out.res.stdout.split() if not name.startswith("KUBERNETES_")}
    assert found <= {"PATH", "HOME", "HOSTNAME", "TMPDIR", "PWD", "OLDPWD", "SISU_OUTPUT_DIR", "SHLVL", "_"}
    assert out.res.stderr.count("No such file") == 2, "no token"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("archive", b"not a tar"),
        ("archive", archive({"../escape": b"x"})),
        ("patch", b"--- a/no\n+++ b/no\n@@ -1 +1 @@\n-x\n+y\n"),
    ],
)
def test_what_does_not_unpack_or_apply_is_an_upload_failure(kit: Kit, kind: str, content: bytes) -> None:
    out = kit.run("echo never", **upload((kind, content)))
    assert out.res.err_code is ErrCode.UPLOAD_FAIL
    assert f"the {kind} could not be taken in" in out.res.stderr
    assert not kit.start_log.exists()


def test_a_working_directory_in_the_archive_and_one_that_is_not(kit: Kit) -> None:
    parts = upload(("archive", archive({"src/a b/x": b"x"})))
    assert kit.run("pwd", workdir="/workspace/src/a b", **parts).res.stdout == "/workspace/src/a b\n"
    out = kit.run("echo never", workdir="/workspace/elsewhere", **parts)
    assert out.res.err_code is ErrCode.BOOT_FAIL and "cannot be entered" in out.res.stderr


def test_a_big_archive_and_much_output_arrive_whole(kit: Kit) -> None:
    content = bytes(range(256)) * 40_000
    out = kit.run(
        "cat f > /output/f && head -c 3000000 f > /output/g && head -c 90000 f",
        **upload(("archive", archive({"f": content[:4_000_000], "rest": content}))),
    )
    assert out.res.err_code is ErrCode.NONE, out.res.stderr
    assert {a.name: a.content for a in out.artifacts} == {"f": content[:4_000_000], "g": content[:3_000_000]}
    assert b"".join(chunk.data for chunk in out.chunks) == content[:90_000]


def test_the_measures_are_of_the_whole_container(kit: Kit) -> None:
    out = kit.run("python3 -c 'x = bytearray(50 << 20); sum(range(2_000_000))'")
    assert (out.res.metrics.cpu_ms or 0) > 50 and (out.res.metrics.mem_peak_mb or 0) in range(50, 129)


# --------------------------------------------------------------------------- what a task can use up


@pytest.mark.timeout(240)
def test_many_files_are_stopped(kit: Kit) -> None:
    """The kubelet looks now and then, here after 10 to 70 s; until then the node's disk is what holds."""
    cmd = "i=0; while [ $i -lt 20 ]; do head -c 8M /dev/zero > $i; i=$((i+1)); done; sleep 150"
    out = kit.run(cmd, limits=SMALL, timeout_ms=180_000)
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, None)
    assert "killed: more than 32 MiB on disk" in out.res.stderr


# --------------------------------------------------------------------------- how a task ends


def test_what_a_task_orphans_is_buried(kit: Kit) -> None:
    """The Pod's first process reaps: else ten thousand short-lived orphans would use its processes up."""
    out = kit.run("for i in $(seq 600); do (true &); done; sleep 0.3; grep -l '^State:.Z' /proc/[0-9]*/status; true")
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, ""), out.res.stderr


@pytest.mark.parametrize("cmd", ["kill -KILL $PPID; sleep 1", "kill -KILL -1; sleep 1"])
def test_who_kills_its_own_shell_has_failed(kit: Kit, cmd: str) -> None:
    out = kit.run(cmd)
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, 137)


def test_a_task_cannot_free_itself_of_its_time_limit(kit: Kit) -> None:
    """It kills our shells and `timeout`: that is its end, and what it leaves dies before outputs are fetched."""
    kill = "for p in $(grep -lE '^Name:.(timeout|sh)$' /proc/[0-9]*/status | cut -d/ -f3); do [ $p = 1 ] || kill -KILL $p; done"
    stays = "(trap '' TERM HUP; sleep 600; echo never > /output/x) > /dev/null 2>&1 &"  # holding the stream, it would keep the exec
    out = kit.run(f"{stays} echo here; {kill}; sleep 600", timeout_ms=60_000)
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, 137), out.res.stderr
    assert out.seconds < 20


def test_a_task_that_ends_its_pod_has_failed(kit: Kit) -> None:
    out = kit.run("echo before; kill -KILL 1; sleep 0.2; echo alive; kill -TERM 1; sleep 5; echo never")
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.CMD_NONZERO, None, "before\nalive\n")
    assert "ended its own sandbox" in out.res.stderr


# --------------------------------------------------------------------------- Pods that cannot be


def test_an_image_that_is_not_to_be_had(sandbox_cluster: NodeCluster) -> None:
    nowhere = another(sandbox_cluster, image=f"localhost/nowhere@sha256:{'a' * 64}")
    out = nowhere.run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "ImagePullBackOff" in out.res.stderr and "localhost/nowhere" in out.res.stderr


def test_a_pod_that_fits_nowhere(sandbox_cluster: NodeCluster) -> None:
    out = another(sandbox_cluster, boot=3).run("echo never", limits=Limits(cpu_millis=500_000))
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "did not start within 3 s: Unschedulable" in out.res.stderr and "Insufficient cpu" in out.res.stderr


def test_a_pod_that_admission_refuses(sandbox_cluster: NodeCluster) -> None:
    out = another(sandbox_cluster, runtime_class="gvisor").run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert 'RuntimeClass "gvisor" not found' in out.res.stderr
    assert out.seconds < 2, "not waited for"


def test_a_quota_is_waited_for(sandbox_cluster: NodeCluster) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    sandbox_cluster.kubectl("create", "-n", SANDBOXES, "-f", "-", stdin=json.dumps(quota))
    try:
        eventually(
            lambda: (
                "0"
                in sandbox_cluster.kubectl(
                    "get", "resourcequota", "none", "-n", SANDBOXES, "-o", "jsonpath={.status.hard.pods}"
                ).stdout
            )
        )
        out = another(sandbox_cluster).run("echo never")
        assert out.res.err_code is ErrCode.BOOT_FAIL and "exceeded quota: none" in out.res.stderr
        join = another(sandbox_cluster, bounds=Bounds(busy=20)).begin("echo fine")
        time.sleep(1)
    finally:
        sandbox_cluster.kubectl("delete", "resourcequota", "none", "-n", SANDBOXES)
    assert join().res.stdout == "fine\n"


def test_rights_that_are_missing_are_named(sandbox_cluster: NodeCluster) -> None:
    out = another(sandbox_cluster, identity="alice").run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "alice@corp" in out.res.stderr and "networkpolicies" in out.res.stderr


def test_without_its_network_policy_nothing_runs(sandbox_cluster: NodeCluster) -> None:
    name = "sisu-kodo-egress-none"
    shipped = sandbox_cluster.kubectl("get", "networkpolicy", name, "-n", SANDBOXES, "-o", "json").stdout
    sandbox_cluster.kubectl("delete", "networkpolicy", name, "-n", SANDBOXES)
    try:
        out = another(sandbox_cluster).run("echo never")
    finally:
        spec = json.loads(shipped)
        spec["metadata"] = {"name": name, "namespace": SANDBOXES, "labels": spec["metadata"]["labels"]}
        sandbox_cluster.kubectl("create", "-f", "-", stdin=json.dumps(spec))
    assert out.res.err_code is ErrCode.BOOT_FAIL and f"NetworkPolicy {name} is missing" in out.res.stderr


# --------------------------------------------------------------------------- ended from elsewhere


def test_a_pod_that_somebody_deletes_is_lost(kit: Kit, sandbox_cluster: NodeCluster) -> None:
    owner = kit.owner()
    join = kit.begin("echo before; sleep 30", owner=owner)
    eventually(lambda: kit.live, seconds=20)
    sandbox_cluster.kubectl("delete", "pod", name_of(owner), "-n", SANDBOXES, "--wait=false")
    out = join()
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.LOST, None, "before\n")
    assert "the Pod was deleted" in out.res.stderr or "the Pod is gone" in out.res.stderr


def test_another_worker_sees_and_kills_it(kit: Kit, sandbox_cluster: NodeCluster) -> None:
    other, owner = another(sandbox_cluster), kit.owner()
    join = kit.begin("echo before; sleep 30", owner=owner)
    eventually(lambda: kit.live, seconds=20)
    assert other.provider.owned(STORE) == [owner]
    assert other.provider.kill(owner) == 1
    assert (other.provider.owned(STORE), other.provider.kill(owner)) == ([], 0)
    assert join().res.err_code is ErrCode.LOST


def test_a_pod_ends_by_its_own_deadline(kit: Kit, sandbox_cluster: NodeCluster) -> None:
    """Whoever should have deleted it is gone, and nobody looks for it."""
    assert isinstance(kit.provider, KubernetesProvider)
    owner = kit.owner()
    join = kit.begin("echo before; sleep 60", owner=owner, timeout_ms=60_000)
    eventually(lambda: kit.live, seconds=20)
    patch = '{"spec": {"activeDeadlineSeconds": 2}}'
    sandbox_cluster.kubectl("patch", "pod", name_of(owner), "-n", SANDBOXES, "--type=merge", "-p", patch)
    out = join()
    assert out.res.err_code is ErrCode.LOST and "DeadlineExceeded" in out.res.stderr


def test_cancel_while_it_starts_leaves_nothing(kit: Kit) -> None:
    flag = threading.Event()
    join = kit.begin("echo never", canceled=flag.is_set)
    eventually(lambda: kit.provider.owned(STORE))
    flag.set()
    assert join().res.err_code is ErrCode.CANCELED
    assert kit.provider.owned(STORE) == []


def test_a_node_that_does_not_answer_holds_nobody_up(sandbox_cluster: NodeCluster) -> None:
    bounds = Bounds(grace=1.0, gone=3.0, probe=1.0)
    kit, flag = another(sandbox_cluster, bounds=bounds), threading.Event()
    join = kit.begin("echo before; sleep 120", canceled=flag.is_set, timeout_ms=120_000)
    eventually(lambda: kit.live, seconds=20)
    sandbox_cluster.kill_kubelet()
    try:
        flag.set()
        out = join()
        assert out.res.err_code is ErrCode.CANCELED and out.seconds < 30
        assert kit.provider.owned(STORE) == []
    finally:
        sandbox_cluster.restart_kubelet()
    assert another(sandbox_cluster).run("echo again").res.stdout == "again\n"


# --------------------------------------------------------------------------- many


def test_ten_at_once(kit: Kit, sandbox_cluster: NodeCluster) -> None:
    limits = Limits(cpu_millis=100, memory_mb=64)
    owners = [Owner(store_id=STORE, run_id="r", task_key="k" * 64, attempt=1, fence=10**6 + n) for n in range(10)]
    joins = [kit.begin(f"echo {owner.fence}; sleep 1", owner=owner, limits=limits) for owner in owners]
    eventually(lambda: len(kit.provider.owned(STORE)) == 10, seconds=20)
    assert [join().res.stdout for join in joins] == [f"{owner.fence}\n" for owner in owners]
    assert sandbox_cluster.kubectl("get", "pods", "-n", SANDBOXES, "-o", "name").stdout == ""
