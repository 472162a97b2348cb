"""What the scripted model says, read from YAML: one file per scenario in scenarios/.

goal: "say hello"            matches the intent in a session's first message exactly
repository: fix-median       optional: the example repository that the intent is about
after: "…"                   optional: matches only sessions whose first message holds this text (feedback on a former plan)
feedback: {…}                optional: how record.py makes that feedback: {summary, failures: {task: errCode}}
turns:                       the first answers the first message, and so on; the last one answers all that follow
  - need: {reads: [], searches: []}
  - plan: {…}                PlanOutput without goal, which is filled in; a task may say `repeat: 1000`
  - structured: {…}          any answer as it is; class Answer lists how else a model can behave, well or badly
    first: [{…}, …]          optional: what the first calls of this turn get instead
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "scenarios"
FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. What is said: structured, text, raw or tool; or an HTTP status, whose message is the text. How: the rest.

    `raw` are the arguments of StructuredOutput as they are, JSON or not; `tool` is {name, arguments} of another tool. `headers` go
    with a status. `silent` are seconds before the headers, `pause` seconds before each piece of at most `piece` characters; after
    `stop` characters comes silence, with comments that keep the connection alive if `comments`. `finish` replaces the reason.
    """

    structured: Any = None
    text: str | None = None
    raw: str | None = None
    tool: Mapping[str, Any] | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    silent: float = 0.0
    stop: int | None = None
    comments: bool = False
    pause: float = 0.0
    piece: int = 4096
    finish: str | None = None
    first: tuple[Answer, ...] = ()


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
    rest = {key: value for key, value in turn.items() if key not in ("need", "plan", "first")}
    rest["first"] = tuple(_answer(one, goal) for one in turn.get("first", ()))
    if "need" in turn:
        rest["structured"] = {"kind": "need", "need": turn["need"]}
    if "plan" in turn:
        plan = {"goal": goal, "design": [], "files": [], "risks": [], "edits": [], "tests": [], **turn["plan"]}
        plan["tasks"] = list(_tasks(plan["tasks"]))
        rest["structured"] = {"kind": "plan", "plan": plan}
    return Answer(**rest)


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


def pick(scenarios: Sequence[Scenario], messages: Sequence[str], calls: Counter[tuple[str, int]]) -> Answer | None:
    """The answer to a session's messages; a scenario with `after` goes before one without. `calls` counts those of each turn."""
    if not messages:
        return None
    wanted = [s for s in scenarios if f'"goal":{json.dumps(s.goal, ensure_ascii=False)}' in messages[0]]
    fitting = [s for s in wanted if s.after is not None and s.after in messages[0]] or [
        s for s in wanted if s.after is None
    ]
    if not fitting:
        return None
    turns = fitting[0].turns
    turn = turns[min(len(messages), len(turns)) - 1]
    before = calls[(fitting[0].name, len(messages))]
    calls[(fitting[0].name, len(messages))] += 1
    return turn.first[before] if before < len(turn.first) else turn
