"""One contract for every SandboxProvider. Commands stay in the small language that the mock shares with a real shell.

A new provider adds one entry to REAL (tests/support/sandbox_kit.py). What only a real sandbox can show is in test_sandbox_<provider>.py.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from controller.core.contract import ErrCode, Limits
from controller.core.errors import InvalidIntent
from controller.sbx.mock import MockProvider
from tests.support.sandbox_kit import (
    OUTPUT_LIMIT,
    REAL,
    STORE,
    Kit,
    Outcome,
    archive,
    eventually,
    real_kit,
    upload,
)


@pytest.fixture(params=["mock", *REAL])
def kit(request: pytest.FixtureRequest, root: Path) -> Iterator[Kit]:
    if request.param == "mock":
        mock = MockProvider(start_log=root / "starts", output_limit=OUTPUT_LIMIT)
        yield Kit(provider=mock, start_log=root / "starts", real=False)
    else:
        with real_kit(request.param, root, request) as found:
            yield found


@pytest.mark.parametrize(
    ("cmd", "status", "code"),
    [
        ("true", 0, ErrCode.NONE),
        ("false", 1, ErrCode.CMD_NONZERO),
        ("exit 7", 7, ErrCode.CMD_NONZERO),
        ("false && echo never; echo on", 0, ErrCode.NONE),
        ("true && false", 1, ErrCode.CMD_NONZERO),
        ("exit 3\necho never", 3, ErrCode.CMD_NONZERO),
        ("exit 137", 137, ErrCode.CMD_NONZERO),
    ],
)
def test_exit_codes(kit: Kit, cmd: str, status: int, code: ErrCode) -> None:
    out = kit.run(cmd)
    assert (out.res.exit, out.res.err_code) == (status, code)
    assert "never" not in out.res.stdout
    assert out.res.task_key == "k" * 64
    assert out.res.sandbox_ref.startswith(f"{kit.provider.name}:")


def test_streams_arrive_in_order_and_apart(kit: Kit) -> None:
    out = kit.run("echo one; echo a >&2; echo 'two  three'; echo b >&2")
    assert out.text("stdout") == out.res.stdout == "one\ntwo  three\n"
    assert out.text("stderr") == out.res.stderr == "a\nb\n"


def test_output_is_there_before_the_end(kit: Kit) -> None:
    join = kit.begin("echo early; sleep 1; echo late")
    eventually(lambda: any(b"early" in chunk.data for chunk in kit.live))
    assert not any(b"late" in chunk.data for chunk in kit.live)
    assert join().text("stdout") == "early\nlate\n"


def test_a_timeout_ends_the_task(kit: Kit) -> None:
    out = kit.run("echo before; sleep 30; echo after", timeout_ms=300)
    assert out.res.err_code is ErrCode.TIMEOUT
    assert out.res.exit is None
    assert out.res.stdout == "before\n"
    assert 0.25 < out.seconds < 5
    assert out.res.metrics.wall_ms >= 250


def test_cancel_ends_the_task(kit: Kit) -> None:
    flag = threading.Event()
    join = kit.begin("echo before; sleep 30", canceled=flag.is_set)
    eventually(lambda: kit.live)
    flag.set()
    out = join()
    assert (out.res.err_code, out.res.exit) == (ErrCode.CANCELED, None)
    assert out.seconds < 5
    assert kit.provider.owned(STORE) == []


def test_the_environment_is_passed(kit: Kit) -> None:
    value = "a b 'c' \"d\" $e äö"
    assert kit.run('echo "$GREETING"', env={"GREETING": value}).res.stdout == f"{value}\n"


def changed(kit: Kit, cmd: str, files: Mapping[str, bytes]) -> Outcome:
    """One run in a workspace of these files."""
    parts = upload(("archive", archive(files)))
    return kit.run(cmd, files_in=parts["files_in"], files=parts["files"])


@pytest.mark.parametrize("exit_", [0, 3])
def test_what_a_task_changed_comes_back_as_a_diff(kit: Kit, exit_: int) -> None:
    if not kit.real:
        pytest.skip("the mock has no workspace")
    before = {"keep": b"1\n", "edit": b"old\n", "drop": b"gone\n", "bin": bytes(range(256)), ".gitignore": b"*.pyc\n"}
    made = "echo new > edit; rm drop; mkdir -p sub/__pycache__; echo a > sub/added; head -c 300 /dev/zero > bin; chmod +x keep"
    made += "; echo x > junk.pyc; echo y > sub/__pycache__/z"
    out = changed(kit, f"{made}; exit {exit_}", before)
    assert out.res.exit == exit_, out.res.stderr
    (diff,) = out.artifacts
    assert (diff.name, diff.kind) == ("changes.diff", "diff")
    with tempfile.TemporaryDirectory() as own:
        place = Path(own)
        for name, content in before.items():
            (place / name).write_bytes(content)
        subprocess.run(["git", "apply"], cwd=place, input=diff.content, check=True)
        after = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        assert os.access(place / "keep", os.X_OK)
    kept = {name: before[name] for name in ("keep", ".gitignore")}
    assert after == {**kept, "edit": b"new\n", "sub/added": b"a\n", "bin": bytes(300)}


def test_a_task_that_changes_nothing_leaves_no_diff_and_cannot_plant_one(kit: Kit) -> None:
    if not kit.real:
        pytest.skip("the mock has no workspace")
    for planted in (
        "echo fake > /output/changes.diff",
        "ln -s /etc/passwd /output/changes.diff",
        "mkdir /output/changes.diff",
    ):
        assert changed(kit, f"cat a; {planted}", {"a": b"a\n"}).artifacts == []


def test_a_diff_that_cannot_be_made_is_said_so_and_fails_nothing(kit: Kit) -> None:
    if not kit.real:
        pytest.skip("the mock has no workspace")
    out = changed(kit, "mkdir sub && cd sub && git init -q && echo made > /output/result", {"a": b"a\n"})
    assert [a.name for a in out.artifacts] == ["result"]
    assert "what the task changed in its workspace could not be found out" in out.res.stderr
    assert out.res.err_code is ErrCode.NONE


def test_limits_are_accepted(kit: Kit) -> None:
    limits = Limits(cpu_millis=500, memory_mb=128, pids=64, disk_mb=64)
    assert kit.run("echo fine", limits=limits).res.err_code is ErrCode.NONE


def test_templates_resolve_to_a_fixed_reference(kit: Kit) -> None:
    assert kit.provider.resolve("base") == kit.provider.resolve("base")
    with pytest.raises(InvalidIntent, match=r"spec\.sandbox\.template: 'cobol' is unknown here; there is: base"):
        kit.provider.resolve("cobol")


def test_another_reference_than_resolved_starts_nothing(kit: Kit) -> None:
    out = kit.run("echo never", env_ref="local:base@sha256:" + "0" * 64)
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert not kit.start_log.exists()


def test_what_cannot_be_run_as_it_is_meant_is_known_before(kit: Kit) -> None:
    kit.provider.check(kit.request("echo fine"))
    with pytest.raises(InvalidIntent, match=r"spec\.sandbox: the working directory '/etc' is not in /workspace"):
        kit.provider.check(kit.request("echo never", workdir="/etc"))
    with pytest.raises(InvalidIntent, match=r"spec\.sandbox\.template"):
        kit.provider.check(kit.request("echo never", env_ref="local:base@sha256:" + "0" * 64))


def test_kill_by_fence_while_running(kit: Kit) -> None:
    owner = kit.owner()
    join = kit.begin("echo before; sleep 30", owner=owner)
    eventually(lambda: kit.live)
    assert kit.provider.owned(STORE) == [owner]
    assert kit.provider.owned("another store") == []
    assert kit.provider.kill(kit.owner()) == 0, "another fence is none of its business"
    assert kit.provider.kill(owner) == 1
    out = join()
    assert (out.res.err_code, out.res.exit) == (ErrCode.LOST, None)
    assert out.seconds < 5
    assert kit.provider.owned(STORE) == []
    assert kit.provider.kill(owner) == 0


def test_a_retry_with_another_fence_is_independent(kit: Kit) -> None:
    first, second = kit.owner(attempt=1), kit.owner(attempt=2)
    slow = kit.begin("echo first; sleep 30", owner=first)
    eventually(lambda: kit.live)
    other = kit.begin("sleep 0.5; echo second", owner=second)
    eventually(lambda: len(kit.provider.owned(STORE)) == 2)
    assert kit.provider.kill(first) == 1
    assert slow().res.err_code is ErrCode.LOST
    assert other().res.stdout == "second\n"
    starts = sorted(line.split()[1:] for line in kit.start_log.read_text().splitlines())
    assert starts == [["1", str(first.fence)], ["2", str(second.fence)]]


def test_an_exception_from_the_caller_leaves_nothing_running(kit: Kit) -> None:
    def emit(_: object) -> None:
        raise RuntimeError("the database is gone")

    request, started = kit.request("echo x; sleep 30"), time.monotonic()
    with pytest.raises(RuntimeError):
        kit.provider.run(request, owner=kit.owner(), files={}, emit=emit, canceled=lambda: False)
    assert kit.provider.owned(STORE) == []
    assert time.monotonic() - started < 10


def test_every_start_of_a_command_is_logged_once(kit: Kit) -> None:
    owner = kit.owner(attempt=3)
    kit.run("exit 1", owner=owner)
    assert kit.start_log.read_text() == f"{owner.task_key} 3 {owner.fence}\n"


def test_archive_and_patch_reach_the_task(kit: Kit) -> None:
    diff = b"--- a/greeting\n+++ b/greeting\n@@ -1 +1 @@\n-hello\n+goodbye\n"
    parts = upload(("patch", diff), ("archive", archive({"greeting": b"hello\n"})))
    out = kit.run("cat greeting", **parts)
    assert out.res.err_code is ErrCode.NONE, out.res.stderr
    if kit.real:
        assert out.res.stdout == "goodbye\n"


def test_bytes_that_do_not_match_their_hash_are_refused(kit: Kit) -> None:
    parts = upload(("archive", archive({"a": b"a"})))
    (sha,) = parts["files"]
    for files in ({sha: b"other bytes"}, {}):
        out = kit.run("echo never", files_in=parts["files_in"], files=files)
        assert out.res.err_code is ErrCode.UPLOAD_FAIL
        assert sha in out.res.stderr
    assert not kit.start_log.exists()


def test_output_files_become_artifacts(kit: Kit) -> None:
    out = kit.run('echo "<testsuite/>" > "$SISU_OUTPUT_DIR/junit.xml"; echo x > "$SISU_OUTPUT_DIR/a.txt"; exit 1')
    assert out.res.err_code is ErrCode.CMD_NONZERO
    assert [(a.name, a.kind, a.content) for a in out.artifacts] == [
        ("a.txt", "file", b"x\n"),
        ("junit.xml", "junit", b"<testsuite/>\n"),
    ]
    assert [(f.path, f.sha256) for f in out.res.files_out] == [
        (a.name, hashlib.sha256(a.content).hexdigest()) for a in out.artifacts
    ]


def test_big_output_is_cut_with_a_mark(kit: Kit) -> None:
    big = kit.run('echo "$BIG"; echo "$BIG"; echo "$BIG"; echo end >&2', env={"BIG": "y" * 60_000})
    mark = f"\n[sisu-kodo: output cut at {OUTPUT_LIMIT} bytes]\n"
    assert len(big.text("stdout")) == OUTPUT_LIMIT + len(mark)
    assert big.text("stdout").endswith(mark) and big.text("stdout").count(mark) == 1
    assert len(big.res.stdout.encode()) == 16_384 and big.res.stdout.endswith(mark)
    assert big.res.stderr == "end\n", "one stream's cut leaves the other alone"


def test_endless_output_is_cut_and_cancel_is_asked_meanwhile(kit: Kit) -> None:
    if not kit.real:
        pytest.skip("the mock prints no more than it was told")
    asked: list[float] = []
    out = kit.run("yes; echo never", timeout_ms=1_500, canceled=lambda: bool(asked.append(time.monotonic())))  # type: ignore[func-returns-value]
    assert out.res.err_code is ErrCode.TIMEOUT
    assert len(out.text("stdout")) < 2 * OUTPUT_LIMIT
    assert max(later - sooner for sooner, later in pairwise(asked)) < 1.0


def test_output_that_is_not_text_can_be_stored(kit: Kit) -> None:
    out = kit.run('echo "$ODD"', env={"ODD": "a\u202eb"})
    assert "\x00" not in out.res.stdout
    out.res.stdout.encode()


@pytest.mark.parametrize(
    "cmd",
    [
        "true; false",
        "false && true; echo 'a  b' c",
        "echo; echo -n x; true",
        'echo "a b"   c && exit 300',
        "sleep 0.01 && echo done",
        "echo a; ; echo b",
        "false\nfalse && echo x\n",
        " true ;\n echo x ; ",
    ],
)
def test_the_mock_agrees_with_a_shell_or_says_that_it_does_not_know(cmd: str, tmp_path: Path) -> None:
    mock = Kit(provider=MockProvider(), start_log=tmp_path / "starts")
    out = mock.run(cmd).res
    if out.stdout == f"{cmd}\n":
        return
    real = subprocess.run(["/bin/sh", "-c", cmd], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (out.exit, out.stdout) == (real.returncode, real.stdout)
