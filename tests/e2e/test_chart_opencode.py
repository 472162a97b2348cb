"""The chart's OpenCode side-car: where it is, what it gets and does not get, its password over upgrades, and what NOTES say."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller import config
from controller.oc import supervise
from devcluster.cluster import ControlPlane
from opencode.install import SHA256, VERSION, package
from tests.e2e.test_chart_render import (
    CHART,
    FLAGS,
    RELEASED,
    Case,
    _environment,
    _rendered,
    _try_pod,
    find,
    helm,
    pods,
    restricted,
)

__all__ = ["restricted"]
ROOT = Path(__file__).parents[2]
MODEL = ("opencode.model=planner-large", "opencode.modelBaseUrl=https://models.example/v1")
LIVE = Case()
SPLIT = Case(
    sets=(
        "controller.split=true",
        "opencode.mode=record",
        "opencode.modelSecret=provider",
        "opencode.existingSecret=mine",
        "opencode.stallMs=10000",
        "opencode.memoryMB=3000",
        "network.httpsProxy=http://proxy.corp:3128",
        "network.noProxy=.svc",
        "network.caConfigMap=corp-ca",
        "networkPolicy.enabled=true",
        "opencode.modelBaseUrl=http://llm.models.svc:8000/v1",
    )
)
Object = dict[str, Any]


def objects(case: Case) -> list[Object]:
    return [one for one in yaml.safe_load_all(_rendered(case)) if one]


def containers(case: Case, owner: str) -> dict[str, Object]:
    return {one["name"]: one for one in pods(objects(case))[owner]["spec"]["containers"]}


def secret_of(container: Object, variable: str) -> tuple[str, str]:
    (found,) = [one for one in container["env"] if one["name"] == variable]
    reference = found["valueFrom"]["secretKeyRef"]
    return reference["name"], reference["key"]


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """OC_BINARY and OC_CONFIG, which the image sets; stand-ins of the same names."""
    text = (ROOT / "Dockerfile").read_text()
    found = {name: Path(path) for name, path in re.findall(r"\b(OC_BINARY|OC_CONFIG)=(\S+)", text)}
    assert {name: str(path) for name, path in found.items()} == {
        "OC_BINARY": "/opt/opencode/opencode",
        "OC_CONFIG": "/app/opencode/opencode.json",
    }
    for path in (*found.values(), found["OC_CONFIG"].with_name("opencode.version")):
        (tmp_path / path.name).touch()
    return {name: str(tmp_path / path.name) for name, path in found.items()}


@pytest.mark.parametrize(
    ("sets", "where"),
    [
        ((), {"sisu-kodo-controller"}),
        (("opencode.mode=record",), {"sisu-kodo-controller"}),
        (("controller.split=true",), {"sisu-kodo-worker"}),
        (("opencode.mode=replay",), set()),
        (("opencode.baseUrl=http://daemon.example:4096",), set()),
    ],
    ids=lambda value: str(value),
)
def test_it_is_beside_the_worker_when_a_model_is_asked_and_no_daemon_is_named(
    sets: tuple[str, ...], where: set[str]
) -> None:
    case = Case(sets=sets)
    found = {name for name in pods(objects(case)) if "opencode" in containers(case, name)}
    assert found == where
    assert bool(find(objects(case), "Secret")) == bool(where)


def test_the_program_accepts_its_settings_and_worker_and_daemon_agree(image: dict[str, str]) -> None:
    for case, owner in ((LIVE, "sisu-kodo-controller"), (SPLIT, "sisu-kodo-worker")):
        both = containers(case, owner)
        daemon, worker = both["opencode"], both["controller"]
        assert daemon["args"] == ["oc-daemon"] and daemon["image"] == worker["image"]
        environment = _environment(daemon)
        known = {str(field.alias) for field in config.DaemonSettings.model_fields.values()}
        assert set(environment) <= known - {"OC_BINARY", "OC_CONFIG"}
        settings, other = config.load_daemon({**environment, **image}), config.load(_environment(worker))
        assert other.oc_base_url is None and settings.port == other.oc_server_port and settings.model == other.oc_model
        name = "OPENCODE_SERVER_PASSWORD"
        assert secret_of(daemon, name) == secret_of(worker, name)
        (mount,) = [one for one in daemon["volumeMounts"] if one["mountPath"] == str(settings.state)]
        assert mount["name"] not in {one["name"] for one in worker["volumeMounts"]}, "a home that nobody else sees"
        limit = {"Gi": 1024, "Mi": 1}[daemon["resources"]["limits"]["memory"][-2:]]
        assert int(daemon["resources"]["limits"]["memory"][:-2]) * limit >= 1536 + 100
        assert daemon["resources"]["requests"]["memory"] == "1536Mi"


def test_every_value_arrives(image: dict[str, str]) -> None:
    daemon = containers(SPLIT, "sisu-kodo-worker")["opencode"]
    settings = config.load_daemon({**_environment(daemon), **image})
    assert (settings.stall_ms, settings.memory_mb, settings.log_format) == (10000, 3000, "json")
    assert settings.child_environ() == {
        "OC_MODEL": "planner-large",
        "OC_MODEL_BASE_URL": "http://llm.models.svc:8000/v1",
        "OC_MODEL_API_KEY": "stand-in",
        "OC_STALL_MS": "10000",
        "HTTPS_PROXY": "http://proxy.corp:3128",
        "NO_PROXY": "127.0.0.1,localhost,.svc",
        "SSL_CERT_FILE": "/etc/sisu-kodo/ca/ca.crt",
    }
    assert secret_of(daemon, "OC_MODEL_API_KEY") == ("provider", "OC_MODEL_API_KEY")
    assert secret_of(daemon, "OPENCODE_SERVER_PASSWORD") == ("mine", "OPENCODE_SERVER_PASSWORD")


def test_secrets_are_only_where_they_are_needed() -> None:
    daemon = {one["name"] for one in containers(SPLIT, "sisu-kodo-worker")["opencode"]["env"]}
    assert not [name for name in daemon if "DATABASE" in name]
    worker = {one["name"] for one in containers(SPLIT, "sisu-kodo-worker")["controller"]["env"]}
    assert "OC_MODEL_API_KEY" not in worker
    controller = {one["name"] for one in containers(SPLIT, "sisu-kodo-controller")["controller"]["env"]}
    assert not controller & {"OC_MODEL_API_KEY", "OPENCODE_SERVER_PASSWORD"}
    assert "OC_MODEL_API_KEY" not in {
        one["name"] for one in containers(LIVE, "sisu-kodo-controller")["opencode"]["env"]
    }


def test_recordings_go_where_the_worker_may_write() -> None:
    both = containers(SPLIT, "sisu-kodo-worker")
    folder = Path(_environment(both["controller"])["OC_FIXTURES"])
    assert any(folder.is_relative_to(one["mountPath"]) for one in both["controller"]["volumeMounts"])
    assert "OC_FIXTURES" not in _environment(containers(LIVE, "sisu-kodo-controller")["controller"])


def test_probes_look_at_the_file_that_the_supervisor_touches() -> None:
    daemon = containers(LIVE, "sisu-kodo-controller")["opencode"]
    state = _environment(daemon)["OC_STATE"]
    ages = []
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        *python, program = daemon[name]["exec"]["command"]
        assert python == ["python", "-S", "-c"]
        assert f'"{state}/{supervise.HEALTHY}"' in program
        compile(program, name, "exec")
        ages.append(int(program.rpartition("> ")[2].rstrip(")")))
    assert ages == [30, 30, 300]


def test_its_pod_may_reach_the_provider_and_the_proxy() -> None:
    def ports(case: Case) -> list[int]:
        (policy,) = find(objects(case), "NetworkPolicy")
        return [one["port"] for one in policy["spec"]["egress"][0]["ports"] if one["protocol"] == "TCP"]

    walled = "networkPolicy.enabled=true"
    assert ports(SPLIT) == [53, 443, 6443, 5432, 8000, 3128]
    assert ports(Case(sets=(walled,))) == [53, 443, 6443, 5432], "https is there already"
    assert ports(Case(sets=(walled, "opencode.modelBaseUrl=http://models.example/v1"))) == [53, 443, 6443, 5432, 80]
    assert ports(Case(sets=(walled, "opencode.mode=replay", "opencode.modelBaseUrl=http://models.example/v1"))) == [
        53,
        443,
        6443,
        5432,
    ]
    assert ports(Case(sets=(walled, "opencode.baseUrl=http://daemon.example:4096"))) == [53, 443, 6443, 5432, 4096]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("opencode.model=",), "at '/opencode/model': minLength"),
        (("opencode.modelBaseUrl=",), "at '/opencode/modelBaseUrl': minLength"),
        (("opencode.modelBaseUrl=models.example",), "at '/opencode/modelBaseUrl'"),
        (('opencode.model=a"b',), "at '/opencode/model'"),
        (("opencode.stallMs=30000",), "at '/opencode/stallMs': maximum"),
        (("opencode.memoryMB=512",), "at '/opencode/memoryMB': minimum"),
        (("opencode.model=", "opencode.modelBaseUrl=", "opencode.mode=replay"), ""),
        (("opencode.model=", "opencode.modelBaseUrl=", "opencode.baseUrl=http://daemon.example:4096"), ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_side_car_without_a_model_is_refused_by_name(sets: tuple[str, ...], says: str) -> None:
    done = helm("template", "x", CHART, *FLAGS, *Case(sets=sets).flags, check=False)
    assert (done.returncode == 0) == (says == "") and says in done.stderr, done.stderr


@pytest.mark.parametrize("case", [LIVE, SPLIT], ids=["live", "split"])
def test_the_pod_is_restricted(cluster: Any, restricted: str, case: Case) -> None:
    for owner, pod in pods(objects(case)).items():
        answer = _try_pod(cluster, restricted, pod["spec"])
        assert answer.returncode == 0, f"{owner}: {answer.stderr}"
        for one in pod["spec"]["containers"]:
            assert one["securityContext"]["readOnlyRootFilesystem"] is True
            assert any(mount["mountPath"] == "/tmp" for mount in one["volumeMounts"]), "Python needs one"


def test_the_image_installs_the_pinned_daemon() -> None:
    text = (ROOT / "Dockerfile").read_text()
    name = "opencode-linux-x64"
    assert f"ARG OPENCODE_SHA256={SHA256[(name, VERSION)]}\n" in text and package().startswith("opencode-")
    assert f'"{name}@$(cat /tmp/opencode.version)"' in text
    shown = (ROOT / ".dockerignore").read_text().split()
    for path in re.findall(r"^COPY (opencode/\S+)(?: (opencode/opencode\S+))?", text, re.MULTILINE):
        assert all(f"!{one}" in shown for one in path if one), path


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster where nobody but helm has installed anything."""
    with ControlPlane(tmp_path_factory.mktemp("helm")) as running:
        yield running


