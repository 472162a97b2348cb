"""`python -m controller oc-daemon` with the real daemon and a scripted model: killed, stopped, too big, of another version, orphaned.

Each test's supervisor is a process of its own; `tests/support/oc_daemon_main.py` is the same program with other bounds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from controller.oc.daemon import free_port
from controller.oc.upkeep import Bounds
from opencode.install import CONFIG, VERSION, InstallError, ensure
from opencode.scenarios import Answer, Scenario, load
from opencode.scripted_model import ScriptedModel

pytestmark = pytest.mark.timeout(240)  # the daemon's start on a busy machine
PASSWORD, KEY, HOSTILE = "the-password-of-it", "the-key-of-it", "do-not-inherit"
ROOT = Path(__file__).parents[2]
SLOW = Scenario(
    name="slow", goal="slow", repository=None, after=None, feedback=None, turns=(Answer(text="done", silent=4.0),)
)


@pytest.fixture(scope="module")
def binary() -> Path:
    """The pinned daemon."""
    try:
        return ensure()
    except InstallError as e:
        pytest.skip(f"the real OpenCode daemon is NOT supervised: {e}")


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel((*load(), SLOW)) as running:
        yield running


@dataclass
class Kept:
    """A supervisor process and how to look at its daemon."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def events(self, event: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def wait(self, what: Callable[[], object], text: str, *, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{text}:\n{self.log.read_text()}"
            time.sleep(0.05)

    def started(self, times: int = 1) -> int:
        """Wait for the daemon's nth healthy start; its process id."""
        self.wait(lambda: len(self.events("opencode started")) >= times, f"no start number {times}")
        return int(str(self.events("opencode started")[times - 1]["pid"]))

    def ask(self, method: str, path: str, seconds: float = 5.0, **body: object) -> object:
        url = f"http://127.0.0.1:{self.port}{path}"
        answer = httpx.request(
            method, url, auth=("opencode", PASSWORD), timeout=seconds, trust_env=False, json=body or None
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def reasons(self) -> list[object]:
        return [one["reason"] for one in self.events("opencode restarting")]


@contextmanager
def kept(
    tmp_path: Path,
    binary: Path,
    model: ScriptedModel,
    *,
    config: Path = CONFIG,
    memory_mb: int = 1536,
    bounds: Mapping[str, float] | None = None,
) -> Iterator[Kept]:
    """A running supervisor; no process of it is left afterwards, or the test fails."""
    log, port = tmp_path / "supervisor.log", free_port()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOSTILE": HOSTILE,
        "OPENAI_API_KEY": HOSTILE,
        "OPENCODE_CONFIG_CONTENT": json.dumps({"model": HOSTILE}),
        "NODE_OPTIONS": f"--title={HOSTILE}",
        "OC_BINARY": str(binary),
        "OC_CONFIG": str(config),
        "OC_STATE": str(tmp_path / "state"),
        "OC_SERVER_PORT": str(port),
        "OC_MEMORY_MB": str(memory_mb),
        "OPENCODE_SERVER_PASSWORD": PASSWORD,
        "LOG_FORMAT": "json",
        **model.environ(),
        "OC_MODEL_API_KEY": KEY,
        "OC_TEST_BOUNDS": json.dumps({**(bounds or {}), "memory_mb": memory_mb}),
    }
    program = "tests.support.oc_daemon_main" if bounds else "controller"
    with log.open("wb") as out:
        command = [sys.executable, "-m", program, *([] if bounds else ["oc-daemon"])]
        process = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    one = Kept(process, log, port)
    try:
        yield one
    finally:
        process.terminate()
        process.wait(10)
        left = [int(str(event["pid"])) for event in one.events("opencode started") if alive(int(str(event["pid"])))]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        said = log.read_text()
    assert left == [], "a daemon outlived its supervisor"
    assert not [secret for secret in (PASSWORD, KEY, HOSTILE) if secret in said], said


