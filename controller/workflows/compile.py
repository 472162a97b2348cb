"""CompileST's conversation with the model: the repository is served in bounded rounds until a valid plan comes back.

The model has no tools: every byte it sees is in a prompt, every prompt is in the ledger, and a ledger hit costs no call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol

from pydantic import ValidationError

from controller.core import prompt as prompts
from controller.core import storable
from controller.core.approval import PART_BYTES, TEXT_BYTES, tasks_text, text_bytes
from controller.core.contract import CompileTurn, Need, PlanOutput
from controller.core.errors import ContextOverflow, InvalidPlan, Permanent, TurnStalled, WorkspaceRefused
from controller.core.model import GitSource, Recorded, TurnReply, TurnRequest
from controller.core.prompt import Served
from controller.core.visible import first_hidden
from controller.ports import AgentServer, Workspace

MAP_BYTES = 32 * 1024
FILE_BYTES = 64 * 1024
SEARCH_BYTES = 16 * 1024
MAX_ERRORS = 10
NARROWINGS = 2  # how often a prompt is made smaller after the model fell silent, or could not take it
TOO_MUCH = (TurnStalled.__name__, ContextOverflow.__name__)
SCHEMA = prompts.turn_schema()


class TurnLedger(Protocol):
    """Every turn, by its request. Only successful ones are found again."""

    def look(self, request: TurnRequest) -> Recorded:
        """What is recorded for an equal request."""

    def put(self, request: TurnRequest, reply: TurnReply) -> None:
        """Record a reply, valid or not: an invalid one is part of the conversation."""

    def failed(self, request: TurnRequest, error: Exception) -> None:
        """Record that no reply came. Never served as a hit."""


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What to compile. `inputs` and `constraints` are plain JSON; `feedback` is why a former plan failed (prompt.*_feedback)."""

    goal: str
    inputs: Any
    constraints: Any
    source: GitSource | None
    commit: str
    max_tasks: int
    feedback: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Ceilings of one compilation."""

    max_tokens: int
    rounds: int = 6  # answers to needs
    served_bytes: int = 256 * 1024  # files and search results, in all rounds together
    corrections: int = 2  # invalid answers that are asked for again, in all rounds together


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A valid plan, and what it took."""

    plan: PlanOutput
    turns: int
    tokens: int


def compile_plan(
    brief: Brief, *, agent: AgentServer, workspace: Workspace, ledger: TurnLedger, session: str, bounds: Bounds
) -> Compiled:
    """Ask until there is a plan. Raises InvalidPlan, Permanent over the token budget, and what agent and workspace raise."""
    talk = _Talk(brief, agent=agent, ledger=ledger, session=session, bounds=bounds)
    serve = _Serving(brief, workspace=workspace, left=bounds.served_bytes)
    try:
        render: Render = serve.first_prompt
        left = bounds.rounds
        while True:
            turn = talk.ask(render)
            if turn.plan is not None:
                return Compiled(plan=turn.plan, turns=talk.turns, tokens=talk.tokens)
            if left == 0:
                raise InvalidPlan(f"the model asked to see more after {bounds.rounds} answers and gave no plan")
            left -= 1
            render = serve.answer(turn.need or Need(), last=left == 0)
    finally:
        agent.end_session(session)


def repair_plan(
    brief: Brief,
    *,
    failed: PlanOutput,
    error: str,
    agent: AgentServer,
    workspace: Workspace,
    ledger: TurnLedger,
    session: str,
    bounds: Bounds,
) -> Compiled:
    """A new plan after Workspace.diff refused `failed` with `error`. Call it once, with a session of its own."""
    told = (brief.feedback, prompts.repair_feedback(failed=failed, error=error))
    feedback = "\n\n".join(part for part in told if part is not None)
    return compile_plan(
        replace(brief, feedback=feedback),
        agent=agent,
        workspace=workspace,
        ledger=ledger,
        session=session,
        bounds=bounds,
    )


Render = Callable[[int], str]  # a prompt, smaller for a higher number


class _Talk:
    """One session: prompts go through the ledger, answers through the contract."""

    def __init__(self, brief: Brief, *, agent: AgentServer, ledger: TurnLedger, session: str, bounds: Bounds) -> None:
        self._brief, self._agent, self._ledger, self._session, self._bounds = brief, agent, ledger, session, bounds
        self._sent: tuple[str, ...] = ()
        self._corrections = bounds.corrections
        self._scope = 0
        self.turns = 0
        self.tokens = 0

    def ask(self, render: Render) -> CompileTurn:
        """One prompt, and again with the error quoted while the answer is invalid."""
        while True:
            reply = self._narrowing(render)
            try:
                return validate(reply.structured, problem=reply.problem, max_tasks=self._brief.max_tasks)
            except InvalidPlan as e:
                if self._corrections == 0:
                    raise InvalidPlan(f"after {self._bounds.corrections} corrections: {e}") from e
                self._corrections -= 1
                text = prompts.invalid_prompt(str(e))
                render = partial(_unchanged, text)

    def _narrowing(self, render: Render) -> TurnReply:
        """The prompt as large as the model gets through it. What was once too much is not tried again in this session."""
        while True:
            prompt = prompts.narrowed(render(self._scope), scope=self._scope)
            try:
                return self._turn(prompt)
            except (TurnStalled, ContextOverflow) as e:
                if self._scope == NARROWINGS:
                    code = "oc_timeout_terminal" if isinstance(e, TurnStalled) else "oc_context_terminal"
                    raise Permanent(
                        f"{code}: no answer to {NARROWINGS + 1} prompts, each smaller than the one before; the last: {e}"
                    ) from e
                self._scope += 1

    def _turn(self, prompt: str) -> TurnReply:
        request = TurnRequest(
            session=self._session,
            agent=prompts.AGENT,
            schema=SCHEMA,
            prompt=prompt,
            commit=self._brief.commit,
            history=self._sent,
        )
        recorded = self._ledger.look(request)
        reply = recorded.reply or self._call(request, recorded)
        self._sent += (prompt,)
        self.turns += 1
        self.tokens += reply.tokens_in + reply.tokens_out
        return reply

    def _call(self, request: TurnRequest, recorded: Recorded) -> TurnReply:
        if recorded.error in TOO_MUCH:
            raise TurnStalled("the model did not get through this prompt before")
        most = self._bounds.max_tokens
        if recorded.spent >= most:
            raise Permanent(f"spec.limits.maxTokens: {recorded.spent} of {most} are used and there is no plan yet")
        try:
            reply = self._agent.turn(replace(request, max_tokens=most - recorded.spent))
        except Exception as e:
            self._ledger.failed(request, e)
            raise
        self._ledger.put(request, reply)
        return reply


