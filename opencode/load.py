"""How much one OpenCode daemon takes: many intents compile at once, with the scripted model, and a table is printed.

`python -m opencode.load` measures the daemon and our own side of it, never a model. Each compilation is two turns (a need, a plan).
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from controller.core.model import GitSource
from controller.oc import Daemon, LiveAgent
from controller.workflows.compile import Brief, compile_plan
from controller.workspace import GitWorkspace
from opencode.install import CONFIG, VERSION, InstallError, ensure
from opencode.record import BOUNDS, NoLedger, repositories
from opencode.scenarios import load
from opencode.scripted_model import ScriptedModel

GOAL = "median() is wrong for an even number of values"


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Compiles the same intent as often as it is asked to."""

    agent: LiveAgent
    workspace: GitWorkspace
    source: GitSource

    def seconds(self, session: str) -> float:
        """How long one compilation took."""
        began = time.monotonic()
        commit = self.workspace.resolve(self.source)
        brief = Brief(goal=GOAL, inputs={}, constraints={}, source=self.source, commit=commit, max_tasks=100)
        compile_plan(
            brief, agent=self.agent, workspace=self.workspace, ledger=NoLedger(), session=session, bounds=BOUNDS
        )
        return time.monotonic() - began

    def at_once(self, count: int) -> tuple[float, list[float]]:
        """Seconds for all of them, and for each."""
        took: list[float] = []
        threads = [threading.Thread(target=lambda n=n: took.append(self.seconds(f"load-{n}"))) for n in range(count)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(took) != count:
            raise SystemExit(f"error: {count - len(took)} of {count} compilations failed; no figure is printed")
        return time.monotonic() - began, sorted(took)


def main(
    intents: Annotated[int, typer.Option(help="how many compile at once", min=1)] = 20,
    rounds: Annotated[int, typer.Option(help="how often", min=1)] = 5,
    turns: Annotated[int, typer.Option(help="turns at once on the daemon (OC_CONCURRENCY)", min=1)] = 8,
) -> None:
    """Compile INTENTS at once, ROUNDS times, on one daemon."""
    try:
        binary = ensure()
    except InstallError as e:
        raise SystemExit(f"error: {e}") from None
    table = Table("round", "seconds", "intents/s", "p50 ms", "p95 ms", "daemon MiB", title=f"{intents} intents at once")
    with tempfile.TemporaryDirectory(prefix="sisu-load-") as scratch:
        root = Path(scratch)
        (root / "repos").mkdir()
        with (
            repositories(root / "repos") as server,
            ScriptedModel(load()) as model,
            Daemon(binary, root=root / "d", config=CONFIG, version=VERSION, environ=model.environ()) as daemon,
        ):
            agent = LiveAgent(daemon.base_url, password=daemon.password, version=VERSION, concurrency=turns)
            workspace = GitWorkspace(root / "git", allow_loopback_http=True)
            source = GitSource(url=server.url("fix-median.git"), ref="main")
            compiler = Compiler(agent=agent, workspace=workspace, source=source)
            table.add_row("first", f"{compiler.seconds('first'):.2f}", "", "", "", _memory(daemon))
            for number in range(rounds):
                wall, took = compiler.at_once(intents)
                p95 = took[min(len(took) - 1, round(0.95 * len(took)))]
                row = (f"{wall:.2f}", f"{intents / wall:.1f}", _ms(statistics.median(took)), _ms(p95), _memory(daemon))
                table.add_row(str(number + 1), *row)
            agent.close()
    Console().print(table)


def _memory(daemon: Daemon) -> str:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return f"{kilobytes / 1024:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


if __name__ == "__main__":
    typer.run(main)
