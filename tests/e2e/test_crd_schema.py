"""What the CRDs' own rules admit and deny on the real API server, and how Intents live with apply, replace and kubectl's views."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

CRDS = Path(__file__).parents[2] / "crds"
COUNT = itertools.count(1)


class Cluster(Protocol):
    def kubectl(
        self, *args: str, user: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]: ...


class Space:
    """A namespace of its own; carol writes Intents in it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def run(self, *args: str, body: object = None, user: str = "carol") -> subprocess.CompletedProcess[str]:
        stdin = None if body is None else json.dumps(body)
        return self.cluster.kubectl("-n", self.name, *args, user=user, stdin=stdin, check=False)

    def ok(self, *args: str, body: object = None, user: str = "carol") -> str:
        got = self.run(*args, body=body, user=user)
        assert got.returncode == 0, got.stderr
        return got.stdout

    def refused(self, *args: str, body: object = None, user: str = "carol") -> str:
        got = self.run(*args, body=body, user=user)
        assert got.returncode != 0, f"admitted: {got.stdout}"
        return got.stderr

    def create(self, spec: Mapping[str, Any], *, name: str = "") -> str:
        body = manifest(spec, name=name)
        self.ok("create", "-f", "-", body=body)
        return str(body["metadata"]["name"])

    def patch(self, name: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return ("patch", "intent", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def status(self, name: str, **fields: Any) -> None:
        body = json.dumps({"status": fields})
        self.ok("patch", "intent", name, "--subresource=status", "--type=merge", "-p", body, user="controller")

    def spec(self, name: str) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self.ok("get", "intent", name, "-o", "json"))["spec"]
        return spec


def manifest(spec: Mapping[str, Any], *, name: str = "") -> dict[str, Any]:
    return {
        "apiVersion": "sisukodo.dev/v1alpha1",
        "kind": "Intent",
        "metadata": {"name": name or f"case-{next(COUNT)}"},
        "spec": {"goal": "median() is wrong", **spec},
    }


@pytest.fixture(scope="module")
def space(cluster: Cluster) -> Iterator[Space]:
    name = f"schema-{int(time.time()) % 100_000}"
    cluster.kubectl("create", "namespace", name)
    space = Space(cluster, name)
    # Rules and the mutating policy act some seconds after they were applied.
    deadline = time.monotonic() + 60
    while True:
        probe = space.run("create", "--dry-run=server", "-o", "json", "-f", "-", body=manifest({}))
        if probe.returncode == 0 and json.loads(probe.stdout)["spec"].get("requestedBy") == "carol@corp":
            break
        assert time.monotonic() < deadline, probe.stderr
        time.sleep(0.2)
    yield space
    cluster.kubectl("delete", "namespace", name, "--wait=false")


FULL = {
    "inputs": {"issue": {"n": 1, "labels": ["a", {"b": [1.5, True]}]}},
    "constraints": {"keep": ["src/api.ts"]},
    "workspace": {"git": {"url": "https://example.com/x.git", "ref": "main"}},
    "approval": {"required": 2, "expiresAfterSeconds": 60},
    "sandbox": {"template": "python", "cpu": "1", "egress": {"mode": "Allow", "allow": ["packages.example.com"]}},
    "limits": {"maxTasks": 5, "parallelism": 2},
}
CHANGED: dict[str, Any] = {
    "goal": "another",
    "inputs": {"issue": {"n": 2}},
    "constraints": {"keep": ["src/api.ts", "x"]},
    "workspace": {"git": {"ref": "other"}},
    "approval": {"required": 1},
    "sandbox": {"egress": {"mode": "Public", "allow": None}},
    "limits": {"parallelism": 3},
}


@pytest.mark.parametrize("field", CHANGED)
def test_a_frozen_field_cannot_be_changed(space: Space, field: str) -> None:
    name = space.create(FULL)
    assert f"{field} {'are' if field.endswith('s') else 'is'} fixed" in space.refused(
        *space.patch(name, {field: CHANGED[field]})
    )


@pytest.mark.parametrize("field", FULL)
def test_a_frozen_field_cannot_be_removed_or_added(space: Space, field: str) -> None:
    removed, added = space.create(FULL), space.create({})
    assert "fixed when the Intent is created" in space.refused(*space.patch(removed, {field: None}))
    assert "fixed when the Intent is created" in space.refused(*space.patch(added, {field: FULL[field]}))


def test_a_full_intent_can_be_applied_again(space: Space) -> None:
    body = manifest({**FULL, "priority": 1, "ttlSecondsAfterFinished": 60, "recipe": "sandbox-default"})
    space.ok("apply", "-f", "-", body=body)
    assert "unchanged" in space.ok("apply", "-f", "-", body=body)
    space.ok("replace", "-f", "-", body=body)


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": True},
        {"cancel": True},
        {"retry": 3},
        {"priority": -5},
        {"ttlSecondsAfterFinished": 0},
        {"queuePartitionKey": "tenant-1"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_others_can_be_set_later(space: Space, change: dict[str, Any]) -> None:
    name = space.create(FULL)
    space.ok(*space.patch(name, change))
    assert change.items() <= space.spec(name).items()


def test_suspend_priority_and_ttl_can_go_again(space: Space) -> None:
    name = space.create({"suspend": True, "priority": 5, "ttlSecondsAfterFinished": 9})
    space.ok(*space.patch(name, {"suspend": None, "priority": None, "ttlSecondsAfterFinished": None}))
    assert set(space.spec(name)) == {"goal", "requestedBy"}


def test_cancel_is_one_way(space: Space) -> None:
    name = space.create({"cancel": False})
    space.ok(*space.patch(name, {"cancel": True}))
    assert "cancel is one-way" in space.refused(*space.patch(name, {"cancel": False}))
    space.ok(*space.patch(name, {"cancel": None}))
    assert space.spec(name)["cancel"] is True


def test_retry_never_decreases(space: Space) -> None:
    name = space.create({})
    space.ok(*space.patch(name, {"retry": 2}))
    assert "retry is a counter that never decreases" in space.refused(*space.patch(name, {"retry": 1}))
    space.ok(*space.patch(name, {"retry": None}))
    assert space.spec(name)["retry"] == 2
    space.ok(*space.patch(name, {"retry": 3}))


def test_the_partition_is_added_once(space: Space) -> None:
    name = space.create({})
    space.ok(*space.patch(name, {"queuePartitionKey": "tenant-1"}))
    for value in ("tenant-2", None):
        assert "queuePartitionKey may be added once" in space.refused(*space.patch(name, {"queuePartitionKey": value}))


def test_the_recipe_is_set_while_suspended(space: Space) -> None:
    running, waiting = space.create({}), space.create({"suspend": True})
    message = "recipe may be set only while the Intent is suspended and has not started"
    assert message in space.refused(*space.patch(running, {"recipe": "other"}))
    space.ok(*space.patch(waiting, {"recipe": "one"}))
    space.ok(*space.patch(waiting, {"recipe": "two", "suspend": False}))
    assert message in space.refused(*space.patch(waiting, {"recipe": None}))


def test_the_recipe_stays_once_it_has_started(space: Space) -> None:
    name = space.create({"suspend": True})
    space.status(name, startedAt="2026-01-01T00:00:00Z")
    assert "has not started" in space.refused(*space.patch(name, {"recipe": "other"}))
    space.ok(*space.patch(name, {"suspend": False}))


@pytest.mark.parametrize(("length", "fits"), [(200, True), (201, False)])
def test_names_leave_room_for_the_approvals_name(space: Space, length: int, fits: bool) -> None:
    args, body = ("create", "--dry-run=server", "-f", "-"), manifest({}, name="n" * length)
    if fits:
        space.ok(*args, body=body)
    else:
        assert "metadata.name may have at most 200 characters" in space.refused(*args, body=body)


def git(url: str, **more: str) -> dict[str, Any]:
    return {"workspace": {"git": {"url": url, **more}}}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"goal": ""}, "spec.goal"),
        ({"goal": "x" * 8193}, "Too long: may not be more than 8192"),
        ({"goal": "x" * 8192}, None),
        ({"inputs": []}, "spec.inputs"),
        ({"gaol": "x"}, 'unknown field "spec.gaol"'),
        (git("https://github.com/x/y.git", ref="refs/heads/a_b"), None),
        (git("http://127.0.0.1:80/x"), None),
        (git("http://[::1]:80/x"), None),
        (git("http://localhost/x", ref="v1.0+b"), None),
        (git("http://example.com/x"), "use https://host/path without a user"),
        (git("http://127.0.0.1@example.com/x"), "use https://host/path without a user"),
        (git("https://me:secret@example.com/x"), "use https://host/path without a user"),
        (git("https://example.com/x?token=y"), "use https://host/path without a user"),
        (git("ext::sh -c id"), "use https://host/path without a user"),
        (git("https://example.com/x\n"), "use https://host/path without a user"),
        (git("https://example.com/x", ref="--upload-pack=id"), "use a branch, tag or commit"),
        (git("https://example.com/x", ref="a..b"), "use a branch, tag or commit"),
        (git("https://example.com/x", ref="a b"), "use a branch, tag or commit"),
        ({"queuePartitionKey": "a/b"}, "use letters, digits"),
        ({"priority": 1001}, "spec.priority"),
        ({"retry": -1}, "spec.retry"),
        ({"approval": {"required": 0}}, "spec.approval.required"),
        ({"approval": {"required": 9}}, "spec.approval.required"),
        ({"sandbox": {"cpu": 2, "memory": "2Gi", "egress": {"mode": "None"}}}, None),
        ({"sandbox": {"cpu": "0.5"}}, None),
        ({"sandbox": {"cpu": "0"}}, "spec.sandbox.cpu"),
        ({"sandbox": {"cpu": 0}}, "spec.sandbox.cpu"),
        ({"sandbox": {"cpu": "lots"}}, "spec.sandbox.cpu"),
        ({"sandbox": {"memory": "512"}}, "spec.sandbox.memory"),
        ({"sandbox": {"template": "-x"}}, "use the name of a template"),
        ({"sandbox": {"egress": {"mode": "All"}}}, "Unsupported value"),
        ({"sandbox": {"egress": {"mode": "Allow"}}}, "give both or neither"),
        ({"sandbox": {"egress": {"mode": "Public", "allow": ["x.org"]}}}, "give both or neither"),
        ({"sandbox": {"egress": {"mode": "Allow", "allow": ["https://x.org"]}}}, "use host or host:port"),
        ({"sandbox": {"egress": {"mode": "Allow", "allow": ["x.org", "x.org"]}}}, "Duplicate value"),
        ({"limits": {"maxTasks": 10001}}, "spec.limits.maxTasks"),
        ({"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    ],
)
def test_values(space: Space, spec: dict[str, Any], says: str | None) -> None:
    args, body = ("create", "--dry-run=server", "-f", "-"), manifest(spec)
    if says is None:
        space.ok(*args, body=body)
    else:
        assert says in space.refused(*args, body=body)


@pytest.mark.parametrize("apply", [("apply",), ("apply", "--server-side"), ("replace",)], ids=" ".join)
def test_a_manifest_that_knows_nothing_of_cancel_keeps_it(space: Space, apply: tuple[str, ...]) -> None:
    """GitOps: the manifest in git has none of the fields that people set on the live object."""
    body = manifest({})
    name = body["metadata"]["name"]
    first = apply if apply[0] == "apply" else ("create",)
    space.ok(*first, "-f", "-", body=body)
    space.ok(*space.patch(name, {"cancel": True, "retry": 2, "ttlSecondsAfterFinished": 60, "suspend": True}))
    space.ok(*apply, "-f", "-", body=body)
    spec = space.spec(name)
    assert (spec["cancel"], spec["retry"], spec["requestedBy"]) == (True, 2, "carol@corp")
    # replace means what it says for the rest
    assert ("suspend" in spec, "ttlSecondsAfterFinished" in spec) == ((apply[0] == "apply"),) * 2


def test_a_second_apply_writes_nothing(space: Space) -> None:
    body = manifest({"priority": 1})
    space.ok("apply", "--server-side", "-f", "-", body=body)
    version = ("get", "intent", body["metadata"]["name"], "-o", "jsonpath={.metadata.resourceVersion}")
    before = space.ok(*version)
    space.ok("apply", "--server-side", "-f", "-", body=body)
    assert space.ok(*version) == before


def test_a_big_status_fits(space: Space) -> None:
    name = space.create({})
    failures = [{"task": f"t-{i}", "errCode": "CMD_NONZERO", "message": "x" * 256} for i in range(10)]
    space.status(name, failures=failures, phase="Failed", tasks={"total": 1000, "failed": 10, "display": "1000/1000"})
    body = json.dumps({"status": {"failures": [*failures, failures[0]]}})
    args = ("patch", "intent", name, "--subresource=status", "--type=merge", "-p", body)
    assert "must have at most 10 items" in space.refused(*args, user="controller")


def test_kubectl_get_shows_where_it_stands(space: Space) -> None:
    name = space.create({"queuePartitionKey": "tenant-1"})
    space.status(
        name,
        phase="WaitingInput",
        reason="plan_not_approved",
        lastStep="DecideST",
        plan={"digest": "sha256:abc", "approvalName": f"{name}-abc", "taskCount": 10},
        tasks={"total": 10, "display": "3/10"},
    )
    head, row = space.ok("get", "intent", name).splitlines()
    assert head.split() == ["NAME", "PHASE", "STEP", "PLAN", "TASKS", "AGE"]
    assert row.split()[:5] == [name, "WaitingInput", "DecideST", f"{name}-abc", "3/10"]
    head, row = space.ok("get", "intent", name, "-o", "wide").splitlines()
    assert head.split() == ["NAME", "PHASE", "STEP", "PLAN", "TASKS", "PARTITION", "DIGEST", "REASON", "AGE"]
    assert row.split()[5:8] == ["tenant-1", "sha256:abc", "plan_not_approved"]


def test_phase_can_be_selected_and_conditions_waited_for(space: Space) -> None:
    name = space.create({})
    done = {"type": "Finished", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    space.status(name, phase="Expired", conditions=[{**done, "reason": "Expired", "message": ""}])
    assert space.ok("get", "intents", "--field-selector", "status.phase=Expired", "-o", "name").split() == [
        f"intent.sisukodo.dev/{name}"
    ]
    space.ok("wait", f"intent/{name}", "--for=condition=Finished", "--timeout=5s")
    assert f"intent.sisukodo.dev/{name}" in space.ok("get", "sisukodo", "-o", "name").split()


def test_planapprovals_have_their_columns(space: Space) -> None:
    for crd in (yaml.safe_load(path.read_text()) for path in sorted(CRDS.glob("*.yaml"))):
        live = json.loads(space.ok("get", "crd", crd["metadata"]["name"], "-o", "json", user="controller"))
        version = live["spec"]["versions"][0]
        assert version["additionalPrinterColumns"] == crd["spec"]["versions"][0]["additionalPrinterColumns"]
    columns = [c["name"] for c in version["additionalPrinterColumns"] if not c.get("priority")]
    assert columns == ["Intent", "Tasks", "Decision", "Votes", "Required", "Expires", "Age"]
    assert "No resources found" in space.run("get", "pa").stderr


@pytest.mark.parametrize("what", ["intent", "planapproval"])
def test_kubectl_explains_every_field(space: Space, what: str) -> None:
    crd = yaml.safe_load((CRDS / f"{what}s.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in ("spec", "status"):
        told = " ".join(space.ok("explain", f"{what}.{part}").split())
        for name, node in schema["properties"][part]["properties"].items():
            assert " ".join(node["description"].split())[:60] in told, f"{what}.{part}.{name}"
    assert "<no description>" not in space.ok("explain", what, "--recursive")


def test_the_biggest_approval_fits(space: Space) -> None:
    """The rules cost the API server work; 1,000 tasks and 64 KiB of diff must stay inside its budget."""
    hexes = "0123456789abcdef" * 4
    tasks = [{"id": f"t-{i}", "title": "t", "command": "c" * 60, "timeoutSeconds": 1} for i in range(1000)]
    limits = ("cpuMillis", "memoryMb", "pids", "diskMb", "parallelism", "maxSandboxMinutes", "timeoutSeconds")
    named = ("snapshotSha256", "inputsSha256", "constraintsSha256", "policySha256")
    execution = {
        "commit": hexes[:40],
        **dict.fromkeys(named, hexes),
        "template": "python",
        "egress": {"mode": "None"},
        "limits": dict.fromkeys(limits, 1),
        "compilerVersion": "1",
        "promptVersion": "1",
        "generation": 1,
    }
    body = manifest({}, name="big")
    body["kind"] = "PlanApproval"
    body["spec"] = {
        "intent": {"name": "big", "uid": "u"},
        "plan": {
            "digest": f"sha256:{hexes}",
            "goal": "g" * 8192,
            "summary": "s" * 4096,
            "taskCount": 1000,
            "tasks": tasks,
            "patch": {"sha256": hexes, "diff": "d" * 65_536},
            "execution": execution,
        },
        "policy": {"required": 1, "allowRequester": True, "expiresAt": "2099-01-01T00:00:00Z"},
        "decisions": [],
    }
    space.ok("create", "-f", "-", body=body, user="controller")
    vote = json.dumps([{"op": "add", "path": "/spec/decisions/-", "value": {"verdict": "Approve"}}])
    space.ok("patch", "planapproval", "big", "--type=json", "-p", vote, user="alice")
    swap = json.dumps([{"op": "replace", "path": "/spec/plan/tasks/999/command", "value": "x"}])
    assert "are fixed" in space.refused("patch", "planapproval", "big", "--type=json", "-p", swap, user="alice")
