"""Hostile tasks, killed controllers and leftovers: what the local provider promises beyond the common contract.

Runs as root and as an ordinary user; what needs cgroups or an outer uid is skipped aloud for the latter.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode, Limits
from controller.core.errors import InvalidIntent, Permanent, Unavailable
from controller.core.model import Owner
from controller.sbx import processes, templates
from controller.sbx.artifacts import Caps
from controller.sbx.limits import CgroupTree
from controller.sbx.local import LocalProvider
from devcluster.sandbox_python import toolchain
from tests.support.sandbox_kit import STORE, Kit, archive, eventually, upload

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: cgroups and outer uids")
MARK = f"4{os.getpid()}"  # so that a process which an earlier run left is never taken for ours
CGROUPS = f"sisu-kodo-test-{os.getpid()}"
CAPS = Caps(files=5, file_bytes=100_000, total_bytes=250_000)


@pytest.fixture
def kit(root: Path) -> Iterator[Kit]:
    """After each test nothing may be left: no directory, no cgroup, no process under an outer uid of ours."""
    local = another(root, start_log=root / "starts", caps=CAPS, grace_seconds=0.5)
    yield Kit(provider=local, start_log=root / "starts")
    local.close()
    assert list((root / "state" / "boxes").iterdir()) == []
    groups = CgroupTree.find(parent=CGROUPS)
    assert groups.leftovers() == []
    for directory in groups.roots:
        directory.rmdir()


def another(root: Path, **options: Any) -> LocalProvider:
    """A provider on the test's state, with cgroups of its own: others on this machine have theirs."""
    return LocalProvider(state_root=root / "state", cgroup_parent=CGROUPS, **options)


