"""Laws 5 and 13: repositories and edits that want out of their tree, through the whole product. Each has its exact answer.

What git itself would never write comes from the stack's git server; what no honest model says, from a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from devcluster.gitserver import GitServer
from tests.e2e.product import Product
from tests.support.repositories import blob, branch, git, tree

Entries = Mapping[str, tuple[str, str]]
FILE, LINK, FOLDER, MODULE = "100644", "120000", "40000", "160000"
MIB = 1024 * 1024

# branch → what people are told, in the words of the condition
REFUSED = {
    "many-files": "the repository has 20001 files; at most 20000 are taken",
    "long-listing": "git ls-tree has more than 8388608 bytes of output",
    "big-archive": "the repository takes 68190720 bytes as an archive; at most 67108864 are taken",
    "link-up": "src/up: is a symbolic link to '../../etc/passwd', outside the repository",
    "link-absolute": "passwd: is a symbolic link to '/etc/passwd', outside the repository",
    "link-chain": "d/out: is a symbolic link to 'root/../../etc', outside the repository",
    "link-text": "odd: is a symbolic link to '/\\u{202e}x\\u{a}', outside the repository",
    "dot-git": ".git/hooks/x: the path leads into .git",
    "dot-git-case": "a/.GiT/config: the path leads into .git",
    "dot-dot": "../x: the path has a component . or ..",
    "line-feed": "a\\u{a}b: the path holds control or invisible characters",
    "bidirectional": "a\\u{202e}b.py: the path holds control or invisible characters",
    "zero-width": "a\\u{200b}b.py: the path holds control or invisible characters",
    "bytes": "\\u{dcff}: the path holds control or invisible characters",
}

# goal → the edit that the model proposes, and how the answer ends
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "hook": ({"op": "write", "path": ".git/hooks/x", "content": "#!/bin/sh\n"}, "the path leads into .git"),
    "outside": ({"op": "write", "path": "../../etc/x", "content": "x"}, "the path has a component . or .."),
    "absolute": ({"op": "delete", "path": "/etc/passwd"}, "the path is absolute"),
    "by a link": ({"op": "write", "path": "here/x", "content": "x"}, "here is a symbolic link, so nothing can be edited below it"),
    "in a module": ({"op": "write", "path": "sub/x", "content": "x"}, "sub is a submodule, so nothing can be edited below it"),
    "the module": ({"op": "delete", "path": "sub"}, "is a symbolic link or a submodule; only plain files can be edited"),
}  # fmt: skip
TASK = {
    "id": "look",
    "title": "Look around",
    # The submodule came as an empty directory, nobody fetched it; the links lead where the tree says.
    "command": 'set -e; test -d sub; test -z "$(ls -A sub)"; test "$(cat here/greeting)" = "grüße"; test -L loop; cat new.txt',
    "timeoutSeconds": 30,
}


def plan(goal: str, *edits: Mapping[str, Any]) -> dict[str, Any]:
    rest: dict[str, Any] = {"design": [], "files": [], "risks": [], "tests": []}
    return {"kind": "plan", "plan": {"goal": goal, "summary": "s", "edits": list(edits), "tasks": [TASK], **rest}}


def repository(folder: Path) -> Path:
    """One bare repository with a branch per case."""
    repo = folder / "evil.git"
    git(repo, "init", "--bare", "--quiet", "--initial-branch=good", str(repo))
    empty, text = blob(repo, b""), blob(repo, b"x\n")
    megabyte = blob(repo, bytes(MIB))

    def link(target: str) -> tuple[str, str]:
        return LINK, blob(repo, target.encode())

    def folder_of(entries: Entries) -> tuple[str, str]:
        return FOLDER, tree(repo, dict(entries))

    plain = (FILE, text)
    good = {
        "README.md": plain,
        "src": folder_of({"greeting": (FILE, blob(repo, "grüße\n".encode()))}),
        "here": link("src"),
        "loop": link("loop"),
        "sub": (MODULE, "1" * 40),
        ".gitmodules": (FILE, blob(repo, b'[submodule "sub"]\n\tpath = sub\n\turl = https://127.0.0.1:1/x.git\n')),
    }
    branches: dict[str, Entries] = {
        "good": good,
        "many-files": {f"f{n:05d}": (FILE, empty) for n in range(20_001)},
        "long-listing": {"d" * 200: folder_of({"e" * 200: folder_of({f"{n:0200d}": (FILE, empty) for n in range(13_000)})})},
        "big-archive": {f"m{n}": (FILE, megabyte) for n in range(65)},
        "link-up": {"src": folder_of({"up": link("../../etc/passwd")})},
        "link-absolute": {"passwd": link("/etc/passwd")},
        "link-chain": {"d": folder_of({"root": link(".."), "out": link("root/../../etc")})},
        "link-text": {"odd": link("/\u202ex\n")},
        "dot-git": {".git": folder_of({"hooks": folder_of({"x": plain})})},
        "dot-git-case": {"a": folder_of({".GiT": folder_of({"config": plain})})},
        "dot-dot": {"..": folder_of({"x": plain})},
        "line-feed": {"a\nb": plain},
        "bidirectional": {"a\u202eb.py": plain},
        "zero-width": {"a\u200bb.py": plain},
    }  # fmt: skip
    for name, entries in branches.items():
        branch(repo, name, dict(entries))
    raw = b"100644 \xff\0" + bytes.fromhex(text)
    odd = git(repo, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=raw)
    git(repo, "update-ref", "refs/heads/bytes", git(repo, "commit-tree", odd, "-m", "bytes"))
    return repo


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitServer]:
    root = tmp_path_factory.mktemp("repositories")
    repository(root)
    with GitServer(root) as running:
        yield running


def source(server: GitServer, ref: str) -> dict[str, Any]:
    return {"git": {"url": server.url("evil.git"), "ref": ref}}


def start(product: Product, answers: Mapping[str, Any]) -> None:
    script = product.stack.state / f"{product.namespace}.answers.json"
    script.write_text(json.dumps(answers))
    product.start(program=("-m", "tests.support.scripted_main", str(script)), SBX_MODE="live")


def failed(product: Product, name: str) -> str:
    """The one message that people find in every place; it holds no character that they cannot see."""
    status = product.status(name)
    assert (status["phase"], status["reason"]) == ("Failed", "PlanFailed"), name
    assert status["nextAction"] == "To try again set spec.retry to 1"
    said = {c["type"]: (c["status"], c["reason"], c["message"]) for c in status["conditions"]}
    message = str(said["Finished"][2])
    assert said["Accepted"][0] == "True"
    assert said["Planned"] == said["Succeeded"] == ("False", "PlanFailed", message)
    assert said["Finished"] == ("True", "PlanFailed", message)
    assert message.isprintable(), repr(message)
    return message


def warned(product: Product) -> dict[str, str]:
    """The event of each Intent: name → note."""
    events = json.loads(product.kubectl("get", "events.events.k8s.io", "-o", "json"))["items"]
    assert {(e["type"], e["reason"]) for e in events} == {("Warning", "Failed")}
    return {e["regarding"]["name"]: e["note"] for e in events}


def test_law_13_a_repository_that_wants_out_is_refused_before_anything_is_asked(
    product: Product, server: GitServer
) -> None:
    start(product, {})
    for name in REFUSED:
        product.apply(name, f"work on {name}", workspace=source(server, name))
    said: dict[str, str] = {}
    for name in REFUSED:
        product.wait_phase(name, "Failed", "WaitingInput", seconds=60)
        said[name] = failed(product, name)
    assert said == {name: f"WorkspaceRefused: {words}" for name, words in REFUSED.items()}
    product.wait(lambda: len(warned(product)) == len(REFUSED), "an event for each")
    assert warned(product) == said
    assert product.sql("SELECT count(*) FROM app.opencode_calls") == [(0,)], "no model has seen any of it"
    assert product.sql("SELECT count(*) FROM app.blobs") == [(0,)]
    assert product.objects("planapprovals") == [] and product.starts() == {}


def test_law_13_edits_that_want_out_are_refused_and_what_leads_inside_is_carried(
    product: Product, server: GitServer
) -> None:
    bad = {f"edit {title}": [plan(f"edit {title}", edit)] for title, (edit, _) in EDITS.items()}
    good = {"op": "write", "path": "new.txt", "content": "new\n"}
    start(product, {**bad, "look around": [plan("look around", good)]})
    names = {title: f"bad-{n}" for n, title in enumerate(EDITS)}
    for title, name in names.items():
        product.apply(name, f"edit {title}", workspace=source(server, "good"))
    product.apply("good", "look around", workspace=source(server, "good"))
    said: dict[str, str] = {}
    for title, name in names.items():
        product.wait_phase(name, "Failed", "WaitingInput", seconds=60)
        said[title] = failed(product, name)
    expected = {t: f"InvalidPlan: edit 0 ({e['op']} {e['path']}): {words}" for t, (e, words) in EDITS.items()}
    assert {t: m.split("; right would be")[0] for t, m in said.items()} == expected
    product.wait_phase("good", "WaitingInput")
    product.vote("good")
    done = product.wait_phase("good", "Succeeded", "Failed")
    assert done["phase"] == "Succeeded", product.sql("SELECT response FROM app.sbx_runs")
    assert sum(product.starts().values()) == 1, "that of the good one"
    product.assert_once()
