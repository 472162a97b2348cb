"""Law 13: whatever edits a model proposes, the answer is a patch that does exactly these edits inside the tree, or InvalidPlan.

The oracle is not the code under test: a dictionary says what the files should hold, and git applies the patch to the unpacked snapshot
as the sandbox does.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.core.contract import DeleteFile, Edit, ReplaceText, WriteFile
from controller.core.errors import InvalidPlan
from controller.core.model import GitSource, Patch
from controller.sbx.task import APPLY
from controller.workflows.compile import validate
from controller.workspace import GitWorkspace
from devcluster.gitserver import GitServer
from tests.support.repositories import blob, branch, git, tree

TEXTS = {
    "README.md": "# demo\n",
    "a.py": "one = 1\ntwo = 2\nagain = 1\n",
    "crlf.txt": "one\r\ntwo\r\nthree",
    "empty": "",
    "no-end": "x",
    "odd.diff": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n\\ No newline at end of file\n",
    "run.sh": "#!/bin/sh\n",
    "src/deep/b.txt": "aaaa\n",
    "ünï cödé.txt": "grüße \U0001f600\n",
}
TASK = {"id": "t", "title": "t", "command": "true", "timeoutSeconds": 1}
PLAN = {"goal": "g", "summary": "s", "design": [], "files": [], "risks": [], "tests": [], "tasks": [TASK]}

KNOWN = (*TEXTS, "link", "out-of-reach", "sub", "raw.bin", "latin1.txt")
ODD = (
    *("", "/", ".", "..", "/etc/passwd", "../x", "a/../x", "a/./x", "a//x", "a/", "src", "src/deep", "a.py/x", "link/x", "sub/x"),
    *(".git", ".git/hooks/x", ".GIT/x", "a/.git./x", "git~1/x", ".git:x/y", ".gitattributes", ".gitmodules", ".gitignore"),
    *("new", "new/x", "new/x/y", "-x", "--cached", ":(top)x", ":!x", "*", "a b", " a", "a ", "a\tb", "a\nb", "a\0b", "a\u202eb"),
    *('"', "'", "\\", "a\\nb", "\u00e9", "e\u0301", "\udcff", "\ud800", "/dev/null", "dev/null", "b" * 255, "b" * 256),
    *("\U0001f600" * 64, "d/" * 300 + "x", "HEAD", "a.py~", "a.py.orig", "A.PY", "{a => b}", "a.py\t2020-01-01"),
)  # fmt: skip
PATH = st.sampled_from(KNOWN) | st.sampled_from(ODD) | st.text(st.characters(), max_size=6)
PIECES = (
    *("", "a", "aa", "x", "one = 1", " = 1", "1\n", "\n", "\r\n", "\r", "two", "\ntwo", "#", "\u00fc", "u\u0308", "\U0001f600", "\ufeff"),
    *("a\0b", "\ud800", "\udcff", "\u2028", "\f", "\x1b[2J", "\u202e", "-- \n", "@@ -1 +1 @@\n", "diff --git a/x b/x\n", "+++ b/../x\n"),
    *("rename from a\nrename to ../b\n", "\\ No newline at end of file\n", "GIT binary patch\n", " trailing \t\n"),
)  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(st.characters(), max_size=8)
EDIT = st.one_of(
    st.builds(lambda p, c: {"op": "write", "path": p, "content": c}, PATH, TEXT | st.just("y\n" * 100_000)),
    st.builds(lambda p: {"op": "delete", "path": p}, PATH),
    st.builds(lambda p, s, r: {"op": "replace", "path": p, "search": s, "replace": r}, PATH, TEXT, TEXT),
    # What applies more often than not: a known file, and a piece of it.
    st.sampled_from(sorted(TEXTS.items())).flatmap(
        lambda kv: st.builds(
            lambda a, n, r: {"op": "replace", "path": kv[0], "search": kv[1][a : a + n], "replace": r},
            st.integers(0, max(0, len(kv[1]) - 1)),
            st.integers(1, 12),
            TEXT,
        )
    ),
)


PLAIN = st.lists(
    st.sampled_from([p for p in PIECES if p.isascii() and "\0" not in p] + ["\u00fc", "\u2028"]), max_size=6
).map("".join)
SOUND = st.one_of(
    st.builds(
        lambda p, c: {"op": "write", "path": p, "content": c},
        st.sampled_from([*TEXTS, "new", "src/new", "a b", '"', "\\", "-x", "\u00e9"]),
        PLAIN,
    ),
    st.sampled_from(sorted(TEXTS)).map(lambda p: {"op": "delete", "path": p}),
    st.builds(
        lambda ps, r: {"op": "replace", "path": ps[0], "search": ps[1], "replace": r},
        st.sampled_from(
            [("a.py", "two"), ("a.py", "= 1\ntwo"), ("crlf.txt", "\r\ntwo\r"), ("no-end", "x"), ("odd.diff", "@@ -1")]
        ),
        PLAIN,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A repository, its commit, and what its snapshot unpacks to."""

    workspace: GitWorkspace
    source: GitSource
    commit: str
    unpacked: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("fuzz")
    repo = root / "served" / "fuzz.git"
    git(repo, "init", "--bare", "--quiet", str(repo))
    flat = {n: ("100755" if n == "run.sh" else "100644", blob(repo, t.encode())) for n, t in TEXTS.items()}
    inner = {"b.txt": flat.pop("src/deep/b.txt")}
    more = {
        "src": ("40000", tree(repo, {"deep": ("40000", tree(repo, inner))})),
        "link": ("120000", blob(repo, b"src/deep")),
        "out-of-reach": ("120000", blob(repo, b"nowhere")),
        "sub": ("160000", "1" * 40),
        "raw.bin": ("100644", blob(repo, b"\0\1\2")),
        "latin1.txt": ("100644", blob(repo, b"gr\xfc\xdfe\n")),
    }
    branch(repo, "main", {**flat, **more})
    with GitServer(root / "served") as server:
        workspace = GitWorkspace(root / "cache", allow_loopback_http=True)
        source = GitSource(url=server.url("fuzz.git"), ref="main")
        commit = workspace.resolve(source)
        unpacked = root / "unpacked"
        with tarfile.open(fileobj=io.BytesIO(workspace.snapshot(source, commit).archive)) as tar:
            tar.extractall(unpacked, filter="tar")
        yield Ground(workspace=workspace, source=source, commit=commit, unpacked=unpacked)


