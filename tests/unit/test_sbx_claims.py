"""Claims for Pods of a warm pool as data: which pool serves, which Pod is taken, and how a pool is printed."""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from controller.__main__ import cli
from controller.core.contract import Egress, ErrCode, Limits
from controller.core.model import Owner
from controller.sbx import kubernetes_claims, kubernetes_pod
from controller.sbx.kubernetes_pod import PodSettings
from tests.unit.test_sbx_kubernetes import ENVIRON, IMAGE

PODS = PodSettings(namespace="sandboxes", runtime_class="gvisor", node_selector={"pool": "x"}, claims=True)
OWNER = Owner(store_id="store", run_id="run-1", task_key="k" * 64, attempt=2, fence=7)
Object = dict[str, Any]


def wanted(*, mode: str = "None", **limits: int) -> Object:
    return kubernetes_pod.template(Limits(**limits), Egress.model_validate({"mode": mode}), image=IMAGE, settings=PODS)


def pool_template() -> Object:
    template, _ = kubernetes_claims.pool("python", wanted(), settings=PODS, replicas=2)
    return copy.deepcopy(template)


def live_pod() -> Object:
    """As the API server gives it back."""
    pod = copy.deepcopy(wanted())
    spec = pod["spec"]
    spec |= {"nodeName": "n1", "serviceAccountName": "default", "serviceAccount": "default", "priority": 0}
    spec |= {
        "schedulerName": "default-scheduler",
        "preemptionPolicy": "PreemptLowerPriority",
        "overhead": {"cpu": "9m"},
    }
    spec["tolerations"].append({"key": "gvisor", "operator": "Exists"})
    spec["nodeSelector"]["runtime"] = "gvisor"
    (container,) = spec["containers"]
    container |= {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}
    container["resources"] = {
        kind: {"cpu": "1", "memory": "0.5Gi", "ephemeral-storage": "1Gi"} for kind in ("limits", "requests")
    }
    for volume in spec["volumes"]:
        volume["emptyDir"]["sizeLimit"] = "1Gi"
    return pod


def test_what_the_api_server_fills_in_is_no_difference() -> None:
    assert kubernetes_claims.strange(live_pod(), wanted()) is None
    assert kubernetes_claims.unfit(pool_template(), wanted()) is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.update(hostNetwork=True), "spec.hostNetwork is True, None was approved"),
        (lambda s: s.update(hostPID=True), "hostPID"),
        (lambda s: s.update(shareProcessNamespace=True), "shareProcessNamespace"),
        (lambda s: s.pop("automountServiceAccountToken"), "automountServiceAccountToken is None, False was approved"),
        (lambda s: s.update(automountServiceAccountToken=True), "automountServiceAccountToken"),
        (lambda s: s.pop("runtimeClassName"), "runtimeClassName"),
        (lambda s: s.update(nodeSelector={}), "nodeSelector"),
        (lambda s: s.update(tolerations=[]), "tolerations"),
        (lambda s: s["containers"].append({"name": "sidecar"}), "containers"),
        (lambda s: s.update(initContainers=[{"name": "first"}]), "initContainers"),
        (lambda s: s.update(ephemeralContainers=[{"name": "debug"}]), "ephemeralContainers"),
        (lambda s: s["containers"][0].update(image=IMAGE.replace("a", "b")), "spec.containers.0.image"),
        (lambda s: s["containers"][0].update(command=["sleep", "9"]), "command"),
        (lambda s: s["containers"][0].update(envFrom=[{"secretRef": {"name": "x"}}]), "envFrom"),
        (lambda s: s["containers"][0]["env"].append({"name": "TOKEN", "value": "x"}), "env"),
        (lambda s: s["containers"][0]["securityContext"].update(privileged=True), "privileged"),
        (lambda s: s["containers"][0]["securityContext"]["capabilities"].update(add=["NET_RAW"]), "capabilities.add"),
        (lambda s: s["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRootFilesystem"),
        (lambda s: s["securityContext"].update(runAsUser=0), "runAsUser is 0"),
        (lambda s: s["securityContext"].update(seccompProfile={"type": "Unconfined"}), "seccompProfile.type"),
        (
            lambda s: s["containers"][0]["resources"]["limits"].update(memory="2Gi"),
            "limits.memory is '2Gi', '512Mi' was",
        ),
        (lambda s: s["containers"][0]["resources"]["limits"].update(memory="much"), "limits.memory"),
        (lambda s: s["containers"][0]["resources"]["limits"].pop("cpu"), "limits.cpu is None"),
        (lambda s: s["volumes"][0].update(hostPath={"path": "/"}), "hostPath"),
        (lambda s: s["volumes"][0]["emptyDir"].update(sizeLimit="9Gi"), "sizeLimit"),
        (lambda s: s["containers"][0]["volumeMounts"].append({"name": "home", "mountPath": "/etc"}), "volumeMounts"),
        (lambda s: s.update(dnsPolicy="ClusterFirst"), "dnsPolicy"),
        (lambda s: s.update(activeDeadlineSeconds=5), "activeDeadlineSeconds"),
    ],
)
def test_whatever_holds_a_task_less_or_otherwise_is_refused(spoil: Callable[[Object], Any], says: str) -> None:
    pod, template = live_pod(), pool_template()
    spoil(pod["spec"])
    spoil(template["spec"]["podTemplate"]["spec"])
    assert says in (kubernetes_claims.strange(pod, wanted()) or "")
    assert says in (kubernetes_claims.unfit(template, wanted()) or "")


