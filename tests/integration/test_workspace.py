"""The Workspace port against real git and a real server, with hostile repositories, references, searches and edits.

The contract tests run against the twin in memory as well.
"""

from __future__ import annotations

import base64
import io
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import CompileTurn, Edit
from controller.core.errors import InvalidPlan, Permanent, Unavailable, WorkspaceRefused
from controller.core.model import GitSource
from controller.ports import Workspace
from controller.workspace import GitWorkspace, Limits
from devcluster.gitserver import GitServer
from tests.support.memory_workspace import MemoryWorkspace
from tests.support.repositories import blob, branch, commit_files, git, tree, unfolding_blobs

FILES = {
    "README.md": "# demo\n",
    "src/a.py": "one = 1\ntwo = 2\nagain = 1\n",
    "src/ünï.txt": "grüße\n",
}
EVIL = "evil.git"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repos")
    for name in ("demo.git", EVIL):
        git(root / name, "init", "--bare", "--quiet", "--initial-branch=main", str(root / name))
    commit_files(root / "demo.git", FILES)
    git(
        root / "demo.git",
        "update-ref",
        "refs/heads/other",
        commit_files(root / "demo.git", {"o.txt": "o\n"}, name="other"),
    )
    git(root / "demo.git", "tag", "-a", "-m", "release", "v1", "refs/heads/main")
    commit_files(root / EVIL, {"a.txt": "plain\n"})
    return root


@pytest.fixture(scope="module")
def server(repositories: Path) -> Iterator[GitServer]:
    with GitServer(repositories) as running:
        yield running


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> GitWorkspace:
    return GitWorkspace(tmp_path_factory.mktemp("cache"), allow_loopback_http=True)


@pytest.fixture
def demo(server: GitServer) -> GitSource:
    return GitSource(url=server.url("demo.git"), ref="main")


@pytest.fixture
def evil(repositories: Path) -> Path:
    return repositories / EVIL


def edits(*raw: dict[str, Any]) -> tuple[Edit, ...]:
    task = {"id": "t", "title": "t", "command": "true"}
    plan = {
        "goal": "g",
        "summary": "s",
        "design": [],
        "files": [],
        "risks": [],
        "edits": raw,
        "tests": [],
        "tasks": [task],
    }
    turn = CompileTurn.model_validate({"kind": "plan", "plan": plan})
    assert turn.plan is not None
    return turn.plan.edits


def replace(path: str, search: str, new: str) -> dict[str, Any]:
    return {"op": "replace", "path": path, "search": search, "replace": new}


def write(path: str, content: str) -> dict[str, Any]:
    return {"op": "write", "path": path, "content": content}


# ------------------------------------------------------------------ the contract, for both implementations


@pytest.fixture(params=["git", "memory"])
def either(request: pytest.FixtureRequest, workspace: GitWorkspace) -> Workspace:
    return workspace if request.param == "git" else MemoryWorkspace(files=FILES)