def wanted(edits: Sequence[Edit]) -> dict[str, str]:
    """What the files should hold, by the plainest reading of the edits."""
    files = dict(TEXTS)
    for edit in edits:
        match edit:
            case WriteFile():
                files[edit.path] = edit.content
            case DeleteFile():
                del files[edit.path]
            case ReplaceText():
                assert sum(files[edit.path].startswith(edit.search, at) for at in range(len(files[edit.path]))) == 1
                files[edit.path] = files[edit.path].replace(edit.search, edit.replace)
    return files


def applied(patch: Patch, unpacked: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Text files and their modes after `git apply`, by the command that the sandbox uses. Nothing beside the tree may change."""
    with tempfile.TemporaryDirectory(prefix="sisu-fuzz-") as scratch:
        place = Path(scratch, "outer", "workspace")
        shutil.copytree(unpacked, place, symlinks=True)
        if patch.diff:
            for check in (("--check",), ()):
                done = subprocess.run(
                    [*APPLY[:-1], *check, "-"], cwd=place, input=patch.diff, capture_output=True, check=False
                )
                assert done.returncode == 0, done.stderr.decode()
        assert os.listdir(scratch) == ["outer"] and os.listdir(place.parent) == ["workspace"]
        found, modes = {}, {}
        for path in place.rglob("*"):
            name = str(path.relative_to(place))
            if path.is_file() and not path.is_symlink() and name not in ("raw.bin", "latin1.txt"):
                found[name] = path.read_bytes().decode()
                modes[name] = path.stat().st_mode & 0o777
        assert os.readlink(place / "link") == "src/deep" and os.listdir(place / "sub") == []
        assert (place / "raw.bin").read_bytes() == b"\0\1\2"
        return found, modes


def proposed(raw: Sequence[Mapping[str, Any]]) -> Sequence[Edit]:
    """As the model's answer is read. Raises InvalidPlan."""
    turn = validate({"kind": "plan", "plan": {**PLAN, "edits": list(raw)}}, max_tasks=1)
    assert turn.plan is not None
    return turn.plan.edits


def one_story(ground: Ground, raw: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there was a patch."""
    refusal = ""
    try:
        edits = proposed(raw)
        patch = ground.workspace.diff(ground.source, ground.commit, edits)
    except InvalidPlan as e:
        refusal = str(e)
    if refusal:
        assert refusal.encode() and len(refusal) < 5000, "it is quoted to the model and shown to people"
        return False
    files = wanted(edits)
    found, modes = applied(patch, ground.unpacked)
    assert found == files
    assert set(patch.files) == {p for p in files.keys() | TEXTS.keys() if files.get(p) != TEXTS.get(p)}
    assert all(mode == (0o755 if name == "run.sh" else 0o644) for name, mode in modes.items())
    return True


@given(st.lists(EDIT, min_size=1, max_size=4))
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_law_13_any_edits_are_exactly_their_patch_or_an_invalid_plan(ground: Ground, raw: list[dict[str, Any]]) -> None:
    one_story(ground, raw)


@given(st.lists(SOUND, min_size=1, max_size=5))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_law_13_a_patch_does_what_its_edits_say(ground: Ground, raw: list[dict[str, Any]]) -> None:
    one_story(ground, raw)


@pytest.mark.parametrize("path", ODD, ids=ascii)
def test_law_13_any_path_is_written_below_the_root_or_refused(ground: Ground, path: str) -> None:
    for op in ({"op": "write", "content": "x\n"}, {"op": "delete"}, {"op": "replace", "search": "a", "replace": "b"}):
        one_story(ground, [{**op, "path": path}])


@pytest.mark.parametrize(
    ("raw", "patched"),
    [
        ([{"op": "delete", "path": "a.py"}, {"op": "write", "path": "a.py", "content": "new\n"}], True),
        ([{"op": "delete", "path": "a.py"}, {"op": "write", "path": "a.py", "content": TEXTS["a.py"]}], True),
        ([{"op": "delete", "path": "a.py"}, {"op": "write", "path": "a.py/x", "content": "x"}], True),
        ([{"op": "delete", "path": "src/deep/b.txt"}, {"op": "write", "path": "src", "content": "x"}], True),
        ([{"op": "write", "path": "n", "content": "x"}, {"op": "delete", "path": "n"}], True),
        ([{"op": "write", "path": "n", "content": "x"}, {"op": "write", "path": "n/x", "content": "x"}], False),
        ([{"op": "delete", "path": "a.py"}, {"op": "delete", "path": "a.py"}], False),
        ([{"op": "delete", "path": "a.py"}, {"op": "replace", "path": "a.py", "search": "one", "replace": "x"}], False),
        ([{"op": "replace", "path": "src/deep/b.txt", "search": "aaa", "replace": "x"}], False),  # overlapping
        ([{"op": "replace", "path": "a.py", "search": "", "replace": "x"}], False),
        ([{"op": "replace", "path": "crlf.txt", "search": "one\ntwo", "replace": "x"}], False),
        ([{"op": "replace", "path": "crlf.txt", "search": "one\r\ntwo", "replace": "x\r\ny"}], True),
        ([{"op": "write", "path": "empty", "content": ""}], True),
        ([{"op": "write", "path": "made-empty", "content": ""}], True),
        ([{"op": "write", "path": "dev/null", "content": "x\n"}], True),
        ([{"op": "delete", "path": n} for n in TEXTS], True),
        ([{"op": "write", "path": "run.sh", "content": "#!/bin/bash\n"}], True),  # and stays executable
    ],
    ids=str,
)  # fmt: skip
def test_law_13_edits_of_one_path_follow_each_other(ground: Ground, raw: list[dict[str, Any]], patched: bool) -> None:
    assert one_story(ground, raw) is patched
