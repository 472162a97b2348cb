"""Records the fixtures of OC_MODE=replay: real turns of the real daemon, whose model is scripted, for every scenario.

`python -m opencode.record` does what CompileST and ApplyPatchST do, and replaces fixtures/. The same scenarios, prompts and
schema give the same file names again; run it after changing any of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from controller.core.contract import PlanOutput
from controller.core.errors import InvalidPlan
from controller.core.model import GitSource, Recorded, TurnReply, TurnRequest
from controller.core.prompt import tasks_feedback
from controller.oc import Daemon, LiveAgent, RecordingAgent
from controller.ports import AgentServer
from controller.workflows.compile import Bounds, Brief, compile_plan, repair_plan
from controller.workspace import GitWorkspace
from devcluster.gitserver import GitServer
from opencode.install import CONFIG, VERSION, InstallError, ensure
from opencode.scenarios import FIXTURES, FOLDER, Scenario, load
from opencode.scripted_model import MODEL, ScriptedModel

EXAMPLES = Path(__file__).parent.parent / "examples"
BOUNDS = Bounds(max_tokens=10_000_000)
MAX_TASKS = 10_000


class NoLedger:
    """A ledger that knows nothing: every turn is really asked."""

    def look(self, request: TurnRequest) -> Recorded:
        """Nothing is known."""
        return Recorded(reply=None, error=None, spent=0)

    def put(self, request: TurnRequest, reply: TurnReply) -> None:
        """Nothing is kept."""

    def failed(self, request: TurnRequest, error: Exception) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Compiles scenarios; the agent keeps the turns."""

    agent: AgentServer
    workspace: GitWorkspace
    server: GitServer

    def compile(self, scenario: Scenario, *, former: PlanOutput | None) -> PlanOutput:
        """The scenario's plan, repaired once if its edits do not apply."""
        feedback = None
        if scenario.feedback is not None and former is not None:
            failures = [(task, code) for task, code in scenario.feedback["failures"].items()]
            feedback = tasks_feedback(summary=former.summary, failures=failures)
        source = (
            None
            if scenario.repository is None
            else GitSource(url=self.server.url(f"{scenario.repository}.git"), ref="main")
        )
        brief = Brief(
            goal=scenario.goal,
            inputs={},
            constraints={},
            source=source,
            commit=self.workspace.resolve(source),
            max_tasks=MAX_TASKS,
            feedback=feedback,
        )
        plan = self._plan(brief, scenario.name)
        try:
            self.workspace.diff(source, brief.commit, plan.edits)
        except InvalidPlan as e:
            plan = self._repaired(brief, scenario.name, plan, str(e))
            self.workspace.diff(source, brief.commit, plan.edits)
        return plan

    def _plan(self, brief: Brief, name: str) -> PlanOutput:
        return compile_plan(
            brief, agent=self.agent, workspace=self.workspace, ledger=NoLedger(), session=name, bounds=BOUNDS
        ).plan

    def _repaired(self, brief: Brief, name: str, failed: PlanOutput, error: str) -> PlanOutput:
        return repair_plan(
            brief,
            failed=failed,
            error=error,
            agent=self.agent,
            workspace=self.workspace,
            ledger=NoLedger(),
            session=f"{name}-repair",
            bounds=BOUNDS,
        ).plan


@contextlib.contextmanager
def repositories(root: Path) -> Iterator[GitServer]:
    """The example repositories, served on loopback."""
    for script in sorted(EXAMPLES.glob("*/make_repo.py")):
        spec = importlib.util.spec_from_file_location("make_repo", script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.make(root / f"{script.parent.name}.git")
    with GitServer(root) as server:
        yield server


def main(
    scenarios: Annotated[Path, typer.Option(help="folder of scenarios")] = FOLDER,
    fixtures: Annotated[Path, typer.Option(help="folder to replace")] = FIXTURES,
) -> None:
    """Record every scenario with the real daemon and the scripted model."""
    try:
        binary = ensure()
    except InstallError as e:
        raise SystemExit(f"error: {e}") from None
    found = load(scenarios)
    with tempfile.TemporaryDirectory(prefix="sisu-record-") as scratch, contextlib.ExitStack() as stack:
        root = Path(scratch)
        (root / "repos").mkdir()
        server = stack.enter_context(repositories(root / "repos"))
        model = stack.enter_context(ScriptedModel(found))
        daemon = Daemon(binary, root=root / "daemon", config=CONFIG, version=VERSION, environ=model.environ())
        stack.enter_context(daemon)
        live = LiveAgent(daemon.base_url, password=daemon.password, version=VERSION)
        stack.callback(live.close)
        agent = RecordingAgent(live, directory=root / "new", opencode=VERSION, model=MODEL)
        recorder = Recorder(agent=agent, workspace=GitWorkspace(root / "git", allow_loopback_http=True), server=server)
        record(recorder, found)
        replace(fixtures, root / "new")


def record(recorder: Recorder, scenarios: tuple[Scenario, ...]) -> None:
    """Every scenario that starts a session; those with `feedback` after the one they follow."""
    plans: dict[str, PlanOutput] = {}
    starting = [s for s in scenarios if s.after is None or s.feedback is not None]
    for scenario in sorted(starting, key=lambda s: s.feedback is not None):
        former = plans[scenario.feedback["of"]] if scenario.feedback is not None else None
        plans[scenario.name] = recorder.compile(scenario, former=former)
        typer.echo(f"{scenario.name}: {len(plans[scenario.name].tasks)} tasks")


def replace(fixtures: Path, new: Path) -> None:
    """Put the new recordings in the old ones' place, and say what changed."""
    before = {path.name: path.read_bytes() for path in fixtures.glob("*.json")}
    after = {path.name: path.read_bytes() for path in new.glob("*.json")}
    fixtures.mkdir(parents=True, exist_ok=True)
    for name in before.keys() - after.keys():
        (fixtures / name).unlink()
    for name in after:
        shutil.copyfile(new / name, fixtures / name)
    same = sum(before.get(name) == data for name, data in after.items())
    typer.echo(f"{len(after)} turns in {fixtures}: {same} as before, {len(before.keys() - after.keys())} removed")


if __name__ == "__main__":
    typer.run(main)
