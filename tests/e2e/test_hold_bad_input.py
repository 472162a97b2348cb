"""Laws 5 and 13, fail closed: hostile Intents, each with its exact answer, and zero rows whatever the answer is.

`DENIED`: the API server refuses the write. `REFUSED`: it is stored, and the controller says Accepted=False. Both name the field.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.e2e.product import Product

GIT = "spec.workspace.git.url"
REF = "spec.workspace.git.ref"
RIGHT_URL = "use https://host/path without a user, password or query"
RIGHT_REF = "use a branch, tag or commit"


def git(url: str, **more: str) -> dict[str, Any]:
    return {"workspace": {"git": {"url": url, **more}}}


@dataclass
class Bad:
    """What carol asks for, which field the answer names, and some of its words."""

    spec: dict[str, Any]
    names: str
    says: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


DENIED = {
    "no goal": Bad({"goal": None}, "spec.goal"),
    "empty goal": Bad({"goal": ""}, "spec.goal"),
    "goal of 9000 characters": Bad({"goal": "x" * 9000}, "spec.goal", "8192"),
    "goal is a number": Bad({"goal": 1}, "spec.goal", "must be of type string"),
    "unknown field": Bad({"goalz": "x"}, "spec.goalz", "unknown field"),
    "unknown field deep down": Bad(git("https://example.com/x.git", depth="1"), "git.depth", "unknown field"),
    "file URL": Bad(git("file:///etc"), GIT, RIGHT_URL),
    "path": Bad(git("/etc"), GIT, RIGHT_URL),
    "ext transport": Bad(git("ext::sh -c id"), GIT, RIGHT_URL),
    "ssh": Bad(git("ssh://git@example.com/x.git"), GIT, RIGHT_URL),
    "scp": Bad(git("git@example.com:x.git"), GIT, RIGHT_URL),
    "git protocol": Bad(git("git://example.com/x.git"), GIT, RIGHT_URL),
    "http to a private range": Bad(git("http://10.0.0.1/x.git"), GIT, RIGHT_URL),
    "http to the cloud's metadata": Bad(git("http://169.254.169.254/latest"), GIT, RIGHT_URL),
    "http to a name that begins like loopback": Bad(git("http://localhost.evil.com/x.git"), GIT, RIGHT_URL),
    "credentials in the URL": Bad(git("https://user:password@example.com/x.git"), GIT, RIGHT_URL),
    "query in the URL": Bad(git("https://example.com/x.git?a=b"), GIT, RIGHT_URL),
    "option as URL": Bad(git("--upload-pack=touch /tmp/x"), GIT, RIGHT_URL),
    "line feed in the URL": Bad(git("https://example.com/x.git\nfile:///etc"), GIT, RIGHT_URL),
    "option as ref": Bad(git("https://example.com/x.git", ref="--upload-pack=id"), REF, RIGHT_REF),
    "ref with dots": Bad(git("https://example.com/x.git", ref="a..b"), REF, RIGHT_REF),
    "ref with a space": Bad(git("https://example.com/x.git", ref="a b"), REF, RIGHT_REF),
    "ref with a refspec": Bad(git("https://example.com/x.git", ref="+a:b"), REF, RIGHT_REF),
    "inputs are a list": Bad({"inputs": [1]}, "spec.inputs", "must be of type object"),
    "too many inputs": Bad({"inputs": {str(n): n for n in range(300)}}, "spec.inputs", "256"),
    "approval of nobody": Bad({"approval": {"required": 0}}, "spec.approval.required"),
    "a million tasks": Bad({"limits": {"maxTasks": 1_000_000}}, "spec.limits.maxTasks"),
    "hosts without mode Allow": Bad({"sandbox": {"egress": {"mode": "None", "allow": ["a.b"]}}}, "spec.sandbox.egress", "allow"),
    "a URL as host": Bad({"sandbox": {"egress": {"mode": "Allow", "allow": ["http://a/"]}}}, "egress.allow"),
    "memory in words": Bad({"sandbox": {"memory": "lots"}}, "spec.sandbox.memory"),
    "partition with a slash": Bad({"queuePartitionKey": "../other"}, "spec.queuePartitionKey", "use letters, digits"),
    "somebody else's name": Bad({"requestedBy": "alice@corp"}, "requestedBy", "carol@corp"),
    "our finalizer": Bad({}, "finalizer", "added and removed by the controller", {"finalizers": ["sisukodo.dev/run"]}),
}  # fmt: skip

REFUSED = {
    "bidirectional goal": Bad({"goal": "say \u202eolleh"}, "spec.goal", "<U+202E>"),
    "zero width in the goal": Bad({"goal": "say\u200bhello"}, "spec.goal", "<U+200B>"),
    "escape sequence in the goal": Bad({"goal": "say \x1b[2Jhello"}, "spec.goal", "<U+001B>"),
    "NUL in the goal": Bad({"goal": "say\0hello"}, "spec.goal", "<U+0000>"),
    "goal of 9 KiB in 4-byte characters": Bad({"goal": "\U0001f600" * 2304}, "spec.goal", "at most 8192"),
    "NUL in inputs": Bad({"inputs": {"a": "x\0y"}}, "spec.inputs", "NUL"),
    "NUL in a key": Bad({"constraints": {"x\0y": 1}}, "spec.constraints", "NUL"),
    "inputs of 17 KiB": Bad({"inputs": {"a": "x" * 17_000}}, "spec.inputs", "at most 16384"),
    "inputs of half a megabyte": Bad({"inputs": {"a": "x" * 500_000}}, "spec.inputs", "at most 16384"),
    "a number that JSON cannot carry": Bad({"inputs": {"a": 2**60 + 1}}, "spec.inputs", "2^53"),
    "unknown template": Bad({"sandbox": {"template": "windows"}}, "spec.sandbox.template", "allows python"),
    "template in a registry": Bad({"sandbox": {"template": "evil.com/x:latest"}}, "spec.sandbox.template", "allows python"),
    "egress Public": Bad({"sandbox": {"egress": {"mode": "Public"}}}, "spec.sandbox.egress.mode", "allows None"),
    "egress Allow": Bad({"sandbox": {"egress": {"mode": "Allow", "allow": ["a.b"]}}}, "spec.sandbox.egress.mode", "allows None"),
    "priority above the cap": Bad({"priority": 1}, "spec.priority", "cap of 0"),
    "unknown recipe": Bad({"recipe": "root"}, "spec.recipe", "allows sandbox-default"),
    "secret for git": Bad({"workspace": {"git": {"url": "https://example.com/x.git", "secretRef": {"name": "s"}}}}, "secretRef"),
}  # fmt: skip


def manifest(name: str, bad: Bad) -> str:
    spec = {k: v for k, v in {"goal": "say hello", **bad.spec}.items() if v is not None}
    metadata = {"name": name, **bad.metadata}
    return json.dumps({"apiVersion": "sisukodo.dev/v1alpha1", "kind": "Intent", "metadata": metadata, "spec": spec})


def create(product: Product, name: str, bad: Bad) -> tuple[bool, str]:
    # Not `apply`: its annotation would double what is stored.
    done = product.stack.kubectl(
        "-n", product.namespace, "create", "-f", "-", user="carol", stdin=manifest(name, bad), check=False
    )
    return done.returncode == 0, done.stderr


def no_rows(product: Product) -> None:
    assert set(product.rows().values()) == {0}


def test_law_5_the_api_server_denies_it_and_names_the_field(product: Product) -> None:
    """No controller is needed for these: the schema and the policies answer."""
    wrong: dict[str, str] = {}
    for number, (title, bad) in enumerate(DENIED.items()):
        admitted, answer = create(product, f"bad-{number}", bad)
        if admitted or bad.names not in answer or bad.says not in answer:
            wrong[title] = "admitted" if admitted else answer[:300]
    assert wrong == {}
    assert product.objects("intents") == []


def test_law_5_the_controller_refuses_the_rest_and_writes_no_row(product: Product) -> None:
    product.start()
    titles = {f"bad-{number}": title for number, title in enumerate(REFUSED)}
    wrong: dict[str, str] = {}
    for name, title in titles.items():
        admitted, answer = create(product, name, REFUSED[title])
        if not admitted:
            wrong[title] = answer[:300]

    def unanswered() -> list[str]:
        seen = {one["metadata"]["name"]: one.get("status", {}).get("conditions") for one in product.objects("intents")}
        return [name for name, conditions in seen.items() if not conditions]

    product.wait(lambda: not unanswered(), "an answer to each")
    for name, title in titles.items():
        if title in wrong:
            continue
        said, bad = product.condition(name, "Accepted"), REFUSED[title]
        if said["status"] != "False" or bad.names not in said["message"] or bad.says not in said["message"]:
            wrong[title] = f"{said['status']}: {said['message'][:300]}"
    assert wrong == {}
    no_rows(product)
    assert all("finalizers" not in one["metadata"] for one in product.objects("intents")), "they can be deleted at once"

    product.apply("good", "say hello")
    product.wait_phase("good", "WaitingInput")  # and nobody else has to wait for it


@pytest.mark.parametrize("levels", [500, 3000])
def test_law_5_deep_json_ends_nothing_but_its_own_intent(product: Product, levels: int) -> None:
    """Text, not objects: Python's own decoder gives up near a thousand levels, and the API server takes ten thousand."""
    controller = product.start()
    body = manifest("deep", Bad({"inputs": {"a": 0}}, "")).replace('{"a": 0}', '{"a":' * levels + "0" + "}" * levels)
    product.kubectl("create", "-f", "-", stdin=body, user="carol")
    path = "jsonpath={.status.conditions[?(@.type=='Accepted')].status} {.status.conditions[?(@.type=='Accepted')].message}"

    def answer() -> str:
        return product.kubectl("get", "intent", "deep", "-o", path).strip()

    def phase(name: str) -> str:
        return product.kubectl("get", "intent", name, "-o", "jsonpath={.status.phase}")

    product.kubectl("create", "-f", "-", stdin=manifest("good", Bad({}, "")), user="carol")
    try:
        deadline = time.monotonic() + 15
        while phase("good") != "WaitingInput" or not answer():
            assert time.monotonic() < deadline, (phase("good"), answer(), controller.log.read_text()[-2000:])
            time.sleep(0.2)
        if levels > 1000:
            assert answer().startswith("False") and "spec.inputs" in answer()
            assert product.sql("SELECT name FROM app.intents WHERE namespace = %s", product.namespace) == [("good",)]
    finally:
        remove = '{"metadata":{"finalizers":null}}'
        product.kubectl("patch", "intent", "deep", "--type=merge", "-p", remove, user="controller")
        product.kubectl("delete", "intent", "deep", "--wait=false")  # nobody else can read the list with it


@pytest.mark.slow
@pytest.mark.parametrize("address", ["https://127.0.0.1:1/x.git", "https://[::1]:1/x.git"])
def test_law_5_a_repository_that_does_not_answer_is_a_failed_plan(product: Product, address: str) -> None:
    product.start()
    product.apply("g", "say hello", **git(address))
    failed = product.wait_phase("g", "Failed", "WaitingInput", seconds=60)
    assert (failed["phase"], failed["reason"]) == ("Failed", "PlanFailed")
    assert product.sql("SELECT count(*) FROM app.opencode_calls") == [(0,)]