def _unchanged(text: str, scope: int) -> str:
    return text


class _Serving:
    """What of the repository has been shown, and how much of it still may be."""

    def __init__(self, brief: Brief, *, workspace: Workspace, left: int) -> None:
        self._brief, self._workspace, self._left = brief, workspace, left

    def first_prompt(self, scope: int) -> str:
        """The intent, and as much of the repository map as the scope allows."""
        brief = self._brief
        files = None
        if brief.source is not None:
            files = self._workspace.map(brief.source, brief.commit, max_bytes=MAP_BYTES >> 2 * scope)
        return prompts.first_prompt(
            goal=brief.goal,
            inputs=brief.inputs,
            constraints=brief.constraints,
            repository_map=files,
            feedback=brief.feedback,
        )

    def answer(self, need: Need, *, last: bool) -> Render:
        """Everything that was asked for, in order, until the bytes are used up; of each as much as the scope allows."""
        served = [self._serve("file", path, FILE_BYTES) for path in need.reads]
        served += [self._serve("search", pattern, SEARCH_BYTES) for pattern in need.searches]
        return lambda scope: prompts.served_prompt(
            [prompts.shortened(one, max_bytes=FILE_BYTES >> 2 * scope) for one in served], last=last
        )

    def _serve(self, kind: str, name: str, most: int) -> Served:
        if self._left <= 0:
            return Served(kind=kind, name=name, refusal="no more bytes of this repository can be shown for this plan")
        show = self._workspace.read if kind == "file" else self._workspace.search
        try:
            text = show(self._brief.source, self._brief.commit, name, max_bytes=min(most, self._left))
        except WorkspaceRefused as e:
            return Served(kind=kind, name=name, refusal=str(e))
        self._left -= len(text.encode())
        return Served(kind=kind, name=name, text=text)


def validate(structured: Any, *, max_tasks: int, problem: str | None = None) -> CompileTurn:
    """The answer by its contract; `problem` is why there is none. Raises InvalidPlan whose message can be quoted to the model."""
    if structured is None:
        raise InvalidPlan(problem or "there was no structured answer; call StructuredOutput")
    if (found := storable.problem(structured)) is not None:
        raise InvalidPlan(found)
    try:
        turn = CompileTurn.model_validate_json(json.dumps(structured), strict=True)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors[:MAX_ERRORS]]
        more = [f"and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
        raise InvalidPlan("\n".join((*lines, *more))) from e
    if (turn.kind == "plan") != (turn.plan is not None) or (turn.kind == "need") != (turn.need is not None):
        raise InvalidPlan(f"kind {turn.kind!r} goes with {turn.kind!r} and nothing else")
    if turn.plan is not None:
        _check_tasks(turn.plan, max_tasks=max_tasks)
        _check_shown(turn.plan)
    return turn


def _check_shown(plan: PlanOutput) -> None:
    """People must be able to see exactly what they approve: bounded texts, and nothing hidden in what runs."""
    value = plan.model_dump(mode="json", by_alias=True)
    if (size := text_bytes(value)) > TEXT_BYTES:
        raise InvalidPlan(
            f"plan: summary, design, files, risks and tests take {size} bytes; at most {TEXT_BYTES} can be shown"
        )
    if (size := len(tasks_text(value["tasks"]).encode())) > PART_BYTES:
        raise InvalidPlan(f"plan.tasks: {size} bytes; at most {PART_BYTES} can be shown")
    for task in plan.tasks:
        mark = first_hidden(task.title + task.command)
        if mark is not None:
            raise InvalidPlan(f"plan.tasks: {task.id} holds the hidden character {mark}; people must see what runs")


def _check_tasks(plan: PlanOutput, *, max_tasks: int) -> None:
    """Ids are unique, dependencies exist and have no cycle, and there are not too many tasks."""
    if len(plan.tasks) > max_tasks:
        raise InvalidPlan(f"plan.tasks: {len(plan.tasks)} tasks, but the intent allows at most {max_tasks}")
    waits = {task.id: set(task.depends_on) for task in plan.tasks}
    if len(waits) != len(plan.tasks):
        raise InvalidPlan("plan.tasks: two tasks have the same id")
    for task, needs in waits.items():
        if unknown := needs - waits.keys():
            raise InvalidPlan(f"plan.tasks: {task} depends on {sorted(unknown)[0]!r}, which is no task")
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as e:
        raise InvalidPlan(f"plan.tasks: dependencies form a cycle through {e.args[1][0]}") from e