def test_contract_resolve_is_a_commit_and_stable(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    assert len(commit) == 40 and either.resolve(demo) == commit
    assert either.resolve(None) == either.resolve(None) != commit


def test_contract_map_read_search(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    lines = either.map(demo, commit, max_bytes=4096).splitlines()
    assert lines == ["README.md (7 bytes)", "src/a.py (26 bytes)", "src/ünï.txt (8 bytes)"]
    assert either.read(demo, commit, "src/ünï.txt", max_bytes=100) == "grüße\n"
    assert either.search(demo, commit, "^(one|two)", max_bytes=100) == "src/a.py:1:one = 1\nsrc/a.py:2:two = 2\n"
    assert either.search(demo, commit, "nowhere", max_bytes=100) == "(no matches)\n"


def test_contract_cuts_are_visible_and_bounded(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    for text in (
        either.read(demo, commit, "src/a.py", max_bytes=25),
        either.map(demo, commit, max_bytes=60),
        either.search(demo, commit, "=", max_bytes=50),
    ):
        assert "[cut: " in text and len(text.encode()) <= 60


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "src", "src/", "./README.md", "src//a.py", "no", "a\0b"]
)
def test_contract_only_exact_paths_of_files_are_read(either: Workspace, demo: GitSource, path: str) -> None:
    with pytest.raises(WorkspaceRefused):
        either.read(demo, either.resolve(demo), path, max_bytes=100)


@pytest.mark.parametrize("pattern", ["(", "[", "*a{2,1}"])
def test_contract_a_bad_expression_is_refused(either: Workspace, demo: GitSource, pattern: str) -> None:
    with pytest.raises(WorkspaceRefused):
        either.search(demo, either.resolve(demo), pattern, max_bytes=100)


def test_contract_diff_counts_and_names(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    changes = edits(
        replace("src/a.py", "two = 2", "two = 3"), write("new.txt", "n\n"), {"op": "delete", "path": "README.md"}
    )
    patch = either.diff(demo, commit, changes)
    assert set(patch.files) == {"README.md", "new.txt", "src/a.py"}
    assert (patch.additions, patch.deletions) == (2, 2)
    assert either.diff(demo, commit, changes) == patch


def test_contract_edits_build_on_each_other(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    changes = edits(
        write("n.txt", "alpha\n"),
        replace("n.txt", "alpha", "beta"),
        write("m.txt", "x"),
        {"op": "delete", "path": "m.txt"},
    )
    assert b"+beta" in either.diff(demo, commit, changes).diff


def test_contract_nothing_changed_is_an_empty_patch(either: Workspace, demo: GitSource) -> None:
    patch = either.diff(demo, either.resolve(demo), edits(write("README.md", "# demo\n")))
    assert (patch.diff, patch.files, patch.additions, patch.deletions) == (b"", (), 0, 0)


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (replace("src/a.py", "= 1", "= 9"), r"edit 0 \(replace src/a.py\): search text occurs 2 times"),
        (replace("src/a.py", "zero", "x"), r"edit 0 .*occurs 0 times, must occur exactly once: 'zero'"),
        (replace("missing.py", "a", "b"), "no such file"),
        ({"op": "delete", "path": "missing.py"}, "no such file"),
        (write("/etc/passwd", "x"), "is absolute"),
        (write("a/../../b", "x"), r"component \. or \.\."),
        (write("./a", "x"), r"component \. or \.\."),
        (write("a//b", "x"), "empty component"),
        (write(".git/config", "x"), r"leads into \.git"),
        (write("sub/.GIT/hooks/x", "x"), r"leads into \.git"),
        (write(".git ./x", "x"), r"leads into \.git"),
        (write("GIT~1/x", "x"), r"leads into \.git"),
        (write("a\nb", "x"), "control"),
        (write("a\u202eb", "x"), "invisible"),
        (write("ok.txt", "a\0b"), "NUL"),
        (write("README.md/x", "x"), "README.md is a file"),
        (write("src", "x"), "is a directory"),
    ],
)
def test_contract_edits_that_break_a_rule_are_named(
    either: Workspace, demo: GitSource, edit: dict[str, Any], error: str
) -> None:
    with pytest.raises(InvalidPlan, match=error):
        either.diff(demo, either.resolve(demo), edits(edit))


def test_contract_snapshot_holds_exactly_the_files(either: Workspace, demo: GitSource) -> None:
    commit = either.resolve(demo)
    snapshot = either.snapshot(demo, commit)
    assert snapshot == either.snapshot(demo, commit) and snapshot.size == len(snapshot.archive)
    with tarfile.open(fileobj=io.BytesIO(snapshot.archive)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        assert {name: file.read().decode() for name, file in files.items() if file} == FILES


# ------------------------------------------------------------------ sources


def test_refs_branches_tags_and_commits(workspace: GitWorkspace, demo: GitSource, server: GitServer) -> None:
    main = workspace.resolve(demo)
    other = workspace.resolve(GitSource(url=demo.url, ref="other"))
    assert other != main
    for ref in ("HEAD", "refs/heads/main", "v1", "refs/tags/v1", main):
        assert workspace.resolve(GitSource(url=demo.url, ref=ref)) == main
    assert workspace.read(GitSource(url=demo.url, ref="other"), main, "README.md", max_bytes=99) == "# demo\n"


def test_a_commit_is_fetched_again_into_another_cache(tmp_path: Path, workspace: GitWorkspace, demo: GitSource) -> None:
    commit = workspace.resolve(demo)
    fresh = GitWorkspace(tmp_path, allow_loopback_http=True)
    assert fresh.snapshot(demo, commit) == workspace.snapshot(demo, commit)


@pytest.mark.parametrize(
    "ref", ["--upload-pack=touch x", "-x", "a b", "a..b", "a:b", "main^", "@", "@{1}", "x.lock", "", "a\nb", "*"]
)
def test_refs_are_never_options_or_expressions(workspace: GitWorkspace, demo: GitSource, ref: str) -> None:
    with pytest.raises(WorkspaceRefused, match=r"workspace\.git\.ref"):
        workspace.resolve(GitSource(url=demo.url, ref=ref))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "/etc",
        "ext::sh -c id",
        "ssh://git@host/r.git",
        "git@host:r.git",
        "git://host/r.git",
        "http://example.com/r.git",
        "http://127.0.0.1.example.com/r.git",
        "https://user:pass@host/r.git",
        "https://host/",
        "https://host/r.git?x=1",
        "--upload-pack=id",
        "https://-host/r.git",
        "https://[::1/r.git",
    ],
)
def test_urls_are_https_or_refused(workspace: GitWorkspace, url: str) -> None:
    with pytest.raises(WorkspaceRefused, match=r"workspace\.git\.url"):
        workspace.resolve(GitSource(url=url, ref="main"))


