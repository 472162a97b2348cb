"""The chart, with real helm, against a real API server: what it renders is accepted, restricted, and is what the program reads.

No Pods run here. Values come from charts/sisu-kodo/ci, the folder that chart tools read, too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from controller import config
from controller.core.contract import Egress, Limits
from controller.core.model import Owner
from controller.roles.worker import DRAIN_SECONDS
from controller.sbx import kubernetes_pod, kubernetes_policies
from controller.sbx.kubernetes_pod import PodSettings
from devcluster import build
from devcluster.cluster import ControlPlane
from devcluster.stack import Stack

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sisu-kodo"
SYSTEM = "sisu-kodo-system"
RELEASED = "released"  # the development cluster makes the controller's account in SYSTEM before helm could
MONITORING = "monitoring.coreos.com/v1"
FLAGS = (
    "--kube-version",
    build.KUBERNETES,
    "--api-versions",
    "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy",
)

Object = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a user installs: files of charts/sisu-kodo/ci, single values, a namespace."""

    files: tuple[str, ...] = ("default",)
    sets: tuple[str, ...] = ()
    namespace: str = SYSTEM

    @property
    def flags(self) -> list[str]:
        files = [x for name in self.files for x in ("--values", str(CHART / "ci" / f"{name}-values.yaml"))]
        return [*files, *(x for one in self.sets for x in ("--set", one))]


PODS = ("sandbox.provider=kubernetes", f"sandbox.kubernetes.templates=python=python@sha256:{'a' * 64}")
CASES = {
    "default": Case(),
    "split": Case(files=("split",)),
    "kind": Case(files=("kind",)),
    "monitored": Case(
        sets=(
            "monitoring.serviceMonitor.enabled=true",
            "monitoring.prometheusRule.enabled=true",
            "controller.replicas=2",
        )
    ),
    "walled": Case(sets=("networkPolicy.enabled=true",)),
    "typed by hand": Case(sets=("admission.mutating=never",)),
    "elsewhere": Case(sets=("serviceAccount.name=tiger", "database.migrate=false"), namespace="elsewhere"),
    "without controller": Case(files=(), sets=("controller.enabled=false",)),
    "pods": Case(files=("pods",)),
    "pods with claims": Case(
        files=("pods",), sets=("sandbox.kubernetes.claims=true", "sandbox.kubernetes.canary=10.0.0.10:9153")
    ),
    "pods in one": Case(files=("pods",), sets=("controller.split=false", "sandbox.kubernetes.createNamespace=false")),
    "pods without controller": Case(files=(), sets=("controller.enabled=false", "sandbox.provider=kubernetes")),
}
CASES |= {
    "private": Case(files=("private",)),
    "private in one": Case(files=("private",), sets=("controller.split=false",)),
    "private without grants": Case(sets=("privateRepositories.enabled=true",)),
    "private without controller": Case(
        files=(),
        sets=(
            "controller.enabled=false",
            "privateRepositories.enabled=true",
            "privateRepositories.secrets.team={forge}",
        ),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
running_cases = pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("without controller")])


