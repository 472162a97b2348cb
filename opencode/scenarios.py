"""What the scripted model says, read from YAML: one file per scenario in scenarios/.

goal: "say hello"            matches the intent in a session's first message exactly
repository: fix-median       optional: the example repository that the intent is about
after: "…"                   optional: matches only sessions whose first message holds this text (feedback on a former plan)
feedback: {…}                optional: how record.py makes that feedback: {summary, failures: {task: errCode}}
turns:                       the first answers the first message, and so on; the last one answers all that follow
  - need: {reads: [], searches: []}
  - plan: {…}                PlanOutput without goal, which is filled in; a task may say `repeat: 1000`
  - structured: {…}          any answer as it is; `text:` prose, `status:` an HTTP error, `hang:` seconds of silence
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "scenarios"
FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; exactly one field is set."""

    structured: Any = None
    text: str | None = None
    status: int | None = None
    hang: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One script."""

    name: str
    goal: str
    repository: str | None
    after: str | None
    feedback: Mapping[str, Any] | None
    turns: tuple[Answer, ...]


def load(folder: Path = FOLDER) -> tuple[Scenario, ...]:
    """All scenarios of a folder, by name."""
    return tuple(
        _scenario(path.stem, yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.yaml"))
    )


def _scenario(name: str, raw: Mapping[str, Any]) -> Scenario:
    return Scenario(
        name=name,
        goal=raw["goal"],
        repository=raw.get("repository"),
        after=raw.get("after"),
        feedback=raw.get("feedback"),
        turns=tuple(_answer(turn, raw["goal"]) for turn in raw["turns"]),
    )


def _answer(turn: Mapping[str, Any], goal: str) -> Answer:
    if "need" in turn:
        return Answer(structured={"kind": "need", "need": turn["need"]})
    if "plan" in turn:
        plan = {"goal": goal, "design": [], "files": [], "risks": [], "edits": [], "tests": [], **turn["plan"]}
        plan["tasks"] = list(_tasks(plan["tasks"]))
        return Answer(structured={"kind": "plan", "plan": plan})
    return Answer(**turn)


def _tasks(tasks: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """`repeat: n` stands for n tasks `<id>-1` … `<id>-n`, numbered with leading zeros."""
    for task in tasks:
        rest = {key: value for key, value in task.items() if key != "repeat"}
        count = int(task.get("repeat", 1))
        if "repeat" not in task:
            yield rest
            continue
        for n in range(1, count + 1):
            number = f"{n:0{len(str(count))}d}"
            yield {**rest, "id": f"{task['id']}-{number}", "title": f"{task['title']} {n} of {count}"}


def pick(scenarios: Sequence[Scenario], messages: Sequence[str]) -> Answer | None:
    """The answer to a session's messages; a scenario with `after` goes before one without."""
    if not messages:
        return None
    wanted = [s for s in scenarios if f'"goal":{json.dumps(s.goal, ensure_ascii=False)}' in messages[0]]
    fitting = [s for s in wanted if s.after is not None and s.after in messages[0]] or [
        s for s in wanted if s.after is None
    ]
    if not fitting:
        return None
    turns = fitting[0].turns
    return turns[min(len(messages), len(turns)) - 1]