def running(marker: str) -> list[int]:
    """Pids whose command line is `sleep <marker>`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == f"sleep\0{marker}\0".encode():
                found.append(int(path.parent.name))
    return found


# --------------------------------------------------------------------------- what a task can see


def test_the_hosts_files_are_not_there(kit: Kit) -> None:
    out = kit.run("cat /etc/shadow; ls /root /home /var /work /sys /run /mnt; ls /etc; ls /; true")
    assert "root:" not in out.res.stdout
    assert set(out.res.stdout.split()) <= {
        *("alternatives", "group", "hosts", "ld.so.cache", "localtime", "nsswitch.conf", "passwd", "ssl"),
        *("bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "output", "proc", "sbin", "tmp", "usr", "workspace"),
    }
    for missing in ("/etc/shadow", "/root", "/home", "/var", "/work"):
        assert f"'{missing}'" in out.res.stderr or f"{missing}:" in out.res.stderr


def test_only_its_own_places_are_writable(kit: Kit) -> None:
    out = kit.run(
        "for d in / /usr /etc /dev /proc /bin /lib; do touch $d/x && echo $d; done; touch /workspace/x /tmp/x /output/x"
    )
    assert out.res.stdout == ""
    assert out.res.err_code is ErrCode.NONE


def test_no_privilege_is_left(kit: Kit) -> None:
    out = kit.run("grep -E '^(Cap|NoNewPrivs|Uid)' /proc/self/status; unshare --user true && echo nested; ulimit -c")
    lines = dict(line.split(":\t", 1) for line in out.res.stdout.splitlines() if ":\t" in line)
    assert {name: value for name, value in lines.items() if name.startswith("Cap")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16
    )
    assert (lines["NoNewPrivs"], lines["Uid"].split()[0]) == ("1", "1000")
    assert "nested" not in out.res.stdout
    assert out.res.stdout.endswith("\n0\n")


@needs_root
def test_on_the_host_it_is_an_unprivileged_uid_with_a_private_workspace(kit: Kit, root: Path) -> None:
    join = kit.begin(f"sleep {MARK}1.1", timeout_ms=20_000)
    (pid,) = eventually(lambda: running(f"{MARK}1.1"))
    uids = {line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid")}
    (box,) = (root / "state" / "boxes").iterdir()
    info = (box / "rw" / "workspace").stat()
    assert uids == {str(info.st_uid)} and info.st_uid in range(200_000, 200_064)
    assert oct(info.st_mode & 0o777) == "0o700"
    assert oct((box / "owner.json").stat().st_uid) == "0o0"
    kit.provider.kill(kit.provider.owned(STORE)[0])
    assert join().res.err_code is ErrCode.LOST


def test_no_other_process_no_environment_no_inherited_descriptor(kit: Kit) -> None:
    secret = "s3cr3t-value-for-the-process-list"
    cmd = "cat /proc/*/environ | tr '\\0' '\\n' | cut -d= -f1 | sort -u; ls /proc | grep -c '^[0-9]'; ls /proc/self/fd | wc -l"
    out = kit.run(cmd, env={"TOKEN": secret})
    *names, pids, fds = out.res.stdout.split()
    assert set(names) <= {"HOME", "LANG", "PATH", "PWD", "SISU_OUTPUT_DIR", "TMPDIR", "TOKEN", "USER", "OLDPWD"}
    assert int(pids) < 8
    assert int(fds) == 4, "stdin, stdout, stderr, and the one that ls itself opened"


def test_values_of_the_environment_are_on_no_command_line(kit: Kit) -> None:
    secret = "s3cr3t-value-for-the-process-list"
    join = kit.begin("sleep 0.7", env={"TOKEN": secret})
    eventually(lambda: running("0.7"))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert secret.encode() not in path.read_bytes()
    assert join().res.err_code is ErrCode.NONE


def test_the_hosts_loopback_is_another(kit: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        connect = f"exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}"
        subprocess.run(["/bin/bash", "-c", connect], check=True)
        server.accept()[0].close()  # so the same line would have reached it
        out = kit.run(f"bash -c '{connect}'")
        assert out.res.err_code is ErrCode.CMD_NONZERO
        with pytest.raises(TimeoutError):
            server.accept()


def test_egress_is_refused_before_anything_starts(kit: Kit) -> None:
    assert isinstance(kit.provider, LocalProvider)
    egress = Egress(mode="Public")
    out = kit.run("echo never", egress=egress)
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "only None can be had" in out.res.stderr
    with pytest.raises(InvalidIntent, match="only None can be had"):
        kit.provider.check(kit.request("true", egress=egress))
    assert not kit.start_log.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"A": "x\0--bind\0/\0/host"}},
        {"env": {"A": "\ud800"}},
        {"env": {"A=B": "x"}},
        {"workdir": "/etc"},
        {"workdir": "/workspace/../etc"},
    ],
)
def test_options_cannot_be_smuggled_in(kit: Kit, changes: dict[str, Any]) -> None:
    out = kit.run("ls /host", **changes)
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert not kit.start_log.exists()


# --------------------------------------------------------------------------- what goes in and out


def test_links_in_the_archive_lead_nowhere(kit: Kit) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("leak")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
        tar.addfile(link)
    out = kit.run("cat leak", **upload(("archive", buffer.getvalue())))
    assert out.res.err_code is ErrCode.CMD_NONZERO
    assert out.res.stdout == ""


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("archive", archive({"../escape": b"x"})),
        ("archive", b"not a tar"),
        ("patch", b"--- a/no\n+++ b/no\n@@ -1 +1 @@\n-x\n+y\n"),
        ("patch", b"--- /dev/null\n+++ b/../escape\n@@ -0,0 +1 @@\n+y\n"),
    ],
)
def test_what_does_not_unpack_or_apply_is_an_upload_failure(kit: Kit, kind: str, content: bytes) -> None:
    out = kit.run("echo never", **upload((kind, content)))
    assert out.res.err_code is ErrCode.UPLOAD_FAIL
    assert f"the {kind} could not be taken in" in out.res.stderr
    assert not kit.start_log.exists()


def test_links_in_the_output_are_not_followed(kit: Kit) -> None:
    secret = Path("/etc/hostname").read_bytes()
    cmd = "ln -s /etc/hostname /output/a; ln -s / /output/d; mkfifo /output/p; echo real > /output/r; ln /output/r /output/r2"
    out = kit.run(cmd)
    assert out.res.err_code is ErrCode.NONE
    assert [(a.name, a.content) for a in out.artifacts] == [("r", b"real\n"), ("r2", b"real\n")]
    assert all(secret not in a.content for a in out.artifacts)
    assert out.res.stderr.count("not a regular file") == 3


def test_outputs_are_capped_and_what_is_left_out_is_said(kit: Kit) -> None:
    cmd = (
        "cd /output; truncate -s 10G sparse; for i in 1 2 3 4 5 6 7; do head -c 90000 /dev/zero > f$i; done;"
        " mkdir closed; echo x > closed/x; chmod 0 closed; echo y > dark; chmod 0 dark; echo z > \"$(printf 'a\\033b')\""
    )
    out = kit.run(cmd, limits=Limits(disk_mb=20_000))
    assert out.res.err_code is ErrCode.NONE, out.res.stderr
    assert sum(len(a.content) for a in out.artifacts) <= CAPS.total_bytes
    assert [a.name for a in out.artifacts] == ["f1", "f2"]
    assert "'sparse' left out: 10737418240 bytes" in out.res.stderr
    assert "not printable" in out.res.stderr and "\033" not in out.res.stderr


# --------------------------------------------------------------------------- what a task can use up


def test_a_fork_bomb_stays_inside(kit: Kit) -> None:
    limits = Limits(pids=40)
    counted = kit.run(f"i=0; while [ $i -lt 100 ]; do sleep {MARK}2.1 & i=$((i+1)); done; echo all", limits=limits)
    assert "all" not in counted.res.stdout
    assert counted.res.err_code is ErrCode.CMD_NONZERO
    bomb = kit.run("f() { f | f & }; f; sleep 20", limits=limits, timeout_ms=1_000)
    assert bomb.res.err_code in (ErrCode.TIMEOUT, ErrCode.CMD_NONZERO)
    assert bomb.seconds < 10
    assert running(f"{MARK}2.1") == []


@needs_root
def test_a_memory_hog_is_told_by_the_kernel(kit: Kit) -> None:
    out = kit.run("tail /dev/zero; sleep 0; exit 9", limits=Limits(memory_mb=64))
    assert (out.res.err_code, out.res.exit) == (ErrCode.OOM, 9)
    assert (out.res.metrics.mem_peak_mb or 0) in range(60, 65)


def test_memory_file_systems_are_small(kit: Kit) -> None:
    out = kit.run("head -c 200M /dev/zero > /dev/shm/x")
    assert out.res.err_code is ErrCode.CMD_NONZERO
    assert "No space left" in out.res.stderr


@pytest.mark.parametrize("step", ["head -c 8M /dev/zero > $i", "touch $(seq -f $i.%g 500)"], ids=["bytes", "inodes"])
def test_many_files_are_stopped(kit: Kit, step: str) -> None:
    out = kit.run(f"i=0; while :; do {step}; i=$((i+1)); done", limits=Limits(disk_mb=32), timeout_ms=20_000)
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, None)
    assert "more than 32 MiB on disk" in out.res.stderr


def test_endless_output_is_drained_and_does_not_block(kit: Kit) -> None:
    out = kit.run("yes; echo never", timeout_ms=1_000)
    assert out.res.err_code is ErrCode.TIMEOUT
    assert len(out.text("stdout")) < (1 << 20) + 100
    done = kit.run("yes | head -c 300000000; echo done >&2")
    assert (done.res.err_code, done.res.stderr) == (ErrCode.NONE, "done\n")


def test_deep_and_closed_trees_are_removed(kit: Kit) -> None:
    cmd = "i=0; while [ $i -lt 1100 ]; do mkdir dddd && cd dddd; i=$((i+1)); done; mkdir -p /workspace/a/b; chmod 0 /workspace/a"
    assert kit.run(cmd).res.err_code is ErrCode.NONE


def test_metrics_are_of_the_whole_tree(kit: Kit) -> None:
    out = kit.run("sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'")
    assert out.res.metrics.wall_ms > 0
    assert (out.res.metrics.cpu_ms or 0) > 50 if ROOT else out.res.metrics.cpu_ms is None


# --------------------------------------------------------------------------- how a task ends


def test_sigterm_comes_first_and_is_not_enough_to_stay(kit: Kit) -> None:
    polite = kit.run("trap 'echo bye; exit 0' TERM; sleep 30 & wait", timeout_ms=300)
    assert (polite.res.err_code, polite.res.stdout) == (ErrCode.TIMEOUT, "bye\n")
    stubborn = kit.run("trap '' TERM; while :; do sleep 0.05; done", timeout_ms=300)
    assert stubborn.res.err_code is ErrCode.TIMEOUT
    assert 0.7 < stubborn.seconds < 5


def test_daemons_die_with_their_task(kit: Kit) -> None:
    out = kit.run(
        f"(setsid sh -c 'trap \"\" TERM HUP; sleep {MARK}3.1' > /dev/null 2>&1 &); (sleep {MARK}3.2 &); sleep 0.1; echo started"
    )
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "started\n")
    assert out.seconds < 5, "the background process that holds stdout is not waited for"
    assert running(f"{MARK}3.1") == running(f"{MARK}3.2") == []


def test_an_exception_from_the_caller_leaves_nothing_running(kit: Kit) -> None:
    def emit(_: object) -> None:
        raise RuntimeError("the database is gone")

    with pytest.raises(RuntimeError):
        kit.provider.run(
            kit.request(f"echo x; sleep {MARK}3.3"), owner=kit.owner(), files={}, emit=emit, canceled=lambda: False
        )
    assert running(f"{MARK}3.3") == []
    assert kit.provider.owned(STORE) == []


def test_bubblewrap_that_fails_is_a_boot_failure(root: Path) -> None:
    broken = templates.Template(name="broken", ref="local:broken", binds=((Path("/nonexistent"), "/opt/x"),))
    local = LocalProvider(state_root=root / "state", templates=[broken])
    out = Kit(provider=local, start_log=root / "starts", template="broken").run("exit 1")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "/nonexistent" in out.res.stderr
    local.close()
    with pytest.raises(Unavailable, match="/nonexistent/bwrap is missing: install it"):
        LocalProvider(state_root=root / "state", bwrap=Path("/nonexistent/bwrap"))


@needs_root
def test_places_that_the_outer_uid_cannot_pass_are_named(root: Path) -> None:
    closed = root / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(Unavailable, match=str(closed)):
        LocalProvider(state_root=closed / "state")


def test_no_descriptor_is_leaked_and_threads_may_end(kit: Kit) -> None:
    """The thread that ran the first task started the launcher; --die-with-parent must not follow it."""
    kit.begin("true")()
    join = kit.begin("sleep 0.5; echo still here")
    assert join().res.stdout == "still here\n"
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [threading.Thread(target=kit.run, args=("echo x > /output/x",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Other providers of this test process may close theirs meanwhile.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --------------------------------------------------------------------------- controllers that die

CONTROLLER = """
import json, sys
from pathlib import Path
from controller.core.contract import Egress, Limits, SBXReq
from controller.core.model import Owner
from controller.sbx.local import LocalProvider
root, cmd, owner = Path(sys.argv[1]), sys.argv[2], Owner(**json.loads(sys.argv[3]))
local = LocalProvider(state_root=root / "state", cgroup_parent=sys.argv[4])
request = SBXReq(intent_id="i", run_id="r", step_id="s", task_id="t", generation=1, env_ref=local.resolve("base"), cmd=cmd,
                 files_in=(), env={}, workdir="/workspace", timeout_ms=60_000, limits=Limits(), egress=Egress())