def alive(pid: int) -> bool:
    """It is there and more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def test_a_killed_daemon_is_replaced_and_both_end_within_six_seconds(
    tmp_path: Path, binary: Path, model: ScriptedModel
) -> None:
    assert Bounds().replaced < 30
    with kept(tmp_path, binary, model) as one:
        first = one.started()
        for folder in (f"/proc/{first}/cmdline", f"/proc/{one.process.pid}/cmdline"):
            said = Path(folder).read_text()
            assert PASSWORD not in said and KEY not in said
        session = one.ask("POST", "/session", title="kept")
        assert isinstance(session, dict) and (tmp_path / "state" / "healthy").exists()
        os.kill(first, signal.SIGKILL)
        second = one.started(2)
        assert second != first and one.reasons() == ["crashed"]
        assert one.ask("GET", "/session/status") == {}
        assert one.ask("GET", "/session") == [], "a new home: what it knew, our ledger knows"

        began = time.monotonic()
        one.process.terminate()
        assert one.process.wait(10) == 0
        assert time.monotonic() - began < 6 and not alive(second)
        assert one.events("opencode stopped")[0]["exit_code"] in (0, -signal.SIGTERM), "asked, not killed"
        assert not (tmp_path / "state" / "healthy").exists()


def test_a_stopped_daemon_is_noticed_and_replaced(tmp_path: Path, binary: Path, model: ScriptedModel) -> None:
    bounds = {"wedged": 2.0, "probe": 0.7, "pause": 0.1, "stop": 1.0}
    with kept(tmp_path, binary, model, bounds=bounds) as one:
        first = one.started()
        began = time.monotonic()
        os.kill(first, signal.SIGSTOP)
        one.wait(lambda: not alive(first), "the stopped daemon is still there", seconds=15)
        assert time.monotonic() - began < Bounds(**bounds).replaced + 3  # type: ignore[arg-type]
        assert one.reasons() == ["wedged"] and len(one.events("opencode unhealthy")) >= 1
        assert one.started(2) != first
        assert one.ask("GET", "/session/status") == {}


def test_a_daemon_that_is_too_big_is_replaced_after_its_turn_and_not_in_it(
    tmp_path: Path, binary: Path, model: ScriptedModel
) -> None:
    # Started it has 310 MB, with its first turn 600.
    with kept(tmp_path, binary, model, memory_mb=450, bounds={"pause": 0.1}) as one:
        first = one.started()
        session = one.ask("POST", "/session", title="heavy", agent="compile")
        assert isinstance(session, dict)
        answers: list[object] = []
        parts = [{"type": "text", "text": '{"goal":"slow"}'}]
        path = f"/session/{session['id']}/message"
        turn = threading.Thread(
            target=lambda: answers.append(one.ask("POST", path, 60.0, agent="compile", parts=parts))
        )
        turn.start()
        one.wait(lambda: one.events("opencode over its memory limit"), "it never got big")
        while turn.is_alive():
            assert answers or one.reasons() == [], "restarted in a turn"
            turn.join(0.1)
        assert answers, "the turn was cut off"
        one.started(2)
        assert one.reasons()[0] == "memory" and not alive(first)


def test_another_version_ends_it_with_one_line(tmp_path: Path, binary: Path, model: ScriptedModel) -> None:
    (tmp_path / "opencode.json").write_bytes(CONFIG.read_bytes())
    (tmp_path / "opencode.version").write_text("1.2.3\n")
    with kept(tmp_path, binary, model, config=tmp_path / "opencode.json") as one:
        assert one.process.wait(90) == 1
        (refused,) = one.events("opencode refused")
        assert refused["error"] == f"OC_BINARY is OpenCode {VERSION}, but 1.2.3 is pinned"
        assert len(one.events("opencode starting")) == 1 and one.reasons() == []
        assert "Traceback" not in one.log.read_text()


def test_what_cannot_be_executed_ends_it_with_one_line(tmp_path: Path, model: ScriptedModel) -> None:
    (tmp_path / "no-program").write_text("not a program")
    with kept(tmp_path, tmp_path / "no-program", model) as one:
        assert one.process.wait(30) == 1
        assert "cannot be started" in str(one.events("opencode refused")[0]["error"])


def test_a_state_folder_that_cannot_be_written_ends_it_with_one_line(
    tmp_path: Path, binary: Path, model: ScriptedModel
) -> None:
    (tmp_path / "state").write_text("a file")
    with kept(tmp_path, binary, model) as one:
        assert one.process.wait(30) == 1
        assert str(tmp_path / "state") in str(one.events("opencode refused")[0]["error"])
        assert "Traceback" not in one.log.read_text()


def test_it_inherits_nothing_and_ends_with_a_killed_supervisor(
    tmp_path: Path, binary: Path, model: ScriptedModel
) -> None:
    with kept(tmp_path, binary, model) as one:
        pid = one.started()
        environ = dict(
            line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line
        )
        assert HOSTILE not in json.dumps(environ) and "PYTHONPATH" not in environ
        assert environ["OC_MODEL_API_KEY"] == KEY and environ["OPENCODE_DISABLE_PROJECT_CONFIG"] == "1"
        allowed = (
            "OC_MODEL",
            "OC_STALL_MS",
            "NO_PROXY",
            "OPENCODE_",
            "XDG_",
            "npm_config_",
            "HOME",
            "TMPDIR",
            "PATH",
            "LANG",
        )
        assert [name for name in environ if not name.startswith(allowed)] == []

        one.process.kill()
        one.process.wait(5)
        one.wait(lambda: not alive(pid), "the daemon outlived its supervisor", seconds=5)
