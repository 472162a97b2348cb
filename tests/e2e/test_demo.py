"""`make demo` itself, in a terminal: it asks, it shows both test runs, it proves, it cleans up; also after Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUESTION = "Approve this plan as alice?"


class Terminal:
    """The demo on a pseudo-terminal of its own, in a temporary directory of its own."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.said = ""
        self._master, slave = pty.openpty()
        environ = {k: v for k, v in os.environ.items() if k not in ("YES", "DATABASE_URL", "CI")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "devcluster.demo"],
            cwd=root,
            env={**environ, "TMPDIR": str(scratch), "TERM": "dumb", "COLUMNS": "200"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, text: str | None, *, seconds: float) -> None:
        """Until it said this; None for its end."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.said:
            ready, _, _ = select.select([self._master], [], [], 0.2)
            try:
                piece = os.read(self._master, 65536).decode("utf-8", "replace") if ready else ""
            except OSError:  # the other side is closed: it has ended
                piece, text = "", text if text is not None else ""
                if text == "":
                    return
            self.said += piece
            assert time.monotonic() < deadline, f"did not say {text!r}:\n{self.said[-3000:]}"

    def answer(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def end(self) -> int:
        code = self.process.wait(30)
        os.close(self._master)
        return code


@pytest.fixture
def scratch() -> Path:
    """Sandboxes and PostgreSQL's user must be able to pass it, which pytest's own directories do not allow."""
    path = Path("/tmp") / f"sk-demo-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir(mode=0o755)
    return path


def left_behind(scratch: Path) -> list[str]:
    """Processes that mention this directory, and files in it."""
    found = [str(p) for p in scratch.iterdir()]
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                line = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if str(scratch) in line:
                found.append(line)
    return found


def test_the_demo_asks_executes_proves_and_cleans_up(repo_root: Path, scratch: Path) -> None:
    terminal = Terminal(repo_root, scratch)
    terminal.read_until(QUESTION, seconds=90)
    assert "1 failed, 7 passed" in terminal.said, "the tests as they are"
    assert "+    if len(ordered) % 2 == 1:" in terminal.said, "the diff"
    assert "sha256:" in terminal.said
    terminal.answer("y")
    terminal.read_until(None, seconds=60)
    assert terminal.end() == 0, terminal.said[-3000:]
    assert re.search(r"test\|.*8 passed", terminal.said), "the sandbox's output"
    assert re.search(r"fix-median +Succeeded +ExecuteST", terminal.said)
    assert "after: 8 tests, 0 failures" in terminal.said
    assert "test | 1 | 1 | 1" in terminal.said
    assert left_behind(scratch) == []
    scratch.rmdir()


def test_ctrl_c_leaves_nothing_behind(repo_root: Path, scratch: Path) -> None:
    terminal = Terminal(repo_root, scratch)
    terminal.read_until(QUESTION, seconds=90)
    time.sleep(0.5)  # CPython's input() misses a signal that comes between its prompt and its wait
    os.killpg(terminal.process.pid, signal.SIGINT)  # as a terminal does: everybody in the foreground gets it
    terminal.read_until(None, seconds=30)
    assert terminal.end() == 130, terminal.said[-2000:]
    assert "everything that was started is stopped" in terminal.said
    assert left_behind(scratch) == []
    scratch.rmdir()
