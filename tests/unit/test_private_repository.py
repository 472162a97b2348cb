"""An Intent whose repository is private, while it is planned: the Secret is read when a step runs, and only its name is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from controller.core import digest as digests
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact, GitSource
from controller.core.work import Context
from controller.workflows import steps
from controller.workflows.parts import Parts
from tests.support.builders import context
from tests.support.memory_credentials import MemoryCredentials, MemorySecret
from tests.support.memory_workspace import MemoryWorkspace
from tests.support.scripted_agent import MemoryLedger, ScriptedAgent

TOKEN = "reader:s3cret-token"
URL = "https://git.example/org/x.git"
PRIVATE = {"url": URL, "ref": "main", "secretRef": {"name": "forge"}}
GOOD = MemorySecret(token=TOKEN, annotation="https://git.example/org")
TASK = {"id": "t", "title": "t", "command": "true"}
TEXTS: Mapping[str, Any] = {"goal": "g", "summary": "s", "design": [], "files": [], "risks": [], "tests": []}
WRONG = {"op": "replace", "path": "a.py", "search": "nothing like that", "replace": "x"}
RIGHT = {"op": "replace", "path": "a.py", "search": "one", "replace": "two"}


def plan(edit: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "plan", "plan": {**TEXTS, "edits": [edit], "tasks": [TASK]}}


class Watched(MemoryWorkspace):
    """Keeps the sources that it was asked with."""

    def resolve(self, source: GitSource | None) -> str:
        self.__dict__.setdefault("sources", []).append(source)
        return super().resolve(source)


@dataclass
class World:
    """All parts in one; `saved` is everything that a step wrote down."""

    credentials: MemoryCredentials | None
    agent: ScriptedAgent
    workspace: MemoryWorkspace = field(default_factory=lambda: Watched(files={"a.py": "one = 1\n"}))
    saved: list[Any] = field(default_factory=list)
    memory: MemoryLedger = field(default_factory=MemoryLedger)

    def __getattr__(self, name: str) -> Any:
        if name in ("store", "sandboxes", "clock"):
            return self
        raise AttributeError(name)

    def ledger(self, ctx: Context) -> MemoryLedger:
        return self.memory

    def save_step(
        self, run: str, step: str, attempt: int, *, output: Mapping[str, Any], artifacts: Sequence[Artifact], **_: Any
    ) -> Any:
        self.saved += [step, output, *(a.content for a in artifacts)]
        return output

    def planned(self, ctx: Context, **what: Any) -> bool:
        self.saved.append(what)
        return True

    def put_blob(self, content: bytes) -> str:
        self.saved.append(content)
        return digests.sha256(content)

    def resolve(self, template: str) -> str:
        return "mock:python"

    def check(self, request: Any) -> None:
        self.saved.append(request)

    def monotonic(self) -> float:
        return 0.0

    def observe(self, what: str, outcome: str, seconds: float) -> None: ...

    def canceled_runs(self) -> frozenset[str]:
        return frozenset()


def world(*answers: Any, secrets: Mapping[tuple[str, str], MemorySecret] | None = None, enabled: bool = True) -> World:
    known = MemoryCredentials(secrets=dict(secrets if secrets is not None else {("team", "forge"): GOOD}))
    return World(known if enabled else None, ScriptedAgent(answers=answers or (plan(RIGHT),)))


def planned(one: World, ctx: Context) -> dict[str, Any]:
    """What is approved and stored: the record."""
    me = cast("Parts", one)
    compiled = steps.compile_st(me, ctx, {})
    patched = steps.apply_patch_st(me, ctx, {"CompileST": compiled}, compiled)
    assert steps.decide_st(me, ctx, {}, compiled, patched)
    record: dict[str, Any] = one.saved[-1]["record"]
    return record


def test_the_record_names_the_secret_and_holds_nothing_of_it() -> None:
    one = world()
    record = planned(one, context(workspace=PRIVATE))
    assert record["execution"]["secrets"] == ["forge"]
    everything = f"{one.saved} {one.agent.requests} {one.memory}"
    assert "forge" in everything and "s3cret" not in everything
    (source,) = set(cast("Any", one.workspace).sources)
    assert source == GitSource(url=URL, ref="main", token=TOKEN) and "s3cret" not in repr(source)


@pytest.mark.parametrize("workspace", [None, {"url": URL}, {"url": URL, "ref": "main"}])
def test_without_a_secret_the_record_is_what_it_was(workspace: Mapping[str, Any] | None) -> None:
    """Digests of Intents that name no Secret are those of releases that knew none."""
    write = {"op": "write", "path": "a.py", "content": "two = 1\n"}
    ctx = context(workspace=workspace)
    one = world(plan(write))
    record = planned(one, ctx)
    keys = "commit snapshotSha256 inputsSha256 constraintsSha256 template egress limits onFailure secrets policySha256"
    assert set(record["execution"]) == {*keys.split(), "compilerVersion", "promptVersion", "generation"}
    assert record["execution"]["secrets"] == []
    assert one.credentials is not None and one.credentials.asked == []
    assert planned(world(plan(write), enabled=False), ctx) == record
    secret = {**record, "execution": {**record["execution"], "secrets": ["forge"]}}
    assert digests.plan_digest(secret) != digests.plan_digest(record)


def test_it_is_read_once_for_each_step_that_runs_whatever_the_model_asks_for() -> None:
    need = {"kind": "need", "need": {"reads": ["a.py", "b.py"], "searches": ["one", "two"]}}
    one = world(need, need, plan(WRONG), need, plan(RIGHT))
    me, ctx = cast("Parts", one), context(workspace=PRIVATE)
    assert one.credentials is not None
    compiled = steps.compile_st(me, ctx, {})
    assert one.credentials.asked == [("team", "forge", URL)]
    patched = steps.apply_patch_st(me, ctx, {}, compiled)
    assert len(one.agent.requests) == 5 and one.credentials.asked == [("team", "forge", URL)] * 2
    known = {"CompileST": compiled, "ApplyPatchST": patched}
    steps.compile_st(me, ctx, known)
    steps.apply_patch_st(me, ctx, known, compiled)
    steps.decide_st(me, ctx, known, compiled, patched)
    assert len(one.credentials.asked) == 2, "a step that is done reads nothing"


def test_a_step_after_a_crash_reads_it_again_so_a_rotated_one_works() -> None:
    one = world()
    me, ctx = cast("Parts", one), context(workspace=PRIVATE)
    assert one.credentials is not None
    steps.compile_st(me, ctx, {})
    one.credentials.secrets["team", "forge"] = replace(GOOD, token="reader:rotated")
    one.agent.requests.clear()
    steps.compile_st(me, ctx, {})
    used = dict.fromkeys(source.token for source in cast("Any", one.workspace).sources)
    assert list(used) == [TOKEN, "reader:rotated"]


@pytest.mark.parametrize(
    ("secrets", "says"),
    [
        ({}, "there is none"),
        ({("other", "forge"): GOOD}, "there is none"),
        ({("team", "forge"): replace(GOOD, annotation=None)}, "has no annotation sisukodo.dev/git"),
        ({("team", "forge"): replace(GOOD, annotation="https://git.example/organ")}, "does not cover"),
        ({("team", "forge"): replace(GOOD, annotation="https://elsewhere.example")}, "does not cover"),
    ],
)
def test_what_may_not_be_sent_stops_the_step_before_git(
    secrets: Mapping[tuple[str, str], MemorySecret], says: str
) -> None:
    one = world(secrets=secrets)
    with pytest.raises(InvalidIntent, match=says) as refused:
        steps.compile_st(cast("Parts", one), context(workspace=PRIVATE), {})
    assert refused.value.field == "spec.workspace.git.secretRef" and "s3cret" not in str(refused.value)
    assert "sources" not in one.workspace.__dict__ and one.agent.requests == [] and one.saved == []


def test_a_worker_that_has_it_switched_off_says_so() -> None:
    """Also for what was accepted while it was on."""
    one = world(enabled=False)
    with pytest.raises(InvalidIntent, match="WORKSPACE_SECRETS"):
        steps.compile_st(cast("Parts", one), context(workspace=PRIVATE), {})
    assert json.dumps(one.saved) == "[]"
