"""A private repository through the whole product: who may use the Secret, where it goes, and that nothing anywhere holds it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devcluster.gitserver import GitServer
from tests.e2e.product import Product
from tests.support.repositories import commit_files, git

USER, TOKEN = "reader", "Zq7-private-token-Xv2"
PAIR = base64.b64encode(f"{USER}:{TOKEN}".encode()).decode()
ANNOTATION = "sisukodo.dev/git"
FIELD = "spec.workspace.git.secretRef"
GOAL = "say hello from a private place"
TASK = {"id": "look", "title": "Look", "command": "cat greeting.txt", "timeoutSeconds": 30}
REST: dict[str, Any] = {"goal": GOAL, "summary": "s", "design": [], "files": [], "risks": [], "tests": []}
EDIT = {"op": "replace", "path": "greeting.txt", "search": "hello", "replace": "welcome"}
ANSWERS = [
    {"kind": "need", "need": {"reads": ["greeting.txt"], "searches": ["hel+o"]}},
    {"kind": "plan", "plan": {**REST, "edits": [EDIT], "tasks": [TASK]}},
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    for name in ("org.git", "organ.git"):
        git(tmp_path / name, "init", "--bare", "--quiet", "--initial-branch=main", str(tmp_path / name))
        commit_files(tmp_path / name, {"greeting.txt": "hello\n"})
    with GitServer(tmp_path, user=USER, token=TOKEN) as running:
        yield running


def start(product: Product, **settings: str) -> None:
    script = product.stack.state / f"{product.namespace}.answers.json"
    script.write_text(json.dumps({GOAL: ANSWERS}))
    product.start(
        program=("-m", "tests.support.scripted_main", str(script)),
        SBX_MODE="live",
        LOG_LEVEL="DEBUG",
        **{"WORKSPACE_SECRETS": "true", **settings},
    )


def secret(product: Product, *, name: str = "forge", place: str = "", password: str = TOKEN) -> None:
    annotations = {ANNOTATION: place} if place else {}
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/basic-auth",
        "metadata": {"name": name, "annotations": annotations},
        "stringData": {"username": USER, "password": password},
    }
    product.kubectl("create", "-f", "-", stdin=json.dumps(body))


def grant(product: Product, name: str = "forge") -> None:
    account = "--serviceaccount=sisu-kodo-system:sisu-kodo-controller"
    product.kubectl("create", "role", name, "--verb=get", "--resource=secrets", f"--resource-name={name}")
    product.kubectl("create", "rolebinding", name, f"--role={name}", account)


def apply(product: Product, name: str, url: str, secret_name: str | None = "forge") -> None:
    source: dict[str, Any] = {"url": url, "ref": "main"}
    if secret_name is not None:
        source["secretRef"] = {"name": secret_name}
    product.apply(name, GOAL, workspace={"git": source})


def failure(product: Product, name: str, *, retries: int = 0) -> str:
    """The message that people find once this try has failed."""

    def ended() -> dict[str, Any] | None:
        status = product.status(name)
        assert status.get("phase") != "WaitingInput", "it got a plan"
        return status if (status.get("phase"), status.get("observedRetry", 0)) == ("Failed", retries) else None

    status = product.wait(ended, f"{name} has failed after {retries} retries")
    assert status["reason"] == "PlanFailed"
    return str(product.condition(name, "Planned")["message"])


class CommandLines(threading.Thread):
    """Keeps the argument list of every process that git's transport needs, as anybody on the machine sees it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    def __enter__(self) -> CommandLines:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_now.set()
        self.join()


def everything(product: Product) -> dict[str, str]:
    """What is left of it all: every row of both schemas, every object but the Secret, every log and file of the product."""
    found: dict[str, str] = {}
    with psycopg.connect(product.database, autocommit=True) as c:
        tables = c.execute(
            "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema IN ('app', 'dbos')"
        ).fetchall()
        for schema, table in tables:
            rows = c.execute(f'SELECT t::text FROM "{schema}"."{table}" t'.encode()).fetchall()
            found[f"{schema}.{table}"] = str(rows)
        found["blobs as text"] = str(c.execute("SELECT encode(content, 'escape') FROM app.blobs").fetchall())
    for plural in ("intents", "planapprovals", "configmaps", "events.events.k8s.io"):
        found[plural] = product.kubectl("get", plural, "-o", "yaml")
    found["leases"] = product.stack.kubectl("get", "leases,configmaps", "-n", "sisu-kodo-system", "-o", "yaml").stdout
    for controller in product.controllers:
        found[controller.log.name] = controller.log.read_text()
        found[f"metrics of {controller.log.name}"] = controller.get("/metrics")[1]
    clones = product.stack.state / "git"
    for path in [clones, *clones.rglob("*")]:
        content = path.read_bytes().decode("latin-1") if path.is_file() else ""
        found[str(path)] = f"{path} {content}"
    return found