def test_the_password_stays_over_upgrades_and_notes_say_what_the_mode_means(plane: ControlPlane) -> None:
    kubeconfig = ("--kubeconfig", plane.kubeconfig("admin"), "-n", RELEASED, "--no-hooks")

    def release(verb: str, *sets: str) -> str:
        flags = Case(sets=sets).flags
        return helm(
            verb, "sisu-kodo", CHART, *kubeconfig, *flags, *(["--create-namespace"] * (verb == "install"))
        ).stdout

    def password() -> bytes:
        query = ("get", "secret", "sisu-kodo-opencode", "-n", RELEASED, "-o", "yaml")
        data = yaml.safe_load(plane.kubectl(*query).stdout)["data"]
        return base64.b64decode(data["OPENCODE_SERVER_PASSWORD"])

    live = release("install")
    first = password()
    assert re.fullmatch(rb"[A-Za-z0-9]{32}", first)
    assert "Plans are made by planner-large at models.example. It is sent goals" in live
    record = release("upgrade", "opencode.mode=record", "controller.log.level=DEBUG")
    assert password() == first
    assert "kept in the worker, in /var/lib/sisu-kodo/turns: repository text, too." in record
    replay = release("upgrade", "opencode.mode=replay")
    assert "opencode.mode is replay: no model is asked." in replay and "Plans are made by" not in replay
    assert plane.kubectl("get", "secret", "sisu-kodo-opencode", "-n", RELEASED, check=False).returncode != 0
