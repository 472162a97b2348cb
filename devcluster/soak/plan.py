"""What the Intents of a soak are to do, and what each task must come to. Deterministic: the same seed and task id, the same task."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.core.model import TurnReply, TurnRequest
from controller.oc import RecordingAgent
from controller.ports import never
from controller.workflows.compile import Bounds, Brief, compile_plan
from controller.workspace import GitWorkspace
from opencode.record import NoLedger

MIB = 1 << 20
LONGEST_MS = 250
REPORT = '<testsuite tests="3" failures="1"><testcase name="{id}"/></testsuite>'


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One task and its outcome: `files` are $SISU_OUTPUT_DIR's, `stdout` is None where it is not compared."""

    task_id: str
    kind: str
    command: str
    seconds: int = 60
    err_code: str = "NONE"
    exit: int | None = 0
    stdout: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    junit: Mapping[str, int] | None = None


Kind = Callable[[str, int], Planned]  # task id, a number that follows from seed and id


def number(seed: int, task_id: str) -> int:
    """The chance of a task: 32 bits."""
    return int(hashlib.sha256(f"{seed}/{task_id}".encode()).hexdigest()[:8], 16)


def waits(count: int, *, seed: int) -> list[Planned]:
    """Tasks of 0 to 250 ms for the mock provider."""
    ids = [f"wait-{n:04d}" for n in range(1, count + 1)]
    return [
        Planned(
            task_id=i,
            kind="wait",
            command=f"sleep {number(seed, i) % (LONGEST_MS + 1) / 1000:.3f} && echo {i}",
            stdout=f"{i}\n".encode(),
        )
        for i in ids
    ]


def mixed(count: int, *, seed: int) -> list[Planned]:
    """One of each kind after the other, in real sandboxes."""
    return _of_kinds((_quick, _red, _junit, _mib, _file, _sleep, _daemon, _stubborn), count, seed)


def lingering(count: int, *, seed: int) -> list[Planned]:
    """For the Intent that is canceled: tasks that take longer than people wait, and one that does not listen."""
    return _of_kinds((_quick, _sleep, _deaf, _lingering_daemon), count, seed)


def _of_kinds(kinds: Sequence[Kind], count: int, seed: int) -> list[Planned]:
    ids = [f"task-{n:04d}" for n in range(1, count + 1)]
    return [kinds[n % len(kinds)](i, number(seed, i)) for n, i in enumerate(ids)]


def _quick(task_id: str, _: int) -> Planned:
    return Planned(task_id=task_id, kind="quick", command=f"echo {task_id}", stdout=f"{task_id}\n".encode())


def _red(task_id: str, _: int) -> Planned:
    return Planned(
        task_id=task_id, kind="red", command="echo broken >&2; exit 3", err_code="CMD_NONZERO", exit=3, stdout=b""
    )


def _junit(task_id: str, _: int) -> Planned:
    report = REPORT.format(id=task_id)
    return Planned(
        task_id=task_id,
        kind="junit",
        command=f"""printf '%s' '{report}' > "$SISU_OUTPUT_DIR/junit.xml\"""",
        stdout=b"",
        files={"junit.xml": report.encode()},
        junit={"tests": 3, "failures": 1},
    )


def _mib(task_id: str, _: int) -> Planned:
    line = f"{task_id}\n".encode()
    whole = (line * (MIB // len(line) + 1))[:MIB]
    return Planned(task_id=task_id, kind="1 MiB", command=f"yes {task_id} | head -c {MIB}", stdout=whole)


def _file(task_id: str, chance: int) -> Planned:
    text = f"{task_id} {chance}"
    return Planned(
        task_id=task_id,
        kind="file",
        command=f"""mkdir "$SISU_OUTPUT_DIR/sub" && printf '%s' '{text}' > "$SISU_OUTPUT_DIR/sub/result.txt\"""",
        stdout=b"",
        files={"sub/result.txt": text.encode()},
    )


def _sleep(task_id: str, chance: int) -> Planned:
    return Planned(
        task_id=task_id, kind="sleep", command=f"sleep {1 + chance % 2001 / 1000:.3f} && echo slept", stdout=b"slept\n"
    )


def _daemon(task_id: str, _: int) -> Planned:
    left = "setsid sleep 600 > /dev/null 2>&1 < /dev/null &"
    return Planned(task_id=task_id, kind="daemon", command=f"{left} echo left", stdout=b"left\n")


def _stubborn(task_id: str, _: int) -> Planned:
    """Its child ignores SIGTERM as well: what is ignored stays ignored over exec. What it prints by then, a busy machine decides."""
    return Planned(
        task_id=task_id,
        kind="stubborn",
        command="trap '' TERM; echo deaf; sleep 600",
        seconds=2,
        err_code="TIMEOUT",
        exit=None,
    )


def _deaf(task_id: str, _: int) -> Planned:
    return Planned(
        task_id=task_id, kind="deaf", command="trap '' TERM; echo deaf; sleep 30 && echo over", stdout=b"deaf\nover\n"
    )


def _lingering_daemon(task_id: str, _: int) -> Planned:
    left = "setsid sleep 600 > /dev/null 2>&1 < /dev/null &"
    return Planned(task_id=task_id, kind="daemon", command=f"{left} sleep 10; echo left", stdout=b"left\n")


@dataclass(frozen=True, kw_only=True)
class _Says:
    """An AgentServer that gives one plan."""

    plan: Mapping[str, Any]
    mode: str = "record"

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        answer = {"kind": "plan", "plan": self.plan}
        return TurnReply(
            session=request.session,
            structured=answer,
            raw_text="",
            tool_calls=(),
            tokens_in=0,
            tokens_out=0,
            timings={},
        )

    def end_session(self, session: str) -> None:
        """Nothing is kept."""


def record(directory: Path, goal: str, tasks: Sequence[Planned]) -> None:
    """A fixture for OC_MODE=replay (OC_FIXTURES=directory): whoever asks for this goal without a repository gets these tasks."""
    plan = {
        "goal": goal,
        "summary": f"{len(tasks)} tasks of a soak.",
        **{name: [] for name in ("design", "files", "risks", "edits", "tests")},
        "tasks": [
            {"id": t.task_id, "title": f"{t.kind} {t.task_id}", "command": t.command, "timeoutSeconds": t.seconds}
            for t in tasks
        ],
    }
    with tempfile.TemporaryDirectory(prefix="sisu-kodo-plan-") as scratch:
        workspace = GitWorkspace(Path(scratch))
        compile_plan(
            Brief(
                goal=goal,
                inputs={},
                constraints={},
                source=None,
                commit=workspace.resolve(None),
                max_tasks=len(tasks),
            ),
            agent=RecordingAgent(_Says(plan=plan), directory=directory, opencode="none", model="soak"),
            workspace=workspace,
            ledger=NoLedger(),
            session="soak",
            bounds=Bounds(max_tokens=10**9),
        )
