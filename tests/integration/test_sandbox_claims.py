"""Pods from warm pools: which pool serves, what happens when agent-sandbox or a pool misbehaves, and that nothing is left.

First against tests/support/pods_server.py, whose commands really run; at the end against agent-sandbox itself and real Pods.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode, Limits
from controller.sbx import kubernetes_claims, kubernetes_pod
from controller.sbx.kubernetes_pod import PodSettings, name_of
from devcluster.node import NodeCluster
from tests.support.pods_server import IMAGE, NAMESPACE, PodsServer
from tests.support.sandbox_kit import (
    BOUNDS,
    SANDBOXES,
    STORE,
    Kit,
    archive,
    eventually,
    give_pool,
    node_kit,
    pods_kit,
    upload,
)

PODS = PodSettings(namespace=NAMESPACE, boot=2.0, claims=True)
MANY = 10**6


@pytest.fixture
def both(root: Path) -> Iterator[tuple[Kit, PodsServer]]:
    with pods_kit(root, pods=PODS) as (kit, server):
        server.add(*a_pool("warm"))
        yield kit, server


def a_pool(name: str, **limits: int) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = kubernetes_pod.template(Limits(**limits), Egress(), image=IMAGE, settings=PODS)
    return kubernetes_claims.pool(name, pod, settings=PODS, replicas=1)


def made(server: PodsServer) -> list[str]:
    return [one["kind"] for one in server.creates]


# --------------------------------------------------------------------------- which pool serves


def test_a_task_from_upload_to_artifacts(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    owner = kit.owner()
    cmd = 'cat greeting; echo x > "$SISU_OUTPUT_DIR/a.txt"; exit 3'
    out = kit.run(cmd, owner=owner, **upload(("archive", archive({"greeting": b"hello\n"}))))
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.CMD_NONZERO, 3, "hello\n")
    assert [(a.name, a.content) for a in out.artifacts] == [("a.txt", b"x\n")]
    assert (server.pods, server.claims) == ({}, {}), "gone before the outcome is told"
    assert made(server) == ["SandboxClaim"]
    assert out.res.sandbox_ref == f"kubernetes:{NAMESPACE}/sandboxclaim/{name_of(owner)}"
    ends = dt.datetime.fromisoformat(server.creates[0]["spec"]["lifecycle"]["shutdownTime"])
    assert 300 < (ends - dt.datetime.now(dt.UTC)).total_seconds() < 330


def test_without_agent_sandbox_pods_are_made(root: Path) -> None:
    with pods_kit(root, pods=PODS) as (kit, server):
        out = kit.run("true")
        assert out.res.err_code is ErrCode.NONE and made(server) == ["Pod"]
        assert list(kit.provider.owned(STORE)) == []


def test_where_no_pool_fits_a_pod_is_made_and_the_log_says_why(
    both: tuple[Kit, PodsServer], caplog: pytest.LogCaptureFixture
) -> None:
    kit, server = both
    server.add(*a_pool("small", memory_mb=64))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert kit.run("true", limits=Limits(memory_mb=96)).res.err_code is ErrCode.NONE
    assert made(server) == ["Pod", "Pod"]
    said = {(one.pool, one.why) for one in caplog.records if one.msg == "sandbox_pool_does_not_fit"}  # type: ignore[attr-defined]
    assert {pool for pool, _ in said} == {"small", "warm"}
    assert all("limits.memory" in why and "'96Mi' was approved" in why for _, why in said)
    assert len([one for one in caplog.records if one.msg == "sandbox_pool_does_not_fit"]) == 2, (
        "once, not for every task"
    )


def test_the_pool_that_fits_is_taken(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.add(*a_pool("small", memory_mb=64))
    kit.run("true", limits=Limits(memory_mb=64))
    assert server.creates[0]["spec"]["warmPoolRef"] == {"name": "small"}


def test_a_pod_that_is_not_what_was_approved_runs_nothing(both: tuple[Kit, PodsServer]) -> None:
    """A pool may still hold Pods of an older template, or its template may have changed since we looked."""
    kit, server = both
    kit.run("true")
    server.kinds["sandboxtemplates"]["warm"]["spec"]["podTemplate"]["spec"]["hostNetwork"] = True
    started = kit.start_log.read_text()
    out = kit.run("true")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "the pool's Pod is not what was approved: spec.hostNetwork is True" in out.res.stderr
    assert kit.start_log.read_text() == started


# --------------------------------------------------------------------------- when it misbehaves


def test_a_claim_that_was_made_without_an_answer_is_the_one_that_is_used(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("claim", status=500, done=True)
    out = kit.run("true")
    assert out.res.err_code is ErrCode.NONE and made(server) == ["SandboxClaim"]


def test_a_claim_that_is_made_too_late_is_found_and_deleted(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("claim", times=MANY, late=BOUNDS.api + 0.5)
    assert kit.run("true").res.err_code is ErrCode.BOOT_FAIL
    eventually(lambda: not server.claims and not server.pods, seconds=10)


def test_a_claim_without_a_pod_says_what_it_waits_for(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    kit.run("true")
    server.kinds["sandboxwarmpools"].clear()
    out = kit.run("true")
    assert out.res.err_code is ErrCode.BOOT_FAIL and "WarmPoolNotFound" in out.res.stderr
    assert server.claims == {}


def test_a_claim_that_is_deleted_while_it_waits_is_lost(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    kit.run("true")
    server.kinds["sandboxwarmpools"].clear()
    join = kit.begin("true")
    (claim,) = eventually(lambda: list(server.claims.values()))
    claim["metadata"]["deletionTimestamp"] = "now"
    assert join().res.err_code is ErrCode.LOST


@pytest.mark.parametrize("operation", ["pools", "claim", "claimed"])
def test_load_is_waited_out(both: tuple[Kit, PodsServer], operation: str) -> None:
    kit, server = both
    server.fail(operation, status=503, times=2)
    assert kit.run("true").res.err_code is ErrCode.NONE


@pytest.mark.parametrize("operation", ["pools", "claim"])
def test_missing_rights_are_named(both: tuple[Kit, PodsServer], operation: str) -> None:
    kit, server = both
    server.fail(operation, status=403, times=MANY, body='{"message": "sandboxes: forbidden to you"}')
    out = kit.run("true")
    assert out.res.err_code is ErrCode.BOOT_FAIL and "forbidden to you" in out.res.stderr


def one_pod(server: PodsServer) -> str:
    (name,) = server.pods
    return name


def test_another_pod_under_the_same_name_is_not_taken_for_the_first(both: tuple[Kit, PodsServer]) -> None:
    """agent-sandbox replaces a Pod that somebody deletes. The command would find none of its files there."""
    kit, server = both
    join = kit.begin("sleep 20")
    eventually(lambda: kit.start_log.exists() and kit.start_log.read_text())
    server.replace(one_pod(server))
    out = join()
    assert (out.res.err_code, "the Pod is gone" in out.res.stderr) == (ErrCode.LOST, True)


def test_a_command_that_ran_in_another_pod_does_not_count(both: tuple[Kit, PodsServer]) -> None:
    """Replaced after the upload and before the command: the stream does not break, and the command may even succeed."""
    kit, server = both
    server.before_exec = lambda line: server.replace(one_pod(server)) if "echo ran" in line else None
    out = kit.run("echo ran", **upload(("archive", archive({"a": b"x"}))))
    assert (out.res.stdout, out.res.err_code) == ("ran\n", ErrCode.LOST)


def test_kill_and_owned_know_claims_and_pods(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    claimed, bare = kit.owner(), kit.owner()
    joins = [kit.begin("sleep 20", owner=claimed), kit.begin("sleep 20", owner=bare, limits=Limits(memory_mb=96))]
    eventually(lambda: kit.start_log.exists() and len(kit.start_log.read_text().splitlines()) == 2)
    assert {one.fence for one in kit.provider.owned(STORE)} == {claimed.fence, bare.fence}
    assert [kit.provider.kill(owner) for owner in (claimed, bare)] == [1, 1]
    assert (server.pods, server.claims) == ({}, {}), "kill returns when they are gone"
    assert [join().res.err_code for join in joins] == [ErrCode.LOST, ErrCode.LOST]


def test_a_pod_whose_node_does_not_confirm_is_deleted_by_force(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.linger = 30.0
    out = kit.run("true")
    assert out.res.err_code is ErrCode.NONE and out.seconds < 10
    assert (server.pods, server.claims) == ({}, {})


# --------------------------------------------------------------------------- agent-sandbox itself


@pytest.fixture
def warm(warm_cluster: NodeCluster, root: Path) -> Iterator[tuple[Kit, NodeCluster]]:
    give_pool(warm_cluster, replicas=1)
    with node_kit(warm_cluster, root, claims=True) as kit:
        yield kit, warm_cluster


def waiting(cluster: NodeCluster) -> set[str]:
    """Names of the Pods in the sandboxes' namespace."""
    return set(cluster.kubectl("get", "pods", "-n", SANDBOXES, "-o", "name").stdout.split())