def forms() -> list[str]:
    """The token as it could lie about: plain, as Basic authentication has it, in hex, and in base64 wherever it begins."""
    plain = TOKEN.encode()
    encoded = [base64.b64encode(plain[n : n + (len(plain) - n) // 3 * 3]).decode() for n in range(3)]
    return [TOKEN, PAIR.rstrip("="), plain.hex(), *encoded]


def assert_nowhere(product: Product, seen: set[bytes]) -> None:
    kept = everything(product)
    assert {"app.runs", "app.run_steps", "app.opencode_calls", "dbos.workflow_status", "planapprovals"} <= kept.keys()
    assert "greeting.txt" in kept["app.opencode_calls"] and "forge" in kept["app.runs"], "it is the right database"
    lines = b"\n".join(seen).decode(errors="replace")
    assert "git-remote-http" in lines, "git's transport was seen at work"
    leaks = [where for where, text in {**kept, "command lines": lines}.items() if any(form in text for form in forms())]
    assert leaks == []


def test_law_7_a_private_repository_is_planned_approved_and_executed_and_nothing_holds_the_token(
    product: Product, server: GitServer
) -> None:
    secret(product, place=f"http://127.0.0.1:{server.port}/org.git")
    grant(product)
    with CommandLines() as lines:
        start(product)
        apply(product, "private", server.url("org.git"))
        product.wait_phase("private", "WaitingInput", "Failed")
        execution = product.objects("planapprovals")[0]["spec"]["plan"]["execution"]
        assert execution["secrets"] == ["forge"], "whoever approves sees which one was used"
        assert len(set(server.heard)) == 1 and server.heard[0] == f"Basic {PAIR}"

        product.kubectl("delete", "secret", "forge")
        heard = len(server.heard)
        product.vote("private")
        done = product.wait_phase("private", "Succeeded", "Failed")
        assert done["phase"] == "Succeeded", product.sql("SELECT response FROM app.sbx_runs")
        assert len(server.heard) == heard, (
            "what runs is the stored snapshot: nobody asks for Secret or repository again"
        )
    [(output,)] = product.sql("SELECT response->>'stdout' FROM app.sbx_runs")
    assert output == "welcome\n"
    product.assert_once()

    for other, name in ((None, "public"), ("forge", "without")):
        apply(product, name, server.url("org.git"), other)
    assert "could not read Username" in failure(product, "public"), "the clone that is here opens to nobody else"
    assert "there is none" in failure(product, "without")
    assert len(server.heard) == heard
    assert_nowhere(product, lines.seen)


def test_law_13_what_is_wrong_with_a_secret_is_said_nothing_is_sent_and_a_retry_after_the_repair_works(
    product: Product, server: GitServer
) -> None:
    url, place = server.url("org.git"), f"http://127.0.0.1:{server.port}"
    with CommandLines() as lines, GitServer(Path("/nonexistent")) as evil:
        start(product)
        apply(product, "private", url)
        apply(product, "elsewhere", evil.url("org.git"))
        apply(product, "organ", server.url("organ.git"))
        no_right = failure(product, "private")
        assert no_right.startswith(f"InvalidIntent: {FIELD}: Secret {product.namespace}/forge: may not be read here")
        assert "may not be read" in failure(product, "elsewhere") and "may not be read" in failure(product, "organ")

        retries = 0

        def again(name: str = "private") -> str:
            product.patch_intent(name, {"retry": retries})
            return failure(product, name, retries=retries)

        for command in no_right.partition("who may grant it runs: ")[2].split(" && "):
            product.kubectl(*command.split()[3:])
        retries = 1
        assert "there is none" in again()
        secret(product, password="not-the-token")
        retries = 2
        assert (
            f"has no annotation {ANNOTATION}" in again()
            and f"{ANNOTATION}={url}" in product.condition("private", "Planned")["message"]
        )
        product.kubectl("annotate", "secret", "forge", f"{ANNOTATION}={place}/org.git")
        retries = 1
        for name in ("elsewhere", "organ"):
            assert "does not cover this Intent's URL" in again(name)
        assert server.heard == evil.heard == [], "nothing was sent to anybody"
        retries = 3
        assert "the server does not take the credentials of secretRef" in again()
        assert server.heard and evil.heard == []

        fresh = json.dumps({"stringData": {"password": TOKEN}})  # not as an argument: command lines are watched
        product.kubectl("patch", "secret", "forge", "--patch-file=/dev/stdin", stdin=fresh)
        product.patch_intent("private", {"retry": 4})
        product.wait_phase("private", "WaitingInput")
        assert server.heard[-1] == f"Basic {PAIR}"
        assert product.sql("SELECT count(*) FROM app.plan_approvals") == [(0,)]
    assert_nowhere(product, lines.seen)


def test_a_worker_without_a_way_to_the_api_server_does_not_start_with_it(product: Product) -> None:
    environ = product.stack.environment(DATABASE_URL=product.database, WORKSPACE_SECRETS="true", KUBECONFIG="")
    command = [sys.executable, "-m", "controller", "run", "--role", "worker"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "WORKSPACE_SECRETS is true, but there is no way to the API server" in done.stderr
