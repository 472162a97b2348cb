"""Tasks that mean harm, the same ones for every real sandbox: each hurts nobody and gets the right errCode.

What only one provider can show (uids on the host, Pods that cannot be) is in test_sandbox_<provider>.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.core.contract import ErrCode, Limits
from tests.support.sandbox_kit import (
    OUTPUT_LIMIT,
    REAL,
    STORE,
    Kit,
    real_kit,
)

ROOT = os.geteuid() == 0
SMALL = Limits(cpu_millis=400, memory_mb=64, disk_mb=32)
# Said with the outcome, wherever the kernel's own count of the sandbox can be read; E2B shows none.
OUT_OF_MEMORY = {"local": ErrCode.OOM if ROOT else ErrCode.CMD_NONZERO, "e2b": ErrCode.CMD_NONZERO}


@pytest.fixture(params=REAL)
def kit(request: pytest.FixtureRequest, root: Path) -> Iterator[Kit]:
    """A sandbox provider. After each test an ordinary task still runs, and nothing of the others is there."""
    with real_kit(request.param, root, request) as found:
        yield found
        harmless(found)


def harmless(kit: Kit) -> None:
    out = kit.run("ls /workspace /output; echo fine")
    assert (out.res.err_code, out.res.stdout.split()[-1]) == (ErrCode.NONE, "fine"), out.res.stderr
    assert list(kit.provider.owned(STORE)) == []


def test_a_fork_bomb(kit: Kit) -> None:
    bomb = kit.run(
        "f() { f | f & }; f; sleep 20", limits=Limits(cpu_millis=400, memory_mb=128, pids=40), timeout_ms=3_000
    )
    assert bomb.res.err_code in (ErrCode.TIMEOUT, ErrCode.CMD_NONZERO)
    assert bomb.seconds < 30


@pytest.mark.parametrize("cmd", ["tail /dev/zero; sleep 0; exit 9", "tail /dev/zero"])
def test_a_memory_hog(kit: Kit, cmd: str) -> None:
    out = kit.run(cmd, limits=SMALL)
    code = OUT_OF_MEMORY.get(kit.provider.name, ErrCode.OOM)
    assert (out.res.err_code, out.res.exit == 9) == (code, "exit 9" in cmd)
    assert ("out of memory: more than 64 MiB" in out.res.stderr) is (code is ErrCode.OOM)


def test_words_and_codes_do_not_make_an_oom_or_a_timeout(kit: Kit) -> None:
    for status in (137, 124, 143):
        out = kit.run(f"echo 'Out of memory: Killed process 7; timed out' >&2; exit {status}")
        assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, status)


def test_endless_output(kit: Kit) -> None:
    out = kit.run("yes; echo never", timeout_ms=1_500)
    assert out.res.err_code is ErrCode.TIMEOUT
    assert len(out.text("stdout")) < OUTPUT_LIMIT + 200
    assert "never" not in out.text("stdout") and "cut" in out.text("stdout")


def test_links_out_of_the_workspace(kit: Kit) -> None:
    cmd = "ln -s /etc/passwd /output/a; ln -s / /output/d; mkfifo /output/p; ln -s /etc out; echo real > '/output/-r x'"
    out = kit.run(cmd)
    assert out.res.err_code is ErrCode.NONE
    assert [(a.name, a.content) for a in out.artifacts] == [("-r x", b"real\n")]
    assert out.res.stderr.count("not a regular file") == 3


def test_the_controllers_environment(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://s3cr3t-of-ours")
    out = kit.run("env; cat /proc/*/environ /proc/1/environ | tr '\\0' '\\n'; ls /var/run/secrets; true")
    assert out.res.err_code is ErrCode.NONE and "PATH=" in out.res.stdout
    for ours in ("s3cr3t", "DATABASE_URL", "E2B_API_KEY", "SISUKODO", "PYTEST"):
        assert ours not in out.res.stdout


def test_loopback_and_metadata(kit: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        ours = f"127.0.0.1/{server.getsockname()[1]}"
        connect = "(timeout 2 bash -c 'exec 3<>/dev/tcp/{0}' && echo reached {0})"
        subprocess.run(["/bin/bash", "-c", connect.format(ours)], check=True, capture_output=True)
        server.accept()[0].close()  # so the same line would have reached it
        places = (ours, "127.0.0.1/22", "169.254.169.254/80", "10.0.0.1/443", "1.1.1.1/443")
        out = kit.run("; ".join(map(connect.format, places)) + "; getent hosts metadata.google.internal; true")
        assert (out.res.stdout, out.res.err_code) == ("", ErrCode.NONE)
        assert out.seconds < 20, "without names to ask for, resolvers must not wait"
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_file_of_10_gb(kit: Kit) -> None:
    out = kit.run("head -c 10G /dev/zero > big; wc -c < big; exit 1", limits=SMALL)
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.CMD_NONZERO, 1, f"{32 << 20}\n")


def test_ignoring_sigterm(kit: Kit) -> None:
    polite = kit.run("trap 'echo bye; exit 0' TERM; echo x > /output/x; sleep 30 & wait", timeout_ms=700)
    assert (polite.res.err_code, polite.res.exit) == (ErrCode.TIMEOUT, None)
    assert polite.res.stdout == ("" if kit.provider.name == "e2b" else "bye\n"), "E2B ends a command by SIGKILL only"
    assert [a.name for a in polite.artifacts] == ["x"], "what it had made by then"
    stubborn = kit.run("trap '' TERM; while :; do sleep 0.05; done", timeout_ms=700)
    assert (stubborn.res.err_code, stubborn.res.exit) == (ErrCode.TIMEOUT, None)
    assert stubborn.seconds < 15


def test_daemons(kit: Kit) -> None:
    """They end with their task, or the next look at the outputs would find what they wrote."""
    stay = 'trap "" TERM HUP; sleep 1; echo late > /output/late; sleep 600'
    out = kit.run(f"(setsid sh -c '{stay}' > /dev/null 2>&1 &); (sleep 600 &); sleep 0.1; echo started")
    assert (out.res.err_code, out.res.stdout, out.artifacts) == (ErrCode.NONE, "started\n", [])
    assert out.seconds < 15, "the background process that holds stdout is not waited for"
