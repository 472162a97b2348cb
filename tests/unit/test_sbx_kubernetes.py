"""The kubernetes provider without a cluster: its settings, the Pod as it is asked for, its tables, its command line."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from controller import main
from controller.config import ConfigError, load
from controller.core.contract import Egress, ErrCode, Limits, SBXReq
from controller.core.errors import InvalidIntent
from controller.core.model import Owner
from controller.sbx import kubernetes_errors, kubernetes_policies
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_box import Facts, command_line, facts_of
from controller.sbx.kubernetes_errors import ApiError, ExecFailed, StreamCut
from controller.sbx.kubernetes_exec import exit_code
from controller.sbx.kubernetes_pod import (
    PodSettings,
    image_digest,
    manifest,
    name_of,
    owner_of,
    running,
    selector,
    store_label,
    template,
)
from controller.sbx.loop import Silent
from controller.sbx.remote import MAX_SCRIPT

GOLDEN = Path(__file__).parent / "golden" / "pods" / "Pod.json"
IMAGE = f"registry.corp:5000/tools/python@sha256:{'a' * 64}"
STORE = "11111111-1111-1111-1111-111111111111"
ENVIRON = {
    "DATABASE_URL": "postgresql://u@h/d",
    "RANDOM_SEED": "1",
    "OC_MODE": "replay",
    "SBX_MODE": "live",
    "SBX_PROVIDER": "kubernetes",
    "POLICY_FILE": "/etc/policy.yaml",
    "SBX_KUBERNETES_TEMPLATES": f"python={IMAGE},base=debian@sha256:{'b' * 64}",
}
OWNER = Owner(store_id=STORE, run_id="run-1", task_key="k" * 64, attempt=2, fence=7)


def request(**changes: Any) -> SBXReq:
    values: dict[str, Any] = {"intent_id": "i", "run_id": "r", "step_id": "s", "task_id": "t", "generation": 1}
    values |= {"env_ref": f"kubernetes:python@{IMAGE}", "cmd": "true", "files_in": (), "env": {}}
    values |= {"workdir": "/workspace", "timeout_ms": 1500, "limits": Limits(), "egress": Egress()}
    return SBXReq(**(values | changes))


def made_pod(
    *, owner: Owner = OWNER, limits: Limits | None = None, egress: Egress | None = None, seconds: float = 1, **pods: Any
) -> dict[str, Any]:
    settings = PodSettings(**{"namespace": "sandboxes", **pods})
    made_of = template(limits or Limits(), egress or Egress(), image=IMAGE, settings=settings)
    return manifest(made_of, owner=owner, settings=settings, seconds=seconds)


# --------------------------------------------------------------------------- settings


def test_what_it_needs_is_named_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^SBX_KUBERNETES_TEMPLATES is not set; SBX_PROVIDER=kubernetes needs it [^\n]*$"
    ):
        main._sandboxes(load({**ENVIRON, "SBX_KUBERNETES_TEMPLATES": ""}))


@pytest.mark.parametrize(
    "templates",
    [
        "python",
        "python=python",
        "python=python:3.12",
        f"python=python@sha256:{'a' * 63}",
        f"python=python@sha256:{'A' * 64}",
        f"python={IMAGE},",
        f"python={IMAGE},base=debian:12",
        f"=debian@sha256:{'a' * 64}",
        f"Python={IMAGE}",
    ],
)
def test_an_image_without_a_digest_stops_the_start(templates: str) -> None:
    with pytest.raises(ConfigError, match=r"^SBX_KUBERNETES_TEMPLATES holds [^\n]+$"):
        load({**ENVIRON, "SBX_KUBERNETES_TEMPLATES": templates})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NAMESPACE", "Sandboxes"),
        ("NAMESPACE", "a.b"),
        ("RUNTIME_CLASS", "g visor"),
        ("PULL_SECRETS", "a,,b"),
        ("NODE_SELECTOR", "pool"),
        ("TOLERATIONS", "pool=x"),
        ("TOLERATIONS", "pool:Never"),
        ("BOOT_SECONDS", "0"),
    ],
)
def test_malformed_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^SBX_KUBERNETES_{name} holds "):
        load({**ENVIRON, f"SBX_KUBERNETES_{name}": value})


def test_every_setting_reaches_the_pod() -> None:
    settings = {
        "NAMESPACE": "boxes",
        "RUNTIME_CLASS": "gvisor",
        "PULL_SECRETS": "one,two",
        "NODE_SELECTOR": "pool=sandboxes,disk=",
        "TOLERATIONS": "pool=sandboxes:NoSchedule,spot:NoExecute",
        "BOOT_SECONDS": "60",
    }
    made = main._sandboxes(load({**ENVIRON, **{f"SBX_KUBERNETES_{k}": v for k, v in settings.items()}}))
    assert isinstance(made, KubernetesProvider)
    pods = made._life._pods
    made.close()
    pod = made_pod(**dataclasses.asdict(pods))
    assert (pod["metadata"]["namespace"], pod["spec"]["runtimeClassName"]) == ("boxes", "gvisor")
    assert pod["spec"]["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert pod["spec"]["nodeSelector"] == {"pool": "sandboxes", "disk": ""}
    assert pod["spec"]["tolerations"][-2:] == [
        {"key": "pool", "operator": "Equal", "value": "sandboxes", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]
    assert pods.boot == 60.0


def test_limits_over_all_workers_have_a_default() -> None:
    assert main.DEFAULT_LIMITS["kubernetes"] == (10.0, 100)


# --------------------------------------------------------------------------- requests


@pytest.fixture
def provider() -> Iterator[KubernetesProvider]:
    made = KubernetesProvider(None, templates={"python": IMAGE}, pods=PodSettings(namespace="sandboxes"))
    yield made
    made.close()


def test_a_template_is_its_image_by_digest(provider: KubernetesProvider) -> None:
    assert provider.resolve("python") == f"kubernetes:python@{IMAGE}"
    with pytest.raises(InvalidIntent, match=r"'cobol' is unknown here; there is: python"):
        provider.resolve("cobol")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"env_ref": f"local:python@{IMAGE}"}, "spec.sandbox.template"),
        ({"env_ref": f"kubernetes:base@{IMAGE}"}, "spec.sandbox.template"),
        ({"env_ref": f"kubernetes:python@{IMAGE[:-1]}b"}, "spec.sandbox.template"),
        ({"env_ref": "kubernetes:python"}, "spec.sandbox.template"),
        ({"egress": Egress(mode="Allow", allow=("files.example",))}, "spec.sandbox.egress.mode"),
        ({"egress": Egress(mode="Allow")}, "spec.sandbox.egress.mode"),
        ({"workdir": "/etc"}, "spec.sandbox"),
        ({"workdir": "/workspace/../etc"}, "spec.sandbox"),
        ({"env": {"A=B": "x"}}, "spec.sandbox"),
        ({"env": {"A;reboot": "x"}}, "spec.sandbox"),
        ({"env": {"Ä": "x"}}, "spec.sandbox"),
        ({"cmd": "a\0b"}, "spec.sandbox"),
        ({"cmd": "'" * (MAX_SCRIPT // 5)}, "spec.sandbox"),
    ],
)
def test_what_cannot_be_run_as_it_is_meant_is_refused(
    provider: KubernetesProvider, changes: dict[str, Any], field: str
) -> None:
    assert provider.check(request()) == IMAGE
    with pytest.raises(InvalidIntent) as refused:
        provider.check(request(**changes))
    assert refused.value.field == field


# --------------------------------------------------------------------------- the Pod


def test_the_pod_is_the_golden_one() -> None:
    """Whatever changes here changes what holds a task: read the difference. `make golden-refresh` writes it anew."""
    pod = made_pod(seconds=421.5)
    text = json.dumps(pod, indent=2, sort_keys=True) + "\n"
    if os.environ.get("REFRESH_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert json.loads(text) == json.loads(GOLDEN.read_text()), "Pod.json differs; if that is meant: REFRESH_GOLDEN=1"


def test_limits_and_egress_make_the_pod() -> None:
    limits = Limits(cpu_millis=250, memory_mb=64, pids=9, disk_mb=32)
    made = made_pod(limits=limits, egress=Egress(mode="Public"))
    (container,) = made["spec"]["containers"]
    amounts = {"cpu": "250m", "memory": "64Mi", "ephemeral-storage": "32Mi"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert {v["emptyDir"]["sizeLimit"] for v in made["spec"]["volumes"]} == {"32Mi"}
    assert made["metadata"]["labels"]["sisukodo.dev/egress"] == "public" and made["spec"]["dnsPolicy"] == "ClusterFirst"


@pytest.mark.parametrize("store", [STORE, "store 1", "ä" * 100, "-x", "x" * 64])
def test_the_mark_survives_the_way_whatever_the_store_is_called(store: str) -> None:
    owner = Owner(store_id=store, run_id="r", task_key="k" * 64, attempt=2, fence=7)
    pod = made_pod(owner=owner)
    assert owner_of(pod) == owner
    assert len(store_label(store)) <= 63 and f"={store_label(store)}" in selector(store)
    assert pod["metadata"]["labels"]["sisukodo.dev/store"] == store_label(store)
    assert len(name_of(owner)) <= 63 and name_of(owner) == pod["metadata"]["name"]


def test_another_fence_or_store_has_another_name() -> None:
    names = {name_of(Owner(store_id=s, run_id="r", task_key="k", attempt=1, fence=f)) for s in "ab" for f in (1, 2)}
    assert len(names) == 4
    assert owner_of({"metadata": {}}) is None
    assert owner_of({"metadata": {"labels": {"sisukodo.dev/fence": "x"}, "annotations": {}}}) is None


@pytest.mark.parametrize(
    ("image_id", "digest"),
    [
        (IMAGE, f"sha256:{'a' * 64}"),
        (f"docker-pullable://x@sha256:{'a' * 64}", f"sha256:{'a' * 64}"),
        (f"sha256:{'a' * 64}", None),
        ("", None),
        (None, None),
    ],
)
def test_the_runtimes_digest(image_id: str | None, digest: str | None) -> None:
    status = {"name": "task", "imageID": image_id, "state": {"running": dict[str, str]()}}
    pod = {"status": {"containerStatuses": [status]}}
    assert (image_digest(pod), running(pod)) == (digest, True)
    assert (image_digest({}), running({})) == (None, False)


# --------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "cmd", ["exit 7", "echo 'a b' \"$X\" `echo c`; exit 3", "kill -TERM $$", "cat; pwd", "exit 124"]
)
def test_the_script_ends_as_its_command(cmd: str, tmp_path: Path) -> None:
    # Without what kills every other process of this user.
    line = command_line(request(cmd=cmd, env={"X": "d ' $e"}), grace=1).replace("kill -KILL -1 2> /dev/null; ", "")
    line = line.replace("cd /workspace ", f"cd {tmp_path} ")
    assert "kill -KILL" not in line and str(tmp_path) in line
    wrapped = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=False, input=b"never read")
    env = {"PATH": "/usr/bin:/bin", "X": "d ' $e"}
    plain = subprocess.run(
        ["/bin/sh", "-c", f"/bin/sh -c {_quoted(cmd)}; exit $?"],
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (wrapped.returncode, wrapped.stdout) == (plain.returncode, plain.stdout)


def test_the_limits_are_on_the_command_line_but_for_processes() -> None:
    line = command_line(request(timeout_ms=1500, limits=Limits(disk_mb=32)), grace=5)
    assert "/usr/bin/timeout -k 5 1.5 /usr/bin/prlimit" in line and f"--fsize={32 << 20}" in line
    assert "--nproc" not in line, "a uid is the node's: it would count the processes of other Pods"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("", Facts()),
        ("memory.events oom 4\nmemory.events oom_kill 2\nmemory.peak 1048577\ncpu.stat usage_usec 12345", (2, 2, 12)),
        (
            "memory/memory.oom_control under_oom 0\nmemory/memory.oom_control oom_kill 1\n"
            "memory/memory.max_usage_in_bytes 1048576\ncpu,cpuacct/cpuacct.usage 5000000\nodd line",
            (1, 1, 5),
        ),
    ],
)
def test_what_a_cgroup_says(text: str, facts: Facts | tuple[int, int, int]) -> None:
    if isinstance(facts, tuple):
        facts = Facts(oom_kills=facts[0], mem_peak_mb=facts[1], cpu_ms=facts[2])
    assert facts_of(text) == facts


# --------------------------------------------------------------------------- tables


def _failed(**details: Any) -> bytes:
    return json.dumps({"status": "Failure", "reason": "NonZeroExitCode", "details": details}).encode()


def test_the_exit_code_is_in_the_status() -> None:
    assert exit_code(b'{"metadata":{},"status":"Success"}') == 0
    assert exit_code(_failed(causes=[{"reason": "Other"}, {"reason": "ExitCode", "message": "137"}])) == 137


@pytest.mark.parametrize("status", [b"oops", b"[]", b"{}", _failed(), _failed(causes=[]), b'{"status": "Failure"}'])
def test_a_status_without_an_exit_code_is_no_exit(status: bytes) -> None:
    with pytest.raises(ExecFailed):
        exit_code(status)


PLACE: Any = SimpleNamespace(host="h", port=1, ssl=True)
UNREACHED: Exception = aiohttp.ClientConnectorError(PLACE, OSError("refused"))


@pytest.mark.parametrize(
    ("error", "code", "undecided", "passing"),
    [
        (UNREACHED, ErrCode.NET_FAIL, False, True),
        (ConnectionRefusedError("x"), ErrCode.NET_FAIL, False, True),
        (ApiError(429, "x"), ErrCode.BOOT_FAIL, False, True),
        (ApiError(503, "x"), ErrCode.BOOT_FAIL, True, True),
        (ApiError(403, "pods is forbidden: exceeded quota: q"), ErrCode.BOOT_FAIL, False, True),
        (ApiError(403, "x"), ErrCode.BOOT_FAIL, False, False),
        (ApiError(401, "x"), ErrCode.BOOT_FAIL, False, False),
        (ApiError(409, "x"), ErrCode.BOOT_FAIL, False, False),
        (ApiError(422, "x"), ErrCode.BOOT_FAIL, False, False),
        (ApiError(500, "x"), ErrCode.BOOT_FAIL, True, True),
        (Silent("x"), ErrCode.BOOT_FAIL, True, True),
        (aiohttp.ServerDisconnectedError(), ErrCode.BOOT_FAIL, True, True),
        (ValueError("x"), ErrCode.BOOT_FAIL, False, False),
    ],
)
def test_what_fails_when_a_pod_is_made(error: Exception, code: ErrCode, undecided: bool, passing: bool) -> None:
    found = kubernetes_errors.of_create(error).code
    assert (found, kubernetes_errors.undecided(error), kubernetes_errors.passing(error)) == (code, undecided, passing)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ApiError(404, "x"), ErrCode.LOST),
        (ApiError(401, "x"), ErrCode.UPLOAD_FAIL),
        (ApiError(403, "x"), ErrCode.UPLOAD_FAIL),
        (ApiError(429, "x"), ErrCode.NET_FAIL),
        (ApiError(500, "x"), ErrCode.NET_FAIL),
        (UNREACHED, ErrCode.NET_FAIL),
        (aiohttp.ClientPayloadError("x"), ErrCode.NET_FAIL),
        (ConnectionResetError("x"), ErrCode.NET_FAIL),
        (Silent("x"), ErrCode.NET_FAIL),
        (StreamCut("x"), ErrCode.NET_FAIL),
        (ExecFailed("x"), ErrCode.UPLOAD_FAIL),
        (ValueError("x"), ErrCode.UPLOAD_FAIL),
    ],
)
def test_what_fails_with_a_pod(error: Exception, code: ErrCode) -> None:
    assert kubernetes_errors.of_phase(error, otherwise=ErrCode.UPLOAD_FAIL).code is code


def test_a_refusal_is_never_a_lost_pod() -> None:
    assert kubernetes_errors.of_phase(ApiError(403, "x"), otherwise=ErrCode.LOST).code is ErrCode.BOOT_FAIL


def _pod(state: dict[str, Any], **status: Any) -> dict[str, Any]:
    return {"metadata": {}, "status": {"containerStatuses": [{"name": "task", "state": state}], **status}}


DISRUPTED = [
    {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "more urgent"}
]
KILLED = {"terminated": {"exitCode": 137, "reason": "Error"}}


@pytest.mark.parametrize(
    ("pod", "code"),
    [
        (_pod({"running": {}}, phase="Running"), None),
        (_pod({"running": {}}, phase="Running", conditions=DISRUPTED), None),
        # An eviction passes through this: the reason comes with the phase.
        (_pod({"terminated": {"exitCode": 143, "reason": "Error"}}, phase="Running"), None),
        ({"metadata": {"deletionTimestamp": "now"}, "status": {"phase": "Running"}}, ErrCode.LOST),
        (_pod(KILLED, phase="Failed", reason="Evicted"), ErrCode.CMD_NONZERO),
        ({"metadata": {}, "status": {"phase": "Failed", "reason": "Evicted"}}, ErrCode.CMD_NONZERO),
        (_pod(KILLED, phase="Failed", reason="Evicted", conditions=DISRUPTED), ErrCode.LOST),
        (_pod({"terminated": {"exitCode": 0, "reason": "OOMKilled"}}, phase="Succeeded"), ErrCode.OOM),
        (_pod({"terminated": {"exitCode": 143, "reason": "Error"}}, phase="Failed"), ErrCode.CMD_NONZERO),
        (_pod({"terminated": {"exitCode": 143}}, phase="Failed", reason="DeadlineExceeded"), ErrCode.LOST),
        (_pod({"terminated": {"exitCode": 143}}, phase="Failed", reason="Terminated"), ErrCode.LOST),
        (_pod({"terminated": {"exitCode": 143}}, phase="Succeeded", conditions=DISRUPTED), ErrCode.LOST),
        (_pod(KILLED, phase="Failed"), ErrCode.LOST),
        ({"metadata": {}, "status": {"phase": "Failed", "reason": "NodeLost"}}, ErrCode.LOST),
        ({"metadata": {}}, None),
    ],
)
def test_how_a_pod_ended(pod: dict[str, Any], code: ErrCode | None) -> None:
    verdict = kubernetes_errors.of_pod(pod, Limits())
    assert (verdict.code if verdict else None) is code


@pytest.mark.parametrize(
    ("pod", "says"),
    [
        (_pod({"waiting": {"reason": "ContainerCreating"}}, phase="Pending"), None),
        (_pod({"waiting": {"reason": "ErrImagePull", "message": "m"}}, phase="Pending"), None),
        (_pod({"waiting": {"reason": "ImagePullBackOff", "message": "m"}}, phase="Pending"), "ImagePullBackOff: m"),
        (_pod({"waiting": {"reason": "InvalidImageName"}}, phase="Pending"), "InvalidImageName: no message"),
        (_pod({"terminated": {"exitCode": 1, "reason": "Error"}}, phase="Failed"), "Error: no message"),
        ({"metadata": {}, "status": {"phase": "Failed", "reason": "OutOfcpu", "message": "m"}}, "OutOfcpu: m"),
        ({"metadata": {}, "status": {"phase": "Pending"}}, None),
    ],
)
def test_why_a_pod_never_runs(pod: dict[str, Any], says: str | None) -> None:
    verdict = kubernetes_errors.of_boot(pod)
    assert (verdict is None) == (says is None)
    if verdict is not None and says is not None:
        assert verdict.code is ErrCode.BOOT_FAIL and says in str(verdict.note)


# --------------------------------------------------------------------------- networks


def test_public_reaches_no_private_address() -> None:
    rules = kubernetes_policies.shipped()["sisu-kodo-egress-public"]["spec"]["egress"]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    assert {block["cidr"] for block in blocks} == {"0.0.0.0/0", "::/0"}
    held = [ipaddress.ip_network(one) for block in blocks for one in block["except"]]
    assert held == sorted(held, key=lambda net: (net.version, net)), "in order, so that a missing one shows"
    private = ["10.1.2.3", "172.31.0.1", "192.168.1.1", "127.0.0.1", "0.0.0.0", "100.100.100.200", "169.254.169.254"]
    private += ["168.63.129.16", "192.0.0.192", "224.0.0.1", "255.255.255.255", "::1", "fd00:ec2::254", "fe80::1"]
    private += ["64:ff9b::a9fe:a9fe", "ff02::1", "2002:a9fe:a9fe::1"]
    for address in map(ipaddress.ip_address, private):
        assert any(address in net for net in held if net.version == address.version), address
    for address in map(ipaddress.ip_address, ("1.1.1.1", "151.101.1.69", "2606:4700::1111")):
        assert not any(address in net for net in held if net.version == address.version), address


@pytest.mark.parametrize("name", ["sisu-kodo-egress-none", "sisu-kodo-egress-public"])
def test_live_policies_are_compared_with_the_shipped(name: str) -> None:
    shipped = kubernetes_policies.shipped()[name]
    served = {**shipped, "metadata": {**shipped["metadata"], "uid": "u", "labels": {"team": "x"}}}
    assert kubernetes_policies.complaint(name, served) is None
    wider: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda spec: {**spec, "egress": [{}]},
        lambda spec: {**spec, "ingress": [{}]},
        lambda spec: {**spec, "policyTypes": ["Ingress"]},
        lambda spec: {**spec, "podSelector": {"matchLabels": {"a": "b"}}},
    ]
    for change in wider:
        altered = {**served, "spec": change(shipped["spec"])}
        assert "is not the shipped one" in str(kubernetes_policies.complaint(name, altered))
    leaving = {**served, "metadata": {**served["metadata"], "deletionTimestamp": "now"}}
    assert "is being deleted" in str(kubernetes_policies.complaint(name, leaving))
    assert "is missing" in str(kubernetes_policies.complaint(name, None))