def test_a_pool_for_another_egress_or_limit_does_not_serve() -> None:
    assert "'none', 'public' was approved" in (kubernetes_claims.strange(live_pod(), wanted(mode="Public")) or "")
    assert "limits.cpu" in (kubernetes_claims.unfit(pool_template(), wanted(cpu_millis=500)) or "")
    assert "egress" in (kubernetes_claims.strange({"spec": live_pod()["spec"]}, wanted()) or "")


@pytest.mark.parametrize("management", [None, "Managed"])
def test_a_pool_whose_network_somebody_else_opens_does_not_serve(management: str | None) -> None:
    """agent-sandbox adds a NetworkPolicy to such templates, which lets Pods out that may reach nothing."""
    template = pool_template()
    template["spec"]["networkPolicyManagement"] = management
    assert "networkPolicyManagement" in (kubernetes_claims.unfit(template, wanted()) or "")
    template = pool_template()
    template["spec"]["volumeClaimTemplates"] = [{"metadata": {"name": "kept"}}]
    assert "volumeClaimTemplates" in (kubernetes_claims.unfit(template, wanted()) or "")


def test_a_claim_is_marked_and_ends_by_itself() -> None:
    end = dt.datetime(2026, 11, 22, 12, 0, 1, 500, tzinfo=dt.UTC)
    claim = kubernetes_claims.claim(OWNER, pool="python", settings=PODS, end=end)
    assert kubernetes_pod.owner_of(claim) == OWNER
    assert claim["metadata"]["name"] == kubernetes_pod.name_of(OWNER)
    assert claim["spec"]["lifecycle"] == {"shutdownTime": "2026-11-22T12:00:01Z", "shutdownPolicy": "DeleteForeground"}
    assert set(claim["spec"]) == {"warmPoolRef", "lifecycle"}, "an environment would force a cold start"


def test_what_a_claim_says() -> None:
    claim: Object = {"metadata": {}}
    assert kubernetes_claims.pod_of(claim) is None and kubernetes_claims.of_claim(claim) is None
    claim["status"] = {"sandbox": {"name": "python-1"}, "conditions": [{"type": "Ready", "reason": "SandboxNotReady"}]}
    assert kubernetes_claims.pod_of(claim) == "python-1" and kubernetes_claims.of_claim(claim) is None
    claim["status"]["conditions"][0]["reason"] = "ClaimExpired"
    assert (over := kubernetes_claims.of_claim(claim)) is not None and over.code is ErrCode.BOOT_FAIL
    gone = kubernetes_claims.of_claim({"metadata": {"deletionTimestamp": "now"}})
    assert gone is not None and gone.code is ErrCode.LOST


def test_a_printed_pool_serves_its_tasks() -> None:
    words = ["sandbox-pool", "python", "--replicas", "3", "--egress", "Public", "--memory-mb", "64"]
    env = {**ENVIRON, "SBX_KUBERNETES_NAMESPACE": "boxes"}
    done = CliRunner().invoke(cli, words, env=env)
    template, pool = yaml.safe_load_all(done.stdout)
    assert template["metadata"] == pool["metadata"] == {"name": "python-public", "namespace": "boxes"}
    assert pool["spec"]["replicas"] == 3 and pool["spec"]["sandboxTemplateRef"] == {"name": "python-public"}
    settings = PodSettings(namespace="boxes")
    task = kubernetes_pod.template(Limits(memory_mb=64), Egress(mode="Public"), image=IMAGE, settings=settings)
    assert kubernetes_claims.unfit(template, task) is None


def test_a_pool_of_an_unknown_template_is_refused() -> None:
    done = CliRunner().invoke(cli, ["sandbox-pool", "ruby"], env=ENVIRON)
    assert done.exit_code == 2
    assert "'ruby' is unknown; SBX_KUBERNETES_TEMPLATES has: base, python" in done.output
