"""compile_plan's conversation, with an agent, a workspace and a ledger in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.core.errors import ContextOverflow, InvalidPlan, Permanent, TurnStalled, Unavailable
from controller.core.model import GitSource
from controller.workflows.compile import Bounds, Brief, Compiled, compile_plan, repair_plan, validate
from tests.support.memory_workspace import MemoryWorkspace
from tests.support.scripted_agent import MemoryLedger, ScriptedAgent

SOURCE = GitSource(url="https://git.example/r.git", ref="main", token="s3cret")
FILES = {"a.py": "one = 1\n", "b.py": "two = 2\n"}


def plan(**changed: Any) -> dict[str, Any]:
    task = {"id": "t", "title": "t", "command": "true"}
    base = {
        "goal": "g",
        "summary": "s",
        "design": [],
        "files": [],
        "risks": [],
        "edits": [],
        "tests": [],
        "tasks": [task],
    }
    return {"kind": "plan", "plan": {**base, **changed}}


def need(*reads: str, searches: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"kind": "need", "need": {"reads": list(reads), "searches": list(searches)}}


class Case:
    """One compilation with its parts at hand."""

    def __init__(self, *answers: Any, max_tasks: int = 10, feedback: str | None = None, **bounds: int) -> None:
        self.agent = ScriptedAgent(answers=answers)
        self.workspace = MemoryWorkspace(files=FILES)
        self.ledger = MemoryLedger()
        self.bounds = Bounds(**{"max_tokens": 1000, **bounds})
        commit = self.workspace.resolve(SOURCE)
        self.brief = Brief(
            goal="do it",
            inputs={},
            constraints={},
            source=SOURCE,
            commit=commit,
            max_tasks=max_tasks,
            feedback=feedback,
        )

    def run(self) -> Compiled:
        return compile_plan(
            self.brief,
            agent=self.agent,
            workspace=self.workspace,
            ledger=self.ledger,
            session="run-1",
            bounds=self.bounds,
        )

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.agent.requests]


def test_a_plan_at_once() -> None:
    case = Case(plan())
    done = case.run()
    assert (done.plan.summary, done.turns, done.tokens) == ("s", 1, 10)
    assert case.agent.ended == ["run-1"]
    assert len(case.ledger.replies) == 1


def test_files_and_searches_are_served_and_each_prompt_carries_its_history() -> None:
    case = Case(need("a.py", searches=("two",)), need("b.py"), plan())
    done = case.run()
    assert done.turns == 3
    assert "one = 1" in case.prompts[1] and "b.py:1:two = 2" in case.prompts[1]
    assert [len(request.history) for request in case.agent.requests] == [0, 1, 2]
    assert case.agent.requests[2].history == tuple(case.prompts[:2])


def test_nothing_of_the_source_or_the_session_is_in_a_prompt() -> None:
    case = Case(need("a.py"), plan())
    case.run()
    text = "".join(case.prompts)
    assert "git.example" not in text and "s3cret" not in text and "run-1" not in text and case.brief.commit not in text


@pytest.mark.parametrize("path", ["../../etc/passwd", "missing.py", "/etc/passwd"])
def test_what_cannot_be_shown_is_answered_by_a_refusal(path: str) -> None:
    case = Case(need(path, "a.py"), plan())
    case.run()
    assert f'file "{path}" is refused' in case.prompts[1] and "one = 1" in case.prompts[1]


def test_rounds_are_bounded_and_the_last_one_says_so() -> None:
    case = Case(*[need("a.py")] * 4, rounds=3)
    with pytest.raises(InvalidPlan, match="after 3 answers"):
        case.run()
    assert ["give the plan now" in prompt for prompt in case.prompts] == [False, False, False, True]


def test_served_bytes_are_bounded_over_all_rounds() -> None:
    case = Case(need("a.py"), need("b.py"), need("a.py"), plan(), served_bytes=10)
    case.run()
    assert "one = 1" in case.prompts[1]
    assert "[cut: " in case.prompts[2]
    assert "no more bytes" in case.prompts[3]
    assert case.workspace.asked == ["a.py", "b.py"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, "no structured answer"),
        ({"kind": "plan"}, "goes with"),
        ({**plan(), "need": {"reads": [], "searches": []}}, "goes with"),
        ({"kind": "wish"}, "Input should be"),
        ({**plan(), "more": 1}, "more: Extra inputs"),
        (plan(summary=7), "plan.summary"),
        (plan(summary="a\0b"), "NUL"),
        (plan(summary="\ud800"), "surrogate"),
        (plan(tasks=[]), "plan.tasks"),
        (plan(tasks=[{"id": "t", "title": "t", "command": "true"}] * 2), "same id"),
        (plan(tasks=[{"id": "t", "title": "t", "command": "true", "dependsOn": ["x"]}]), "no task"),
        (plan(tasks=[{"id": "t", "title": "t", "command": "true", "dependsOn": ["t"]}]), "cycle"),
        (plan(tasks=[{"id": f"t{n}", "title": "t", "command": "true"} for n in range(11)]), "at most 10"),
    ],
)
def test_an_invalid_answer_is_quoted_back_and_corrected(answer: Any, error: str) -> None:
    case = Case(answer, plan())
    assert case.run().turns == 2
    assert error in case.prompts[1]
    assert len(case.ledger.replies) == 2  # the invalid one is part of the conversation


def test_two_corrections_and_no_more() -> None:
    case = Case({}, {}, {}, plan())
    with pytest.raises(InvalidPlan, match="after 2 corrections"):
        case.run()
    assert len(case.prompts) == 3 and case.agent.ended == ["run-1"]


def test_the_token_budget_stops_before_the_next_turn() -> None:
    case = Case(need("a.py"), need("b.py"), plan(), max_tokens=20)
    with pytest.raises(Permanent, match="maxTokens"):
        case.run()
    assert len(case.prompts) == 2


def test_a_plan_that_crosses_the_budget_is_kept() -> None:
    assert Case(plan(), max_tokens=1).run().tokens == 10


def test_max_tasks_is_no_part_of_the_prompt() -> None:
    one, other = Case(plan(), max_tasks=5), Case(plan(), max_tasks=500)
    one.run()
    other.run()
    assert one.prompts == other.prompts


def test_a_second_run_is_served_by_the_ledger() -> None:
    case = Case(need("a.py"), plan())
    first = case.run()
    assert case.run() == first
    assert len(case.agent.requests) == 2


def test_a_failed_call_is_recorded_and_never_served() -> None:
    case = Case(need("a.py"), Unavailable("down"), plan())
    with pytest.raises(Unavailable):
        case.run()
    assert [str(error) for _, error in case.ledger.failures] == ["down"]
    assert case.run().plan.summary == "s"
    # The resumed run took the first turn from the ledger and asked the second one again, with its history.
    assert case.agent.requests[2].history == (case.prompts[0],)


def test_repair_tells_what_did_not_apply_and_keeps_former_feedback() -> None:
    edits = [{"op": "replace", "path": "a.py", "search": "zero", "replace": "one"}]
    case = Case(plan(edits=edits), plan(), feedback="task t failed")
    failed = case.run().plan
    with pytest.raises(InvalidPlan) as error:
        case.workspace.diff(SOURCE, case.brief.commit, failed.edits)
    repaired = repair_plan(
        case.brief,
        failed=failed,
        error=str(error.value),
        agent=case.agent,
        workspace=case.workspace,
        ledger=case.ledger,
        session="run-1-repair",
        bounds=case.bounds,
    )
    assert repaired.plan.edits == ()
    last = case.agent.requests[-1]
    assert last.history == () and last.session == "run-1-repair"
    assert "occurs 0 times" in last.prompt and '"search":"zero"' in last.prompt and "task t failed" in last.prompt


def test_long_chains_of_tasks_are_checked_quickly() -> None:
    tasks: list[dict[str, Any]] = [{"id": "t0", "title": "t", "command": "true"}]
    tasks += [{"id": f"t{n}", "title": "t", "command": "true", "dependsOn": [f"t{n - 1}"]} for n in range(1, 5_000)]
    assert validate(plan(tasks=tasks), max_tasks=10_000).plan is not None


# ------------------------------------------------------------------ less is asked for


def large(*answers: Any) -> Case:
    """A repository whose map and file are larger than a prompt takes."""
    case = Case(*answers)
    files = {f"src/{'m' * 40}{n:04d}.py": "" for n in range(1000)} | {"a.py": "x" * 100_000}
    case.workspace = MemoryWorkspace(files=files)
    case.brief = replace(case.brief, commit=case.workspace.resolve(SOURCE))
    return case


@pytest.mark.parametrize("error", [TurnStalled("silence"), ContextOverflow("too long")])
def test_a_prompt_that_is_too_much_is_made_a_quarter_and_then_a_sixteenth(error: Exception) -> None:
    case = large(error, error, need("a.py"), plan())
    assert case.run().turns == 2
    first, second, third, served = case.prompts
    assert len(first) > 30_000 > 12_000 > len(second) > len(third)
    assert "try 2" in second and "try 3" in third and "try 3" in served, "what was once too much is not tried again"
    assert len(served) < 6000 and "[cut: " in served
    assert [request.history for request in case.agent.requests] == [(), (), (), (third,)], (
        "what was taken back is not said"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [(TurnStalled("silence"), "oc_timeout_terminal"), (ContextOverflow("too long"), "oc_context_terminal")],
)
def test_three_prompts_and_no_more(error: Exception, code: str) -> None:
    case = large(error, error, error, plan())
    with pytest.raises(Permanent, match=rf"{code}: no answer to 3 prompts.*{error}"):
        case.run()
    assert len(case.prompts) == 3


def test_what_was_too_much_before_a_crash_is_not_asked_again() -> None:
    case = large(TurnStalled("silence"), Unavailable("the daemon is gone"), plan())
    with pytest.raises(Unavailable):
        case.run()
    case.run()
    first, second, third = case.prompts
    assert second == third != first


def test_what_a_failed_turn_took_is_not_left_for_the_next_one() -> None:
    stalled = TurnStalled("silence")
    stalled.tokens = (60, 10)
    case = large(stalled, plan())
    case.bounds = replace(case.bounds, max_tokens=100)
    case.run()
    assert [request.max_tokens for request in case.agent.requests] == [100, 30]


def test_the_reason_for_no_answer_is_told_to_the_model() -> None:
    with pytest.raises(InvalidPlan, match="it was cut off"):
        validate(None, problem="it was cut off", max_tasks=1)


def test_the_budget_is_the_whole_intents_and_each_turn_is_told_what_is_left() -> None:
    case = Case(need("a.py"), plan(), max_tokens=100)
    case.run()
    assert [request.max_tokens for request in case.agent.requests] == [100, 90]
    again = Case(plan(), max_tokens=100)
    again.ledger.replies |= {str(n): reply for n, reply in enumerate([*case.ledger.replies.values()] * 5)}
    with pytest.raises(Permanent, match=r"spec\.limits\.maxTokens: 100 of 100"):
        again.run()