res, _ = local.run(request, owner=owner, files={}, emit=lambda chunk: None, canceled=lambda: False)
print(res.err_code.value, flush=True)
"""


def controller(root: Path, cmd: str, owner: Owner) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", CONTROLLER, str(root), cmd, json.dumps(vars(owner)), CGROUPS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(argv, cwd="/", env=env, stdout=subprocess.PIPE, text=True)


def launcher_of(process: subprocess.Popen[str]) -> int:
    (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(pid)


def test_sigkill_of_the_controller_kills_the_tree_within_a_second(kit: Kit, root: Path) -> None:
    owner = kit.owner()
    with controller(root, f"(setsid sleep {MARK}4.1 &); trap '' TERM; sleep {MARK}4.2", owner) as other:
        eventually(lambda: running(f"{MARK}4.1") and running(f"{MARK}4.2"))
        other.kill()
        eventually(lambda: not running(f"{MARK}4.1") and not running(f"{MARK}4.2"), seconds=1)
    eventually(
        lambda: kit.provider.owned(STORE) == [], seconds=1
    )  # a dying init outlives what it ran by some milliseconds
    assert len(list((root / "state" / "boxes").iterdir())) == 1, "what is left is a directory"
    another(root).close()  # and the next start removes it, and its cgroup: see the fixture


def test_sigkill_of_controller_and_launcher_together(kit: Kit, root: Path) -> None:
    with controller(root, f"sleep {MARK}4.3", kit.owner()) as other:
        eventually(lambda: running(f"{MARK}4.3"))
        launcher = launcher_of(other)
        os.kill(launcher, signal.SIGSTOP)  # so that it cannot act on the controller's death
        other.kill()
        os.kill(launcher, signal.SIGKILL)
        eventually(lambda: not running(f"{MARK}4.3"), seconds=1)
    another(root).close()


def test_a_sandbox_of_another_live_controller_is_seen_and_killed(kit: Kit, root: Path) -> None:
    owner = kit.owner()
    with controller(root, f"sleep {MARK}4.4", owner) as other:
        eventually(lambda: running(f"{MARK}4.4"))
        another(root).close()  # a start beside it must not take it for a leftover
        assert running(f"{MARK}4.4")
        assert kit.provider.owned(STORE) == [owner]
        assert kit.provider.kill(owner) == 1
        assert running(f"{MARK}4.4") == []
        assert other.communicate(timeout=5)[0] == "LOST\n"
    assert kit.provider.owned(STORE) == []


def test_a_sandbox_that_outlived_its_controller_is_seen_and_killed(kit: Kit, root: Path) -> None:
    owner = kit.owner()
    with controller(root, f"sleep {MARK}4.5", owner) as other:
        eventually(lambda: running(f"{MARK}4.5"))
        launcher = launcher_of(other)
        os.kill(launcher, signal.SIGSTOP)  # the one way in which a jail can stay
        other.kill()
    try:
        assert kit.provider.owned(STORE) == [owner]
        assert kit.provider.kill(owner) == 1
        assert running(f"{MARK}4.5") == []
        assert (kit.provider.owned(STORE), kit.provider.kill(owner)) == ([], 0)
    finally:
        os.kill(launcher, signal.SIGKILL)
    another(root).close()


def test_a_pid_that_was_given_to_somebody_else_is_left_alone(kit: Kit, root: Path) -> None:
    owner = kit.owner()
    with controller(root, f"sleep {MARK}4.6", owner) as other:
        eventually(lambda: running(f"{MARK}4.6"))
        other.kill()
        eventually(lambda: not running(f"{MARK}4.6"), seconds=1)
    (box,) = (root / "state" / "boxes").iterdir()
    with subprocess.Popen(["sleep", "30"]) as stranger:
        (box / "jail.json").write_text(json.dumps({"pid": stranger.pid, "start": "an older time"}))
        assert kit.provider.kill(owner) == 0
        another(root).close()
        assert stranger.poll() is None
        found = processes.identify(stranger.pid)
        assert found is not None and processes.kill(found)
    assert not box.exists()


def test_a_killed_launcher_loses_its_tasks_and_is_replaced(kit: Kit) -> None:
    assert isinstance(kit.provider, LocalProvider)
    join = kit.begin(f"sleep {MARK}4.7")
    eventually(lambda: running(f"{MARK}4.7"))
    launcher = kit.provider._launcher._process
    assert launcher is not None
    launcher.kill()
    assert join().res.err_code is ErrCode.LOST
    assert running(f"{MARK}4.7") == []
    assert kit.run("echo again").res.stdout == "again\n"


def test_a_kill_between_two_jails_of_a_task_is_not_lost(root: Path) -> None:
    owner = Owner(store_id=STORE, run_id="r", task_key="k", attempt=1, fence=10**6)
    local = LocalProvider(
        state_root=root / "state",
        start_log=root / "starts",
        observe=lambda stage, _: assert_one(local.kill(owner)) if stage == "upload" else None,
    )
    kit = Kit(provider=local, start_log=root / "starts")
    assert kit.run("echo never", owner=owner).res.err_code is ErrCode.LOST
    assert not kit.start_log.exists()
    local.close()


def assert_one(count: int) -> None:
    assert count == 1


def test_a_killed_fence_starts_nothing_more(kit: Kit) -> None:
    """The kill comes while the archive is unpacked: the command must not be started after it."""
    owner = kit.owner()
    big = upload(("archive", archive({f"f{i}": b"x" * 100_000 for i in range(400)})))
    join = kit.begin("echo never", owner=owner, **big)
    eventually(lambda: kit.provider.owned(STORE))
    assert kit.provider.kill(owner) == 1
    assert join().res.err_code is ErrCode.LOST
    assert not kit.start_log.exists()


def test_more_tasks_than_uids_wait_for_their_turn(root: Path) -> None:
    local = LocalProvider(state_root=root / "state", uids=range(200_900, 200_902))
    kit = Kit(provider=local, start_log=root / "starts")
    joins = [kit.begin("sleep 0.2; echo done") for _ in range(5)]
    if ROOT:
        seen = [eventually(lambda: len(local.owned(STORE))) for _ in range(50)]
        assert max(seen) <= 2
    assert [join().res.stdout for join in joins] == ["done\n"] * 5
    local.close()


# --------------------------------------------------------------------------- templates


@pytest.mark.parametrize("interpreter", [None, Path(sys.executable)], ids=["system", "our own"])
def test_the_python_template_has_pytest(root: Path, interpreter: Path | None) -> None:
    template = templates.load(toolchain(python=interpreter))
    local = LocalProvider(state_root=root / "state", templates=[template])
    kit = Kit(provider=local, start_log=root / "starts", template="python")
    assert local.resolve("python").startswith("local:python@sha256:")
    parts = upload(("archive", archive({"test_it.py": b"def test_it():\n    assert 1 + 1 == 3\n"})))
    out = kit.run('pytest -q --junitxml="$SISU_OUTPUT_DIR/junit.xml" && python -m pytest --version', **parts)
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, 1), out.res.stdout + out.res.stderr
    assert [(a.name, a.kind) for a in out.artifacts] == [("junit.xml", "junit")]
    assert b'failures="1"' in out.artifacts[0].content
    local.close()


def test_a_manifest_that_is_missing_or_malformed_is_named(root: Path) -> None:
    with pytest.raises(Permanent, match=r"manifest\.json"):
        templates.load(root / "manifest.json")
    (root / "manifest.json").write_text('{"name": 1}')
    with pytest.raises(Permanent, match=r"manifest\.json"):
        templates.load(root / "manifest.json")