def helm(*args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([build.ensure(build.HELM), *args], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@cache
def _rendered(case: Case) -> str:
    return helm("template", "sisu-kodo", CHART, "-n", case.namespace, *FLAGS, *case.flags).stdout


def rendered(name: str) -> list[Object]:
    return [one for one in yaml.safe_load_all(_rendered(CASES[name])) if one]


def find(objects: Sequence[Object], kind: str, name: str = "") -> list[Object]:
    return [one for one in objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]


def pods(objects: Sequence[Object]) -> dict[str, Object]:
    """Pod templates by the name of their Deployment or Job."""
    return {one["metadata"]["name"]: one["spec"]["template"] for one in objects if one["kind"] in ("Deployment", "Job")}


# --------------------------------------------------------------------------- helm


@every_case
def test_lint(name: str) -> None:
    done = helm("lint", "--strict", CHART, *FLAGS[:2], *CASES[name].flags, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rendering_twice_gives_the_same() -> None:
    again = helm("template", "sisu-kodo", CHART, "-n", SYSTEM, *FLAGS, *CASES["split"].flags).stdout
    assert again == _rendered(CASES["split"]), "nothing random: GitOps tools compare"


def test_the_package_is_whole_and_holds_no_tests(tmp_path: Path) -> None:
    helm("package", CHART, "--destination", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as package:
        members = {one.name.removeprefix("sisu-kodo/"): one for one in package.getmembers()}
    assert all(one.isfile() for one in members.values()), "links lead out of the package"
    assert {"files/sandboxes/egress.yaml", "files/alerts.yaml", "templates/NOTES.txt", "values.schema.json"} <= set(
        members
    )
    assert {f"templates/crds/{p.name}" for p in (ROOT / "crds").glob("*.yaml")} <= set(members)
    admission = {f"files/admission/{p.name}" for p in (ROOT / "controller" / "kube" / "admission").glob("*.yaml")}
    assert admission and admission <= set(members)
    assert not [name for name in members if name.startswith(("ci/", "tests/"))]


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("controller.randomSeed=",), "at '/controller/randomSeed': minLength"),
        (("database.existingSecret=",), "at '/database/existingSecret': minLength"),
        (("opencode.mode=",), "at '/opencode/mode': value must be one of 'live', 'record', 'replay'"),
        (("sandbox.mode=fake",), "at '/sandbox/mode': value must be one of"),
        (("sandbox.provider=docker",), "at '/sandbox/provider': value must be one of 'e2b', 'kubernetes', 'local'"),
        (("controller.replica=2",), "at '/controller': additional properties 'replica' not allowed"),
        (("controller.replicas=0",), "at '/controller/replicas': minimum"),
        (("controller.replicas=two",), "at '/controller/replicas': got string, want integer"),
        (("controller.image.digest=abc",), "at '/controller/image/digest'"),
        (("controller.terminationGracePeriodSeconds=3",), "at '/controller/terminationGracePeriodSeconds': minimum"),
        (("controller.workspaceSize=big",), "at '/controller/workspaceSize'"),
        (("controller.log.level=debug",), "at '/controller/log/level': value must be one of"),
        (("database.url=postgresql://x",), "at '/database': additional properties 'url' not allowed"),
        (("networkPolicy.egressPorts=null",), ""),
        (("sandbox.provider=kubernetes",), "at '/sandbox/kubernetes/templates': minLength"),
        (("sandbox.kubernetes.templates=python=python:3.12",), "at '/sandbox/kubernetes/templates'"),
        (("sandbox.kubernetes.tolerations={pool}",), "at '/sandbox/kubernetes/tolerations/0'"),
        (("sandbox.mode=live", *PODS, f"sandbox.kubernetes.namespace={SYSTEM}"), "is the release's own"),
        (("privateRepositories.secrets.team={}",), "at '/privateRepositories/secrets/team/0'"),
        (("privateRepositories.secrets.team=forge",), "at '/privateRepositories/secrets/team': got string, want array"),
        (("privateRepositories.secrets.team={*}",), "at '/privateRepositories/secrets/team/0'"),
        (("privateRepositories.secrets.kube_system={a}",), "invalid propertyName 'kube_system'"),
        (("privateRepositories.enable=true",), "additional properties 'enable' not allowed"),
        (("surprise=1",), "additional properties 'surprise' not allowed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_values_are_refused_by_name(sets: tuple[str, ...], says: str) -> None:
    done = helm("template", "x", CHART, "-n", SYSTEM, *FLAGS, *Case(sets=sets).flags, check=False)
    if says == "":  # null takes a default away, which is Helm's way; the chart must still render
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and says in done.stderr, done.stderr


def test_without_values_all_four_are_asked_for() -> None:
    done = helm("template", "x", CHART, *FLAGS, check=False)
    for path in ("/controller/randomSeed", "/database/existingSecret", "/opencode/mode", "/sandbox/mode"):
        assert path in done.stderr


# --------------------------------------------------------------------------- what the program reads


def _environment(container: Object) -> dict[str, str]:
    """As the process would see it; what comes from a Secret or the Pod is a stand-in."""
    return {one["name"]: one.get("value", "stand-in") for one in container["env"]}


@running_cases
def test_every_variable_is_one_that_the_program_reads(name: str) -> None:
    known = {field.alias for field in config.Settings.model_fields.values()}
    for pod in pods(rendered(name)).values():
        environment = _environment(pod["spec"]["containers"][0])
        assert set(environment) <= known, set(environment) - known


@running_cases
def test_the_program_accepts_its_settings(name: str) -> None:
    found = [pod for owner, pod in pods(rendered(name)).items() if owner != "sisu-kodo-migrate"]
    assert found
    for pod in found:
        container = pod["spec"]["containers"][0]
        settings = config.load(_environment(container))
        mounts = {Path(one["mountPath"]) for one in container["volumeMounts"]}
        assert settings.policy_file.parent in mounts and settings.workspace_root.parent in mounts
        assert settings.log_format in ("json", "text")
        assert container["ports"][0]["containerPort"] == settings.admin_port
        assert settings.service_account == CASES_ACCOUNT.get(name, "sisu-kodo-controller")


CASES_ACCOUNT = {"elsewhere": "tiger"}


def test_every_setting_of_the_split_arrives() -> None:
    found = pods(rendered("split"))
    controller, worker = (
        config.load(_environment(found[f"sisu-kodo-{role}"]["spec"]["containers"][0]))
        for role in ("controller", "worker")
    )
    assert (worker.random_seed, worker.app_version) == ("a seed: with 'odd' characters", "v2")
    assert (worker.oc_mode, worker.oc_base_url, worker.sbx_provider) == (
        "record",
        "http://127.0.0.1:4096",
        "e2b",
    )
    limits = worker.sbx_creates_per_second, worker.sbx_max_concurrent
    assert limits == (2.5, 40) and controller.sbx_max_concurrent is None
    assert worker.e2b_templates == {"python": "tmpl"} and controller.e2b_api_key == "" != worker.e2b_api_key
    assert (worker.e2b_domain, worker.e2b_api_url, worker.e2b_sandbox_url) == (
        "e2b.corp",
        "https://api.e2b.corp",
        "https://box.e2b.corp",
    )
    assert (worker.intent_concurrency, worker.sbx_concurrency, worker.poll_seconds) == (4, 64, 0.5)
    assert (worker.log_format, worker.log_level, worker.admin_port) == ("text", "DEBUG", 9002)
    assert worker.git_environ == {
        "HTTPS_PROXY": "http://proxy.corp:3128",
        "NO_PROXY": ".svc,10.0.0.0/8",
        "GIT_SSL_CAINFO": "/etc/sisu-kodo/ca/bundle.pem",
    }
    assert controller.oc_server_password == "" and worker.oc_server_password != ""


def test_each_process_has_its_own_login() -> None:
    def login(pod: Object, variable: str) -> str | None:
        found = [one for one in pod["spec"]["containers"][0]["env"] if one["name"] == variable]
        return found[0]["valueFrom"]["secretKeyRef"]["key"] if found else None

    found = pods(rendered("split"))
    assert {name: login(pod, "DATABASE_URL") for name, pod in found.items()} == {
        "sisu-kodo-controller": "controller",
        "sisu-kodo-worker": "worker",
        "sisu-kodo-migrate": "owner",
    }
    assert all(login(pod, "DATABASE_URL_WORKER") is None for pod in found.values())
    one = Case(sets=("database.workerKey=worker",))
    both = pods([x for x in yaml.safe_load_all(_rendered(one)) if x])["sisu-kodo-controller"]
    assert (login(both, "DATABASE_URL"), login(both, "DATABASE_URL_WORKER")) == ("DATABASE_URL", "worker")


def test_commands_exist() -> None:
    arguments = {name: pod["spec"]["containers"][0]["args"] for name, pod in pods(rendered("split")).items()}
    assert arguments == {
        "sisu-kodo-controller": ["run", "--role", "controller"],
        "sisu-kodo-worker": ["run", "--role", "worker"],
        "sisu-kodo-migrate": ["migrate"],
    }
    assert pods(rendered("default"))["sisu-kodo-controller"]["spec"]["containers"][0]["args"] == [
        "run",
        "--role",
        "all",
    ]


def test_images_are_named_exactly() -> None:
    split, default = pods(rendered("split")), pods(rendered("default"))
    assert {pod["spec"]["containers"][0]["image"] for pod in split.values()} == {
        "mirror/sisu-kodo@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    }
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert {pod["spec"]["containers"][0]["image"] for pod in default.values()} == {f"sisu-kodo:{version}"}


def test_pods_roll_with_the_policy_and_with_nothing_else() -> None:
    def checksum(*sets: str) -> str:
        objects = [one for one in yaml.safe_load_all(_rendered(Case(sets=sets))) if one]
        return str(pods(objects)["sisu-kodo-controller"]["metadata"]["annotations"]["checksum/policy"])

    assert checksum() == checksum("controller.replicas=2") != checksum("policy.default.required=2")


@running_cases
def test_a_stop_may_take_longer_than_it_does(name: str) -> None:
    for one in find(rendered(name), "Deployment"):
        assert one["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > DRAIN_SECONDS + 5
        assert one["spec"]["strategy"] == {"type": "Recreate"}


# --------------------------------------------------------------------------- rights and networks


def test_the_worker_may_do_nothing() -> None:
    objects = rendered("split")
    pod = pods(objects)["sisu-kodo-worker"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    account = find(objects, "ServiceAccount", pod["serviceAccountName"])[0]
    assert account["automountServiceAccountToken"] is False
    subjects = [s for one in objects for s in one.get("subjects", ())]
    assert {s["name"] for s in subjects} == {"sisu-kodo-controller"}
    assert pods(objects)["sisu-kodo-migrate"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("name", "account"),
    [
        ("pods", "sisu-kodo-worker"),
        ("pods in one", "sisu-kodo-controller"),
        ("pods without controller", "sisu-kodo-controller"),
    ],
)
def test_who_runs_tasks_may_make_pods_where_sandboxes_are_and_nothing_else(name: str, account: str) -> None:
    objects = rendered(name)
    (role,) = find(objects, "Role", "sisu-kodo-sandboxes")
    (binding,) = find(objects, "RoleBinding", "sisu-kodo-sandboxes")
    namespace = "sisu-kodo-sandboxes" if "without" in name else "boxes"
    assert {role["metadata"]["namespace"], binding["metadata"]["namespace"]} == {namespace} != {SYSTEM}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": SYSTEM}]
    assert {(one["resources"][0], *one["verbs"]) for one in role["rules"]} == {
        ("pods", "create", "delete", "get", "list"),
        ("pods/exec", "create", "get"),
        ("networkpolicies", "get"),
    }
    bound = [one for one in objects if account in json.dumps(one.get("subjects", ""))]
    assert account == "sisu-kodo-controller" or bound == [binding]
    for owner, pod in pods(objects).items():
        assert pod["spec"]["automountServiceAccountToken"] is (owner != "sisu-kodo-migrate")


def test_claims_bring_the_rights_for_claims_and_no_more() -> None:
    (role,) = find(rendered("pods with claims"), "Role", "sisu-kodo-sandboxes")
    (plain,) = find(rendered("pods"), "Role", "sisu-kodo-sandboxes")
    added = [one for one in role["rules"] if one not in plain["rules"]]
    assert {(*one["apiGroups"], one["resources"][0], *one["verbs"]) for one in added} == {
        ("extensions.agents.x-k8s.io", "sandboxclaims", "create", "delete", "get", "list"),
        ("extensions.agents.x-k8s.io", "sandboxwarmpools", "list"),
        ("extensions.agents.x-k8s.io", "sandboxtemplates", "list"),
    }
    env = {
        e["name"]: e.get("value")
        for e in pods(rendered("pods with claims"))["sisu-kodo-worker"]["spec"]["containers"][0]["env"]
    }
    assert env["SBX_KUBERNETES_CLAIMS"] == "true"


@pytest.mark.parametrize(("release", "canary"), [("pods", "api-server"), ("pods with claims", "10.0.0.10:9153")])
def test_the_canary_is_told(release: str, canary: str) -> None:
    (container, *_) = pods(rendered(release))["sisu-kodo-worker"]["spec"]["containers"]
    assert {"name": "SBX_KUBERNETES_CANARY", "value": canary} in container["env"]


def test_the_sandboxes_namespace_is_restricted_and_walled() -> None:
    objects = rendered("pods")
    (namespace,) = find(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    policies = {one["metadata"]["name"]: one for one in find(objects, "NetworkPolicy")}
    for policy, shipped in kubernetes_policies.shipped().items():
        assert policies[policy]["spec"] == shipped["spec"] and policies[policy]["metadata"]["namespace"] == "boxes"
    (quota,) = find(objects, "ResourceQuota")
    assert quota["spec"]["hard"] == {"pods": "50", "requests.cpu": "32", "requests.memory": "64Gi"}
    assert find(rendered("pods in one"), "Namespace") == find(rendered("default"), "NetworkPolicy") == []


def test_every_setting_of_pods_arrives() -> None:
    found = pods(rendered("pods"))
    worker, controller = (
        config.load(_environment(found[f"sisu-kodo-{role}"]["spec"]["containers"][0]))
        for role in ("worker", "controller")
    )
    assert (worker.sbx_provider, worker.sbx_kubernetes_namespace) == ("kubernetes", "boxes")
    assert worker.kubernetes_templates == {"python": f"registry.corp/python@sha256:{'0123456789abcdef' * 4}"}
    assert (worker.sbx_kubernetes_runtime_class, worker.sbx_kubernetes_pull_secrets) == ("gvisor", "mirror")
    assert worker.kubernetes_node_selector == {"pool": "sandboxes", "disk": "fast"}
    assert [one["key"] for one in worker.kubernetes_tolerations] == ["pool", "spot"]
    assert worker.sbx_kubernetes_boot_seconds == 60
    assert controller.kubernetes_templates == {}


@pytest.mark.parametrize(
    ("name", "account", "granted"),
    [
        ("private", "sisu-kodo-worker", {"payments": ["forge-payments", "forge.mirror"], "tools": ["forge"]}),
        (
            "private in one",
            "sisu-kodo-controller",
            {"payments": ["forge-payments", "forge.mirror"], "tools": ["forge"]},
        ),
        ("private without grants", "sisu-kodo-controller", {}),
        ("private without controller", "sisu-kodo-controller", {"team": ["forge"]}),
        ("split", "sisu-kodo-worker", {}),
        ("default", "sisu-kodo-controller", {}),
    ],
)
def test_who_plans_may_get_the_secrets_that_are_named_and_no_others(
    name: str, account: str, granted: dict[str, list[str]]
) -> None:
    objects = rendered(name)
    roles = [one for one in objects if "secrets" in str(one.get("rules", ""))]
    assert {one["kind"] for one in roles} <= {"Role"}, "never in the whole cluster"
    assert {one["metadata"]["namespace"]: one["rules"] for one in roles} == {
        namespace: [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": names, "verbs": ["get"]}]
        for namespace, names in granted.items()
    }
    bindings = find(objects, "RoleBinding", "sisu-kodo-git")
    assert {one["metadata"]["namespace"] for one in bindings} == set(granted)
    for one in bindings:
        assert one["roleRef"]["kind"] == "Role" and one["roleRef"]["name"] == "sisu-kodo-git"
        assert one["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": SYSTEM}]
    for owner, pod in pods(objects).items():
        settings = {} if owner == "sisu-kodo-migrate" else _environment(pod["spec"]["containers"][0])
        assert settings.get("WORKSPACE_SECRETS") == ("true" if settings and name.startswith("private") else None)
        enabled = owner == "sisu-kodo-controller" or (owner == "sisu-kodo-worker" and name == "private")
        assert pod["spec"]["automountServiceAccountToken"] is enabled


def test_an_empty_list_of_secrets_never_means_all_of_them() -> None:
    """A rule without names is one for every Secret: the schema refuses it, and the template renders no rule."""
    flags = ("--set", "privateRepositories.enabled=true", "--set-json", 'privateRepositories.secrets={"team":[]}')
    render: tuple[str | Path, ...] = ("template", "x", CHART, "-n", SYSTEM, *FLAGS, *Case().flags, *flags)
    done = helm(*render, check=False)
    assert done.returncode != 0 and "at '/privateRepositories/secrets/team': minItems" in done.stderr
    objects = [one for one in yaml.safe_load_all(helm(*render, "--skip-schema-validation").stdout) if one]
    assert [one for one in objects if "secrets" in str(one.get("rules", ""))] == []


def test_secrets_without_the_switch_are_not_granted() -> None:
    case = Case(sets=("privateRepositories.secrets.team={forge}",))
    assert find([one for one in yaml.safe_load_all(_rendered(case)) if one], "Role", "sisu-kodo-git") == []


def test_names_follow_namespace_and_account() -> None:
    objects = rendered("elsewhere")
    assert pods(objects)["sisu-kodo-controller"]["spec"]["serviceAccountName"] == "tiger"
    namespaced = {one["metadata"]["namespace"] for one in objects if "namespace" in one["metadata"]}
    assert namespaced == {"elsewhere"}
    assert "system:serviceaccount:elsewhere:tiger" in json.dumps(find(objects, "ValidatingAdmissionPolicy"))
    assert find(objects, "Job") == []


def _selects(selector: Mapping[str, str], pod: Object) -> bool:
    return bool(selector.items() <= pod["metadata"]["labels"].items())


@running_cases
def test_selectors_find_what_they_are_for(name: str) -> None:
    objects = rendered(name)
    found = pods(objects)
    service = find(objects, "Service")[0]
    assert {owner for owner, pod in found.items() if _selects(service["spec"]["selector"], pod)} == {
        owner for owner in found if owner != "sisu-kodo-migrate"
    }
    for one in find(objects, "Deployment") + find(objects, "PodDisruptionBudget"):
        mine = {o for o, pod in found.items() if _selects(one["spec"]["selector"]["matchLabels"], pod)}
        assert mine == {one["metadata"]["name"]}
    for one in find(objects, "NetworkPolicy", "sisu-kodo"):
        assert all(_selects(one["spec"]["podSelector"]["matchLabels"], pod) for pod in found.values())


def test_disruption_budgets_come_with_replicas() -> None:
    assert find(rendered("default"), "PodDisruptionBudget") == []
    assert {one["metadata"]["name"] for one in find(rendered("split"), "PodDisruptionBudget")} == {
        "sisu-kodo-controller",
        "sisu-kodo-worker",
    }


# --------------------------------------------------------------------------- monitoring: kinds that a bare API server lacks


def test_monitoring_is_off_by_default() -> None:
    assert [one for one in rendered("default") if one["apiVersion"] == MONITORING] == []


@pytest.mark.parametrize("name", ["monitored", "split"])
def test_the_service_monitor_finds_the_service(name: str) -> None:
    objects = rendered(name)
    (monitor,) = find(objects, "ServiceMonitor")
    (service,) = find(objects, "Service")
    assert monitor["apiVersion"] == MONITORING
    assert set(monitor["spec"]) == {"jobLabel", "selector", "endpoints"}
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["jobLabel"] in service["metadata"]["labels"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics" and re.fullmatch(r"\d+s", endpoint["interval"])


def test_the_rules_are_the_tested_ones() -> None:
    plain = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    (rule,) = find(rendered("monitored"), "PrometheusRule")
    assert rule["apiVersion"] == MONITORING
    assert rule["spec"] == plain
    (moved,) = find(rendered("split"), "PrometheusRule")
    assert moved["metadata"]["labels"]["release"] == "prometheus"
    for one in moved["spec"]["groups"][0]["rules"]:
        expected = f"https://wiki.corp/sisu-kodo/runbooks#{one['alert'].lower()}"
        assert one["annotations"]["runbook_url"] == expected


# --------------------------------------------------------------------------- a real API server


@every_case
def test_the_api_server_takes_every_object(cluster: Stack, name: str) -> None:
    objects = [one for one in rendered(name) if one["apiVersion"] != MONITORING]
    namespace = CASES[name].namespace
    for one in {namespace, *(x["metadata"].get("namespace", namespace) for x in objects)}:
        cluster.kubectl("create", "namespace", one, check=False)
    documents = "\n---\n".join(json.dumps(one) for one in objects)
    flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    done = cluster.kubectl("apply", *flags, "-f", "-", stdin=documents, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == len(objects)


def test_the_database_of_make_kind_up_is_taken(cluster: Stack) -> None:
    """`make kind-up` needs Docker, so its own objects are tried here; the Secret is the one that its values name."""
    path = CHART / "ci" / "kind-postgres.yaml"
    flags = ("--server-side", "--dry-run=server", "--validate=strict")
    done = cluster.kubectl("apply", *flags, "-n", SYSTEM, "-f", str(path), check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    secret = find(list(yaml.safe_load_all(path.read_text())), "Secret")[0]
    reference = pods(rendered("kind"))["sisu-kodo-migrate"]["spec"]["containers"][0]["env"][0]["valueFrom"][
        "secretKeyRef"
    ]
    assert secret["metadata"]["name"] == reference["name"] and reference["key"] in secret["stringData"]


@pytest.fixture(scope="module")
def restricted(cluster: Stack) -> Iterator[str]:
    """A namespace where only restricted Pods are admitted."""
    name = "restricted"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def test_the_api_server_keeps_the_network_policies_as_they_are(cluster: Stack, restricted: str) -> None:
    """The provider compares them whole: what the server fills in would be a difference."""
    for name, policy in kubernetes_policies.shipped().items():
        cluster.kubectl("apply", "-n", restricted, "-f", "-", stdin=json.dumps(policy))
        live = json.loads(cluster.kubectl("get", "networkpolicy", name, "-n", restricted, "-o", "json").stdout)
        assert kubernetes_policies.complaint(name, live) is None


@pytest.mark.parametrize("mode", ["None", "Public"])
def test_a_tasks_pod_is_restricted(cluster: Stack, restricted: str, mode: Any) -> None:
    settings = PodSettings(namespace=restricted)
    owner = Owner(store_id="s", run_id="r", task_key="k", attempt=1, fence=1)
    image = f"registry.corp/python@sha256:{'a' * 64}"
    template = kubernetes_pod.template(Limits(), Egress(mode=mode), image=image, settings=settings)
    pod = kubernetes_pod.manifest(template, owner=owner, settings=settings, seconds=60)
    flags = ("--dry-run=server", "--validate=strict", "-f", "-")
    done = cluster.kubectl("create", *flags, stdin=json.dumps(pod), check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    pod["spec"]["containers"][0]["securityContext"].pop("capabilities")
    done = cluster.kubectl("create", *flags, stdin=json.dumps(pod), check=False)
    assert done.returncode != 0 and "violates PodSecurity" in done.stderr


def _try_pod(cluster: Stack, namespace: str, spec: Object) -> subprocess.CompletedProcess[str]:
    # The development cluster's API server asks for a service account that exists.
    spec = {**spec, "serviceAccountName": "default"}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "try", "namespace": namespace}, "spec": spec}
    return cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(body), check=False)


@running_cases
def test_pods_are_restricted(cluster: Stack, restricted: str, name: str) -> None:
    found = pods(rendered(name))
    assert found
    for owner, pod in found.items():
        answer = _try_pod(cluster, restricted, pod["spec"])
        assert answer.returncode == 0, f"{owner}: {answer.stderr}"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], "a node's disk is not ours to fill"
        assert pod["spec"]["containers"][0]["resources"]["limits"]["memory"]


@pytest.mark.parametrize("loosened", ["allowPrivilegeEscalation", "capabilities"])
def test_a_looser_pod_is_refused(cluster: Stack, restricted: str, loosened: str) -> None:
    """The test above can fail."""
    spec = json.loads(json.dumps(pods(rendered("default"))["sisu-kodo-controller"]["spec"]))
    del spec["containers"][0]["securityContext"][loosened]
    answer = _try_pod(cluster, restricted, spec)
    assert answer.returncode != 0 and loosened in answer.stderr, answer.stderr


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster where nobody but helm has installed anything."""
    with ControlPlane(tmp_path_factory.mktemp("helm")) as running:
        yield running


def test_install_upgrade_uninstall(plane: ControlPlane, tmp_path: Path) -> None:
    """CRDs are upgraded with the release and stay without it, with every Intent; all else goes. Hooks would wait for Pods."""
    kubeconfig = ("--kubeconfig", plane.kubeconfig("admin"))

    def release(verb: str, chart: Path, *flags: str) -> str:
        return helm(verb, "sisu-kodo", chart, "-n", RELEASED, "--no-hooks", *kubeconfig, *flags).stdout

    def names(kind: str, *flags: str) -> list[str]:
        return plane.kubectl("get", kind, "-o", "name", *flags).stdout.split()

    notes = release("install", CHART, "--create-namespace", *CASES["default"].flags)
    assert "kubectl -n released rollout status deployment/sisu-kodo-controller" in notes
    assert 'add "approver"' not in notes, "this server fills the name in, and helm sees that it does"
    assert names("deployment", "-n", RELEASED) == ["deployment.apps/sisu-kodo-controller"]
    plane.kubectl("wait", "--for=condition=Established", "crd/intents.sisukodo.dev", "--timeout=30s")

    newer = tmp_path / "chart"
    shutil.copytree(CHART, newer)  # links become files
    crd = newer / "templates" / "crds" / "intents.yaml"
    # A printer column more: what a new release brings.
    document = yaml.safe_load(crd.read_text())
    column = {"name": "Newer", "type": "string", "jsonPath": ".spec.goal", "priority": 1}
    document["spec"]["versions"][0]["additionalPrinterColumns"].append(column)
    crd.write_text(yaml.safe_dump(document))
    split = [*Case(files=("split",)).flags, *("--set", "monitoring.serviceMonitor.enabled=false")]
    release("upgrade", newer, *split, "--set", "monitoring.prometheusRule.enabled=false")
    assert "Newer" in plane.kubectl("get", "crd", "intents.sisukodo.dev", "-o", "json").stdout
    assert len(names("deployment", "-n", RELEASED)) == 2
    release("upgrade", CHART, *CASES["default"].flags)  # and back: selectors are the same
    assert len(names("deployment", "-n", RELEASED)) == 1

    intent = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "metadata": {"name": "kept"}}
    body, deadline = json.dumps({**intent, "spec": {"goal": "stay"}}), time.monotonic() + 30
    # "There can be a delay between when CustomResourceDefinitions are created and when they are available."
    while plane.kubectl("apply", "-n", "default", "-f", "-", stdin=body, check=False).returncode != 0:
        assert time.monotonic() < deadline, "the kind is not served"
    helm("uninstall", "sisu-kodo", "-n", RELEASED, "--no-hooks", "--wait", *kubeconfig)
    assert names("crd") == [
        f"customresourcedefinition.apiextensions.k8s.io/{p}.sisukodo.dev" for p in ("intents", "planapprovals")
    ]
    assert names("intents", "-n", "default") == ["intent.sisukodo.dev/kept"]
    assert names("deployment", "-n", RELEASED) == []
    assert not [x for x in names("validatingadmissionpolicies") if "sisukodo.dev" in x]
    # Installed again, helm adopts the CRDs that it kept.
    release("install", CHART, *CASES["default"].flags)


# --------------------------------------------------------------------------- runbooks


SQL = re.findall(r"^```sql\n(.*?)^```", (ROOT / "docs" / "runbooks.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_runbooks_sql_is_understood(cluster: Stack) -> None:
    queries = [query for block in SQL for query in block.split(";") if query.replace("-", "").strip()]
    assert len(queries) >= 6
    with psycopg.connect(cluster.database, autocommit=True) as connection:
        for query in queries:
            connection.execute(query.encode())
