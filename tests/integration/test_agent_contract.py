"""One contract for AgentServer, kept by the recordings in the checkout and by the real daemon (whose model is scripted).

What only a daemon can do wrong (prose, errors, silence) is tested on the daemon alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.core import prompt as prompts
from controller.core.errors import FixtureMissing, Permanent, Unavailable
from controller.core.model import GitSource, TurnRequest
from controller.oc import Daemon, LiveAgent, RecordingAgent, ReplayAgent, fixture
from controller.ports import AgentServer
from controller.workflows.compile import SCHEMA, Bounds, Brief, compile_plan, validate
from controller.workspace import GitWorkspace
from opencode.install import CONFIG, VERSION, ensure
from opencode.record import repositories
from opencode.scenarios import FIXTURES, Answer, Scenario, load
from opencode.scripted_model import MODEL, ScriptedModel
from tests.support.scripted_agent import MemoryLedger

pytestmark = pytest.mark.timeout(300)  # the daemon's start on a busy machine
BOUNDS = Bounds(max_tokens=1_000_000)


def only(name: str, *turns: Answer) -> Scenario:
    return Scenario(name=name, goal=name, repository=None, after=None, feedback=None, turns=turns)


HELLO = next(s.turns[0] for s in load() if s.name == "hello")
EXTRA = (
    only("prose first", Answer(text="Here is my plan."), HELLO),
    only("wrong shape first", Answer(structured={"kind": "plan", "plan": {"summary": 7}}), HELLO),
    only("not allowed", Answer(status=401)),
)


@pytest.fixture(scope="module")
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel((*load(), *EXTRA)) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, model: ScriptedModel, opencode_binary: Path) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("daemon")
    with Daemon(opencode_binary, root=root, config=CONFIG, version=VERSION, environ=model.environ()) as running:
        yield running


@contextlib.contextmanager
def alive(daemon: Daemon, **settings: Any) -> Iterator[LiveAgent]:
    """An agent on this daemon, closed afterwards."""
    opened = LiveAgent(daemon.base_url, **{"password": daemon.password, "version": VERSION, **settings})
    yield opened
    opened.close()


@pytest.fixture(params=["replay", "live"])
def agent(request: pytest.FixtureRequest) -> AgentServer:
    if request.param == "replay":
        return ReplayAgent(FIXTURES)
    found: AgentServer = request.getfixturevalue("live")
    return found


@pytest.fixture(scope="module")
def live(daemon: Daemon) -> Iterator[LiveAgent]:
    with alive(daemon) as opened:
        yield opened


@pytest.fixture(scope="module")
def median(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GitWorkspace, GitSource]]:
    repos = tmp_path_factory.mktemp("repos")
    with repositories(repos) as server:
        workspace = GitWorkspace(tmp_path_factory.mktemp("cache"), allow_loopback_http=True)
        yield workspace, GitSource(url=server.url("fix-median.git"), ref="main")


def opening(goal: str, *, session: str = "s") -> TurnRequest:
    text = prompts.first_prompt(goal=goal, inputs={}, constraints={}, repository_map=None)
    commit = "a83f112aa618510c0267017ef852e988a14da8f8"
    return TurnRequest(session=session, agent=prompts.AGENT, schema=SCHEMA, prompt=text, commit=commit)


def brief(goal: str, workspace: GitWorkspace, source: GitSource | None) -> Brief:
    commit = workspace.resolve(source)
    return Brief(goal=goal, inputs={}, constraints={}, source=source, commit=commit, max_tasks=1000)


# ------------------------------------------------------------------ the contract


def test_a_turn_is_answered_with_everything_the_ledger_keeps(agent: AgentServer) -> None:
    reply = agent.turn(opening("say hello"))
    turn = validate(reply.structured, max_tasks=10)
    assert turn.plan is not None and turn.plan.tasks[0].command == "echo hello"
    assert reply.session and reply.tokens_in > 0 and reply.tokens_out > 0 and reply.timings["total"] >= 0
    assert reply.tool_calls == ({"tool": "StructuredOutput", "status": "completed"},)
    json.dumps([reply.structured, reply.tool_calls, dict(reply.timings)])
    agent.end_session("s")


def test_the_same_turn_gives_the_same_answer(agent: AgentServer) -> None:
    one, other = agent.turn(opening("say hello", session="a")), agent.turn(opening("say hello", session="b"))
    assert (one.structured, one.tokens_in, one.tokens_out) == (other.structured, other.tokens_in, other.tokens_out)
    agent.end_session("a")
    agent.end_session("b")


def test_a_goal_that_nobody_scripted_is_permanent(agent: AgentServer) -> None:
    with pytest.raises(Permanent):
        agent.turn(opening("do something new"))


def test_ending_sessions_is_always_fine(agent: AgentServer) -> None:
    agent.end_session("never seen")
    agent.turn(opening("say hello"))
    agent.end_session("s")
    agent.end_session("s")


def test_a_thousand_tasks_come_back_whole(agent: AgentServer) -> None:
    turn = validate(agent.turn(opening("run 1000 small checks")).structured, max_tasks=1000)
    assert turn.plan is not None and turn.plan.tasks[-1].id == "check-1000"
    agent.end_session("s")


def test_a_repository_is_read_in_rounds_and_the_edit_applies(
    agent: AgentServer, median: tuple[GitWorkspace, GitSource]
) -> None:
    workspace, source = median
    one = brief("median() is wrong for an even number of values", workspace, source)
    done = compile_plan(one, agent=agent, workspace=workspace, ledger=MemoryLedger(), session="m", bounds=BOUNDS)
    assert done.turns == 2 and [task.id for task in done.plan.tasks] == ["test", "compile", "example"]
    assert workspace.diff(source, one.commit, done.plan.edits).files == ("src/tally/stats.py",)


def test_a_session_goes_on_in_another_process(agent: AgentServer, median: tuple[GitWorkspace, GitSource]) -> None:
    """The first turn is in the ledger, and an agent that has never seen the session is asked the second one."""
    workspace, source = median
    one = brief("median() is wrong for an even number of values", workspace, source)
    ledger = MemoryLedger()
    replay = ReplayAgent(FIXTURES)
    compile_plan(one, agent=replay, workspace=workspace, ledger=ledger, session="m", bounds=BOUNDS)
    ledger.replies.popitem()
    done = compile_plan(one, agent=agent, workspace=workspace, ledger=ledger, session="m", bounds=BOUNDS)
    assert done.turns == 2 and done.plan.edits


# ------------------------------------------------------------------ recordings


def test_a_missing_recording_says_key_folder_and_command(tmp_path: Path) -> None:
    request = opening("say hello")
    with pytest.raises(FixtureMissing) as error:
        ReplayAgent(tmp_path).turn(request)
    for part in (fixture.key(request), str(tmp_path), fixture.RECORD_COMMAND):
        assert part in str(error.value)


def test_every_part_of_the_request_but_the_session_is_in_the_key() -> None:
    request = opening("say hello")
    assert fixture.key(request) == fixture.key(replace(request, session="other"))
    changed = [
        replace(request, agent="x"),
        replace(request, schema={}),
        replace(request, prompt="x"),
        replace(request, commit="x"),
        replace(request, history=("x",)),
    ]
    assert len({fixture.key(one) for one in (request, *changed)}) == 6


def test_a_recording_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    request, other = opening("say hello"), opening("wait a while")
    shutil.copyfile(FIXTURES / f"{fixture.key(other)}.json", tmp_path / f"{fixture.key(request)}.json")
    with pytest.raises(FixtureMissing, match="another turn"):
        ReplayAgent(tmp_path).turn(request)
    (tmp_path / f"{fixture.key(request)}.json").write_text("{")
    with pytest.raises(FixtureMissing, match="not JSON"):
        ReplayAgent(tmp_path).turn(request)


def test_the_shipped_recordings_are_real_turns_of_the_pinned_daemon() -> None:
    paths = list(FIXTURES.glob("*.json"))
    assert len(paths) >= 13
    for path in paths:
        content = json.loads(path.read_text())
        assert (content["opencode"], content["model"]) == (VERSION, MODEL)
        assert content["request"]["schema"] == SCHEMA, f"run `{fixture.RECORD_COMMAND}`"


def test_recording_gives_the_same_bytes_again(tmp_path: Path, live: LiveAgent) -> None:
    request = opening("say hello")
    recorder = RecordingAgent(live, directory=tmp_path, opencode=VERSION, model=MODEL)
    recorded = recorder.turn(request)
    recorder.end_session("s")
    name = f"{fixture.key(request)}.json"
    assert (tmp_path / name).read_bytes() == (FIXTURES / name).read_bytes()
    assert ReplayAgent(tmp_path).turn(request).structured == recorded.structured


# ------------------------------------------------------------------ what only a daemon does


def test_the_model_is_offered_no_tool_but_the_answer(model: ScriptedModel, live: LiveAgent) -> None:
    live.turn(opening("say hello"))
    live.end_session("s")
    last = model.requests[-1]
    assert [tool["function"]["name"] for tool in last["tools"]] == ["StructuredOutput"]
    assert last["tool_choice"] == "required"


@pytest.mark.parametrize("goal", ["prose first", "wrong shape first"])
def test_answers_out_of_shape_are_asked_for_again(
    live: LiveAgent, median: tuple[GitWorkspace, GitSource], goal: str
) -> None:
    workspace, _ = median
    one = brief(goal, workspace, None)
    done = compile_plan(one, agent=live, workspace=workspace, ledger=MemoryLedger(), session=goal, bounds=BOUNDS)
    assert done.turns == 2 and done.plan.tasks[0].id == "hello"


def test_a_refused_key_is_permanent(live: LiveAgent) -> None:
    with pytest.raises(Permanent, match="as the scenario says"):
        live.turn(opening("not allowed"))


def test_a_wrong_password_is_permanent_and_not_told(daemon: Daemon) -> None:
    with alive(daemon, password="not-the-password") as stranger, pytest.raises(Permanent, match="401") as error:
        stranger.turn(opening("say hello"))
    assert "not-the-password" not in str(error.value)


def test_a_daemon_that_is_gone_is_unavailable() -> None:
    nobody = LiveAgent("http://127.0.0.1:9", password="x", version=VERSION, daemon_seconds=0.5)
    with pytest.raises(Unavailable):
        nobody.turn(opening("say hello"))
    nobody.close()


def test_another_version_gets_no_prompt(daemon: Daemon, model: ScriptedModel) -> None:
    before = len(model.requests)
    with alive(daemon, version="0.0.1") as other:
        for ask in (other.check, lambda: other.turn(opening("say hello"))):
            with pytest.raises(Permanent, match=r"0\.0\.1 is pinned"):
                ask()
    assert len(model.requests) == before


def test_another_version_is_refused(tmp_path: Path, daemon: Daemon) -> None:
    other = Daemon(ensure(), root=tmp_path, config=CONFIG, version="0.0.1", environ={"OC_MODEL": "x"})
    with pytest.raises(Permanent, match=r"0\.0\.1 is pinned"):
        other.start()
    assert other.pid is None