def test_loopback_http_needs_the_development_setting(tmp_path: Path, demo: GitSource) -> None:
    with pytest.raises(WorkspaceRefused, match="scheme 'http'"):
        GitWorkspace(tmp_path).resolve(demo)


def test_what_is_not_there_is_said(workspace: GitWorkspace, demo: GitSource, server: GitServer) -> None:
    with pytest.raises(WorkspaceRefused, match="neither a branch nor a tag"):
        workspace.resolve(GitSource(url=demo.url, ref="nowhere"))
    with pytest.raises(WorkspaceRefused, match="not found"):
        workspace.resolve(GitSource(url=server.url("nowhere.git"), ref="main"))
    with pytest.raises(Permanent):
        workspace.resolve(GitSource(url=demo.url, ref="1" * 40))
    with pytest.raises(WorkspaceRefused, match="40 hex"):
        workspace.read(demo, "HEAD", "README.md", max_bytes=9)


def test_a_server_that_is_down_is_unavailable(workspace: GitWorkspace, repositories: Path) -> None:
    with GitServer(repositories) as short:
        url = short.url("demo.git")
    with pytest.raises(Unavailable):
        workspace.resolve(GitSource(url=url, ref="main"))


def test_the_token_opens_its_own_clone_only_and_is_never_told(tmp_path: Path, repositories: Path) -> None:
    workspace = GitWorkspace(tmp_path, allow_loopback_http=True)
    with GitServer(repositories, token="s3cret-token") as private:
        good = GitSource(url=private.url("demo.git"), ref="main", token="s3cret-token")
        commit = workspace.resolve(good)
        for token in (None, "wrong"):
            bad = GitSource(url=good.url, ref="main", token=token)
            with pytest.raises(WorkspaceRefused) as one:
                workspace.resolve(bad)
            with pytest.raises(WorkspaceRefused) as other:
                workspace.map(bad, commit, max_bytes=99)
            assert "s3cret" not in f"{one.value} {other.value}"
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"s3cret" not in kept and b"czNjcmV0" not in kept


def test_a_clone_is_opened_by_its_own_url_and_credentials_only(tmp_path: Path, repositories: Path) -> None:
    """Another namespace that knows URL and commit, and a worker that has the clone already: still nothing without the Secret."""
    workspace = GitWorkspace(tmp_path, allow_loopback_http=True)
    with GitServer(repositories, user="reader", token="s3cret-token") as private:
        ours = GitSource(url=private.url("demo.git"), ref="main", token="reader:s3cret-token")
        commit = workspace.resolve(ours)
        assert "README.md" in workspace.map(ours, commit, max_bytes=999)
        for token in (None, "s3cret-token", "Reader:s3cret-token", "reader:other"):
            theirs = GitSource(url=ours.url, ref=commit, token=token)
            for look in (
                lambda one=theirs: workspace.resolve(one),
                lambda one=theirs: workspace.snapshot(one, commit),
                lambda one=theirs: workspace.read(one, commit, "README.md", max_bytes=99),
                lambda one=theirs: workspace.diff(one, commit, edits(write("a", "b"))),
            ):
                with pytest.raises(WorkspaceRefused, match="could not read Username") as refused:
                    look()
                assert ("secretRef" in str(refused.value)) == (token is not None)
                assert "s3cret" not in str(refused.value)
        private.token = "rotated-token"
        assert "README.md" in workspace.map(ours, commit, max_bytes=999), "objects do not change"
        with pytest.raises(WorkspaceRefused):
            workspace.resolve(ours)
        fresh = GitSource(url=ours.url, ref="main", token="reader:rotated-token")
        assert workspace.resolve(fresh) == commit


