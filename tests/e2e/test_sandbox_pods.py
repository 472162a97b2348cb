"""The whole program with tasks as Pods on a real node: the main job, and a controller that is killed while a Pod runs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.core.contract import Egress, Limits
from controller.core.model import Owner
from controller.sbx import kubernetes_pod
from controller.sbx.kubernetes_pod import PodSettings
from devcluster import node
from devcluster.install import apply_chart
from devcluster.stack import Controller, Stack, scratch
from tests.e2e.product import Product
from tests.support import agent_sandbox

pytestmark = pytest.mark.slow
SANDBOXES = "sisu-kodo-sandboxes"
GRACE = 4.0
_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Control plane, node, PostgreSQL and the chart; the controller has the rights that the chart gives it."""
    if reason := node.missing():
        pytest.skip(f"no node: {reason}")
    with scratch() as state, Stack(state, node=True, fsync=False) as running:
        yield running


@pytest.fixture
def product(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Product]:
    with Product(stack, name=f"pods-{next(_NUMBERS)}", title=request.node.name) as one:
        yield one
        assert pods(stack) == []


def start(product: Product) -> Controller:
    return product.start(**product.stack.pods(), SBX_ORPHAN_GRACE_SECONDS=str(GRACE))


def pods(stack: Stack) -> list[str]:
    return stack.kubectl("get", "pods", "-n", SANDBOXES, "-o", "name").stdout.split()


def test_an_approved_intent_runs_in_a_pod(product: Product) -> None:
    start(product)
    product.apply("hello", "say hello")
    product.wait_phase("hello", "WaitingInput")
    assert pods(product.stack) == []
    product.vote("hello")
    done = product.wait_phase("hello", "Succeeded", "Failed", "RetriesExceeded", seconds=60)
    assert done["phase"] == "Succeeded", done
    image = product.stack.machine.images.reference("python")
    assert product.sql("SELECT provider, err_code FROM app.sbx_runs") == [("kubernetes", "NONE")]
    approval = json.loads(product.kubectl("get", "planapprovals", "-o", "json"))["items"][0]
    assert f"kubernetes:python@{image}" in json.dumps(approval["spec"]), "people approved this image"
    assert sum(product.starts().values()) == 1
    product.assert_once()


def test_a_killed_controllers_pod_is_deleted_and_its_task_succeeds(product: Product) -> None:
    """And a Pod that no journal knows goes after the grace period."""
    first = start(product)
    product.apply("k", "wait a while")
    product.wait_phase("k", "WaitingInput")
    product.vote("k")
    product.wait(lambda: product.starts(), "a command has begun", seconds=60)
    first.kill()
    (left,) = pods(product.stack)
    orphan(product)

    start(product)
    done = product.wait_phase("k", "Succeeded", "Failed", "RetriesExceeded", seconds=90)
    assert done["phase"] == "Succeeded", done
    assert left not in pods(product.stack)
    product.wait(lambda: not pods(product.stack), "no Pod is left", seconds=GRACE + GRACE / 2 + 20)
    assert product.sql("SELECT attempt, state FROM app.sbx_attempts ORDER BY attempt") == [(1, "unknown"), (2, "done")]
    assert product.sql("SELECT outcomes, attempt, status FROM app.sbx_runs") == [(1, 2, "succeeded")]
    product.assert_once()


def test_an_approved_intent_runs_in_a_pod_that_was_waiting(product: Product, tmp_path: Path) -> None:
    """With agent-sandbox and a pool as our own command prints it; a controller is killed on the way, and nothing is left."""
    if reason := agent_sandbox.missing():
        pytest.skip(f"no claims: {reason}")
    stack, settings = product.stack, {**product.stack.pods(), "SBX_KUBERNETES_CLAIMS": "true"}
    apply_chart(stack.cluster, sets=(*stack.sets, "sandbox.kubernetes.claims=true"))
    with agent_sandbox.running(stack.cluster, tmp_path):
        words = [sys.executable, "-m", "controller", "sandbox-pool", "python", "--replicas", "1"]
        printed = subprocess.run(words, env=stack.environment(**settings), capture_output=True, text=True, check=True)
        stack.kubectl("apply", "-f", "-", stdin=printed.stdout)
        (warm,) = product.wait(lambda: pods(stack), "a Pod waits")
        ready = ("wait", "--for=condition=Ready", warm, "-n", SANDBOXES, "--timeout=60s")
        stack.kubectl(*ready)
        first = product.start(**settings, SBX_ORPHAN_GRACE_SECONDS=str(GRACE))
        product.apply("k", "wait a while")
        product.wait_phase("k", "WaitingInput")
        product.vote("k")
        product.wait(lambda: product.starts(), "a command has begun", seconds=60)
        assert len(stack.kubectl("get", "sandboxclaims", "-n", SANDBOXES, "-o", "name").stdout.split()) == 1
        assert warm in pods(stack)
        first.kill()

        product.start(**settings, SBX_ORPHAN_GRACE_SECONDS=str(GRACE))
        done = product.wait_phase("k", "Succeeded", "Failed", "RetriesExceeded", seconds=90)
        assert done["phase"] == "Succeeded", done
        ((ref,),) = product.sql("SELECT response->>'sandboxRef' FROM app.sbx_runs")
        assert "/sandboxclaim/" in str(ref)
        claims = ("get", "sandboxclaims", "-n", SANDBOXES, "-o", "name")
        product.wait(lambda: not stack.kubectl(*claims).stdout, "no claim is left", seconds=GRACE + GRACE / 2 + 20)
        assert warm not in pods(stack)
        product.assert_once()
        stack.kubectl("delete", "sandboxwarmpools", "--all", "-n", SANDBOXES)
        product.wait(lambda: not pods(stack), "the pool's Pods are gone", seconds=60)


def orphan(product: Product) -> None:
    """A Pod with this store's mark, of an attempt that the journal does not know."""
    ((store,),) = product.sql("SELECT id::text FROM app.store")
    owner = Owner(store_id=store, run_id="r", task_key="k" * 64, attempt=1, fence=10**9)
    limits, image = Limits(cpu_millis=50, memory_mb=32), product.stack.machine.images.reference("python")
    pods = PodSettings(namespace=SANDBOXES)
    template = kubernetes_pod.template(limits, Egress(), image=image, settings=pods)
    body = kubernetes_pod.manifest(template, owner=owner, settings=pods, seconds=3600)
    product.stack.kubectl("create", "-f", "-", stdin=json.dumps(body))