def the_waiting(cluster: NodeCluster) -> str:
    """The pool's Pod, when those of tests before are gone."""
    (name,) = eventually(lambda: found if len(found := waiting(cluster)) == 1 else None, seconds=60)
    return str(name)


@pytest.mark.slow
def test_a_waiting_pod_is_taken_and_replaced(warm: tuple[Kit, NodeCluster]) -> None:
    kit, cluster = warm
    before = the_waiting(cluster)
    out = kit.run("cat /etc/hostname")
    assert f"pod/{out.res.stdout.strip()}" == before
    assert "/sandboxclaim/" in out.res.sandbox_ref
    eventually(lambda: len(waiting(cluster)) == 1 and before not in waiting(cluster), seconds=30)


@pytest.mark.slow
def test_no_two_tasks_share_a_pod(warm: tuple[Kit, NodeCluster]) -> None:
    kit, _ = warm
    joins = [
        kit.begin("cat /etc/hostname; ls /workspace /tmp; touch /workspace/mine /tmp/mine; sleep 1") for _ in range(3)
    ]
    said = [join().res.stdout for join in joins]
    assert len({text.split()[0] for text in said}) == 3
    assert not any("mine" in text for text in said)


@pytest.mark.slow
def test_another_template_than_ours_does_not_serve(warm: tuple[Kit, NodeCluster]) -> None:
    kit, cluster = warm
    give_pool(cluster, replicas=1, automountServiceAccountToken=True)
    out = kit.run("ls /var/run/secrets/kubernetes.io")
    assert out.res.err_code is ErrCode.CMD_NONZERO and "/sandboxclaim/" not in out.res.sandbox_ref