class _Echo(BaseHTTPRequestHandler):
    """A server that tells everybody what it was sent, in plain text, which git shows."""

    line = "you sent {0}"

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        sent = self.headers.get("Authorization", "")
        password = base64.b64decode(sent.partition(" ")[2]).decode().partition(":")[2]
        self.wfile.write(self.line.format(sent, password).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class _Chatty(_Echo):
    """Speaks git's protocol just enough to put its own words behind `fatal: remote error:`."""

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization", "").partition(" ")[2]
        text = f"ERR no entry for {sent[:10]}\n{sent[10:]}".encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
        self.end_headers()
        self.wfile.write(b"001e# service=git-upload-pack\n0000%04x" % (len(text) + 4) + text)


@pytest.mark.parametrize("kind", [_Echo, _Chatty])
def test_a_server_that_sends_the_credentials_back_is_not_quoted(tmp_path: Path, kind: type[_Echo]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/x.git"
        workspace = GitWorkspace(tmp_path, allow_loopback_http=True)
        with pytest.raises((WorkspaceRefused, Unavailable)) as refused:
            workspace.resolve(GitSource(url=url, ref="main", token="reader:s3cret-token"))
        said = str(refused.value)
        assert "s3cret" not in said and base64.b64encode(b"reader:s3cret-token").decode()[:12] not in said
        assert ("403" in said) == (kind is _Echo) and ("sends back" in said) == (kind is _Chatty), said
    finally:
        server.shutdown()
        server.server_close()


def test_many_threads_and_instances_share_one_cache(tmp_path: Path, demo: GitSource) -> None:
    found: list[str] = []
    both = [GitWorkspace(tmp_path, allow_loopback_http=True) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda n=n: found.append(both[n % 2].snapshot(demo, both[n % 2].resolve(demo)).sha256))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1


# ------------------------------------------------------------------ hostile repositories


def source_of(server: GitServer, ref: str) -> GitSource:
    return GitSource(url=server.url(EVIL), ref=ref)


@pytest.mark.parametrize(
    ("links", "named"),
    [
        ({"passwd": "/etc/passwd"}, "passwd"),
        ({"up": "../../etc/passwd"}, "up"),
        ({"here": ".", "out": "here/../.."}, "out"),
    ],
)
def test_links_out_of_the_tree_are_refused_and_never_followed(
    workspace: GitWorkspace, server: GitServer, evil: Path, links: dict[str, str], named: str
) -> None:
    entries = {name: ("120000", blob(evil, target.encode())) for name, target in links.items()}
    branch(evil, f"link-{named}", {**entries, "a.txt": ("100644", blob(evil, b"plain\n"))})
    source = source_of(server, f"link-{named}")
    commit = workspace.resolve(source)
    with pytest.raises(WorkspaceRefused, match=f"^{named}: is a symbolic link"):
        workspace.snapshot(source, commit)
    with pytest.raises(WorkspaceRefused, match="symbolic link"):
        workspace.read(source, commit, named, max_bytes=999)
    with pytest.raises(WorkspaceRefused):
        workspace.read(source, commit, f"{named}/passwd", max_bytes=999)
    with pytest.raises(InvalidPlan, match="symbolic link"):
        workspace.diff(source, commit, edits(write(named, "x")))
    with pytest.raises(InvalidPlan, match=f"{named} is a symbolic link"):
        workspace.diff(source, commit, edits(write(f"{named}/new.txt", "x")))
    assert "root:" not in workspace.search(source, commit, "root:", max_bytes=999)


def test_a_link_that_escapes_through_another_one_is_refused(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    inner = tree(evil, {"root": ("120000", blob(evil, b"../..")), "out": ("120000", blob(evil, b"root/../etc"))})
    branch(evil, "chain", {"d": ("40000", tree(evil, {"e": ("40000", inner)}))})
    source = source_of(server, "chain")
    with pytest.raises(WorkspaceRefused, match=r"^d/e/out: is a symbolic link"):
        workspace.snapshot(source, workspace.resolve(source))


def test_links_that_lead_through_each_other_without_end_are_refused(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    """A tenth of a second for each such link, and 20,000 of them are possible: 40 minutes, with every other thread held up."""
    long = ("120000", blob(evil, ("d/" * 818 + "../" * 818)[:-1].encode()))
    again = ("120000", blob(evil, "/".join(["long"] * 40).encode()))
    branch(evil, "hops", {"long": long, **{f"link{n}": again for n in range(3)}})
    source = source_of(server, "hops")
    with pytest.raises(WorkspaceRefused, match="through each other too often"):
        workspace.snapshot(source, workspace.resolve(source))


def test_paths_that_no_kernel_takes_are_refused(workspace: GitWorkspace, server: GitServer, evil: Path) -> None:
    inner = ("100644", blob(evil, b"x"))
    for _ in range(20):
        inner = ("40000", tree(evil, {"x" * 250: inner}))
    branch(evil, "deep", {"top": inner})
    source = source_of(server, "deep")
    with pytest.raises(WorkspaceRefused, match="is longer than 4095 bytes"):
        workspace.snapshot(source, workspace.resolve(source))


def test_links_inside_the_tree_and_submodules_are_carried_safely(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    entries = {
        "a.txt": ("100644", blob(evil, b"plain\n")),
        "run.sh": ("100755", blob(evil, b"#!/bin/sh\n")),
        "link": ("120000", blob(evil, b"a.txt")),
        "loop": ("120000", blob(evil, b"loop")),
        "sub": ("160000", "1" * 40),
        ".gitmodules": ("100644", blob(evil, b'[submodule "sub"]\n\tpath = sub\n\turl = https://host/x.git\n')),
    }
    branch(evil, "inside", entries)
    source = source_of(server, "inside")
    commit = workspace.resolve(source)
    assert "sub (submodule, left out)" in workspace.map(source, commit, max_bytes=999)
    with tarfile.open(fileobj=io.BytesIO(workspace.snapshot(source, commit).archive)) as tar:
        members = {member.name: member for member in tar}
        assert members["link"].issym() and members["run.sh"].mode == 0o755 and members["a.txt"].mode == 0o644
        assert not any(name.startswith("sub/") and not member.isdir() for name, member in members.items())
    with pytest.raises(InvalidPlan, match="submodule"):
        workspace.diff(source, commit, edits(write("sub/x", "x")))


@pytest.mark.parametrize("name", [".git", "..", ".GIT", "git~1", "a\\nb"])
def test_names_that_lead_elsewhere_are_refused(
    workspace: GitWorkspace, server: GitServer, evil: Path, name: str
) -> None:
    name = name.replace("\\n", "\n")
    inside = ("40000", tree(evil, {"config": ("100644", blob(evil, b"[core]\n"))}))
    branch(evil, "names", {name: inside})
    source = source_of(server, "names")
    with pytest.raises(WorkspaceRefused):
        workspace.snapshot(source, workspace.resolve(source))


def test_attributes_change_nothing(workspace: GitWorkspace, server: GitServer, evil: Path) -> None:
    attributes = (
        b"*.txt export-ignore\n*.id ident\n*.crlf text eol=crlf\n*.sub export-subst\n*.bin binary\n*.d diff=x\n"
    )
    files = {
        "a.txt": b"a\n",
        "b.id": b"$Id$\n",
        "c.crlf": b"c\n",
        "d.sub": b"$Format:%H$\n",
        "e.bin": b"e\n",
        "f.d": b"f\n",
    }
    entries = {name: ("100644", blob(evil, content)) for name, content in files.items()}
    branch(evil, "attributes", {**entries, ".gitattributes": ("100644", blob(evil, attributes))})
    source = source_of(server, "attributes")
    commit = workspace.resolve(source)
    with tarfile.open(fileobj=io.BytesIO(workspace.snapshot(source, commit).archive)) as tar:
        got = {m.name: file.read() for m in tar if m.isfile() and (file := tar.extractfile(m)) is not None}
    assert {name: got.get(name) for name in files} == files
    patch = workspace.diff(source, commit, edits(*[write(name, "new\n") for name in files]))
    assert len(patch.files) == 6 and patch.additions == 6 and b"Binary" not in patch.diff


def test_binary_and_foreign_text_is_neither_shown_nor_edited(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    entries = {"x.bin": ("100644", blob(evil, b"\0\1")), "l1.txt": ("100644", blob(evil, b"gr\xfc\xdfe\n"))}
    branch(evil, "binary", entries)
    source = source_of(server, "binary")
    commit = workspace.resolve(source)
    with pytest.raises(WorkspaceRefused, match="binary"):
        workspace.read(source, commit, "x.bin", max_bytes=99)
    for path, error in (("x.bin", "binary"), ("l1.txt", "UTF-8")):
        with pytest.raises(InvalidPlan, match=error):
            workspace.diff(source, commit, edits(write(path, "x")))


def test_line_ends_are_kept_and_named_when_a_search_misses_them(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    branch(evil, "crlf", {"w.txt": ("100644", blob(evil, b"one\r\ntwo\r\nthree"))})
    source = source_of(server, "crlf")
    commit = workspace.resolve(source)
    assert b"+TWO\r\n" in workspace.diff(source, commit, edits(replace("w.txt", "two", "TWO"))).diff
    with pytest.raises(InvalidPlan, match="CR LF"):
        workspace.diff(source, commit, edits(replace("w.txt", "one\ntwo", "x")))


def test_a_file_may_become_a_directory_and_keeps_its_mode(
    workspace: GitWorkspace, server: GitServer, evil: Path
) -> None:
    branch(evil, "shapes", {"a": ("100644", blob(evil, b"a\n")), "run": ("100755", blob(evil, b"r\n"))})
    source = source_of(server, "shapes")
    commit = workspace.resolve(source)
    patch = workspace.diff(
        source, commit, edits({"op": "delete", "path": "a"}, write("a/b", "b\n"), write("run", "R\n"))
    )
    assert patch.files == ("a", "a/b", "run") and b"100755" in patch.diff


# ------------------------------------------------------------------ caps


def test_a_tree_over_its_caps_is_refused(tmp_path: Path, demo: GitSource, server: GitServer, evil: Path) -> None:
    few = GitWorkspace(tmp_path / "few", allow_loopback_http=True, limits=Limits(files=2))
    with pytest.raises(WorkspaceRefused, match="has 3 files; at most 2"):
        few.snapshot(demo, few.resolve(demo))
    small = GitWorkspace(tmp_path / "small", allow_loopback_http=True, limits=Limits(archive_bytes=2000))
    with pytest.raises(WorkspaceRefused, match="at most 2000"):
        small.snapshot(demo, small.resolve(demo))
    empty = blob(evil, b"")
    branch(evil, "many", {f"f{n:05d}": ("100644", empty) for n in range(5000)})
    listed = GitWorkspace(tmp_path / "listed", allow_loopback_http=True, limits=Limits(tree_bytes=10_000))
    many = source_of(server, "many")
    with pytest.raises(WorkspaceRefused, match="more than 10000 bytes"):
        listed.map(many, listed.resolve(many), max_bytes=999)


def test_a_fetch_over_its_cap_is_stopped_and_leaves_nothing(tmp_path: Path, server: GitServer, evil: Path) -> None:
    branch(evil, "huge", {"noise": ("100644", blob(evil, os.urandom(20_000_000)))})
    workspace = GitWorkspace(tmp_path, allow_loopback_http=True, limits=Limits(fetch_bytes=1_000_000))
    with pytest.raises(WorkspaceRefused, match="more than 1000000 bytes"):
        workspace.resolve(source_of(server, "huge"))
    assert not any(path.stat().st_size > 500_000 for path in tmp_path.rglob("*") if path.is_file())
    assert workspace.resolve(source_of(server, "main"))


def test_a_small_pack_that_unfolds_to_much_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    git(tmp_path / "bomb.git", "init", "--bare", "--quiet", "--initial-branch=main", str(tmp_path / "bomb.git"))
    base, big = unfolding_blobs(tmp_path / "bomb.git", copies=32)
    branch(tmp_path / "bomb.git", "main", {"base": ("100644", base), "big": ("100644", big)})
    limits = Limits(memory_bytes=256 * 1024 * 1024)
    workspace = GitWorkspace(tmp_path / "cache", allow_loopback_http=True, limits=limits)
    with GitServer(tmp_path) as server, pytest.raises(WorkspaceRefused, match=r"(?i)out of memory"):
        workspace.resolve(GitSource(url=server.url("bomb.git"), ref="main"))


def test_lock_files_of_a_killed_fetch_do_not_stop_the_next_one(tmp_path: Path, demo: GitSource) -> None:
    workspace = GitWorkspace(tmp_path, allow_loopback_http=True)
    workspace.resolve(demo)
    (clone,) = (path.parent for path in tmp_path.glob("*/shallow"))
    (clone / "shallow.lock").touch()
    (clone / "refs" / "sisu" / "last.lock").touch()
    assert workspace.resolve(GitSource(url=demo.url, ref="other"))


def test_edits_over_their_caps_are_refused(tmp_path: Path, demo: GitSource) -> None:
    tight = GitWorkspace(tmp_path, allow_loopback_http=True, limits=Limits(edit_bytes=100, patch_bytes=150))
    commit = tight.resolve(demo)
    with pytest.raises(InvalidPlan, match="more than 100 bytes"):
        tight.diff(demo, commit, edits(write("x", "y" * 101)))
    with pytest.raises(InvalidPlan, match="more than 150 bytes"):
        tight.diff(demo, commit, edits(write("x", "y" * 100)))


@pytest.mark.parametrize(
    ("pattern", "text", "seconds", "error"),
    [
        (r"^(a*)(a*)(a*)(a*)\4\3\2\1b$", "a" * 3000, 1.0, "took too long"),
        (r"((((x{1,250}){1,250}){1,250}){1,250}){1,250}", "x", 60.0, "cannot be searched"),  # asks for all memory
    ],
)
def test_a_hostile_expression_is_bounded(
    tmp_path: Path, server: GitServer, evil: Path, pattern: str, text: str, seconds: float, error: str
) -> None:
    branch(evil, "redos", {"t.txt": ("100644", blob(evil, text.encode() + b"\n"))})
    limits = Limits(search_seconds=seconds, search_memory_bytes=256 * 1024 * 1024)
    workspace = GitWorkspace(tmp_path, allow_loopback_http=True, limits=limits)
    source = source_of(server, "redos")
    commit = workspace.resolve(source)
    started = time.monotonic()
    with pytest.raises(WorkspaceRefused, match=error):
        workspace.search(source, commit, pattern, max_bytes=1000)
    assert time.monotonic() - started < 30  # bounded at all


def test_an_intent_without_a_repository(workspace: GitWorkspace) -> None:
    commit = workspace.resolve(None)
    assert commit == "a83f112aa618510c0267017ef852e988a14da8f8"
    assert workspace.map(None, commit, max_bytes=99) == "(no files)\n"
    patch = workspace.diff(None, commit, edits(write("hello.txt", "hello\n")))
    assert patch.files == ("hello.txt",) and patch.additions == 1
    with pytest.raises(WorkspaceRefused, match="without a repository"):
        workspace.map(None, "1" * 40, max_bytes=99)


def test_the_patch_applies_to_the_unpacked_snapshot(tmp_path: Path, workspace: GitWorkspace, demo: GitSource) -> None:
    commit = workspace.resolve(demo)
    new = {"new/x.txt": "no line end", "a b.txt": "b\n", 'q"uo\\te.txt': "q\n", "ö.txt": "ö\n", "empty.txt": ""}
    changes = [replace("src/a.py", "two = 2", "two = 22"), replace("src/ünï.txt", "grüße", "ça")]
    patch = workspace.diff(demo, commit, edits(*changes, *[write(path, text) for path, text in new.items()]))
    assert set(patch.files) == {"src/a.py", "src/ünï.txt", *new}
    assert "+++ b/src/ünï.txt" in patch.diff.decode()
    with tarfile.open(fileobj=io.BytesIO(workspace.snapshot(demo, commit).archive)) as tar:
        tar.extractall(tmp_path, filter="data")
    environ = {"PATH": os.environ["PATH"], "HOME": "/dev/null", "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", "-"], input=patch.diff, cwd=tmp_path, env=environ, check=True)
    assert (tmp_path / "src/a.py").read_text() == "one = 1\ntwo = 22\nagain = 1\n"
    assert {path: (tmp_path / path).read_text() for path in new} == new