@pytest.mark.slow
def test_a_deleted_pod_is_lost_although_another_takes_its_name(warm: tuple[Kit, NodeCluster]) -> None:
    kit, cluster = warm
    name = the_waiting(cluster)
    join = kit.begin("sleep 60", timeout_ms=100_000)
    eventually(lambda: kit.start_log.exists() and kit.start_log.read_text(), seconds=20)
    cluster.kubectl("delete", name, "-n", SANDBOXES, "--wait=false")
    assert join().res.err_code is ErrCode.LOST


@pytest.mark.slow
def test_a_claim_whose_worker_is_gone_ends_by_itself(warm: tuple[Kit, NodeCluster]) -> None:
    kit, cluster = warm
    end = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=3)
    claim = kubernetes_claims.claim(kit.owner(), pool="warm", settings=PodSettings(namespace=SANDBOXES), end=end)
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(claim), identity="controller")
    look = ("get", "sandboxclaims", "-n", SANDBOXES, "-o", "name")
    assert cluster.kubectl(*look).stdout
    eventually(lambda: not cluster.kubectl(*look).stdout, seconds=30)


@pytest.mark.slow
def test_the_provider_may_not_change_pools(warm_cluster: NodeCluster) -> None:
    for words in (("patch", "sandboxwarmpools"), ("create", "sandboxtemplates"), ("patch", "sandboxclaims")):
        asked = ("auth", "can-i", words[0], f"{words[1]}.extensions.agents.x-k8s.io", "-n", SANDBOXES)
        assert warm_cluster.kubectl(*asked, identity="controller", check=False).stdout.strip() == "no"


@pytest.mark.slow
def test_a_warm_pod_starts_sooner_than_one_that_is_made(warm: tuple[Kit, NodeCluster]) -> None:
    """The reason for it all. Compared within one run, with the others' work around it."""
    kit, cluster = warm
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for limits in (kit.limits, Limits(cpu_millis=300, memory_mb=128)) * 3:
        eventually(lambda: len(waiting(cluster)) == 1, seconds=30)
        give_pool(cluster, replicas=1)
        started = time.time()
        out = kit.run("date +%s.%N", limits=limits)
        seconds["/sandboxclaim/" in out.res.sandbox_ref].append(float(out.res.stdout) - started)
    assert len(seconds[True]) == 3 and min(seconds[True]) < min(seconds[False]), seconds
