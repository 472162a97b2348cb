"""The product, composed by main.build() as always, with a model that says what a test wrote down.

`python -m tests.support.scripted_main FILE`: JSON of goal → answers, in order; the last one answers all that follow in a session.
For plans that no honest model gives, and for repositories that the recorded answers do not know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from controller import config, log, main
from controller.core.digest import canonical
from controller.core.errors import FixtureMissing
from controller.core.model import TurnReply, TurnRequest
from controller.ports import SandboxProvider, never


@dataclass(frozen=True, kw_only=True)
class ByGoal:
    """An AgentServer without a memory of its own: the session's history says which answer is next."""

    answers: Mapping[str, Sequence[Any]]
    mode: str = "replay"

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        first = (*request.history, request.prompt)[0]
        found = [a for goal, a in self.answers.items() if f'"goal":{canonical(goal).decode()}' in first]
        if len(found) != 1:
            raise FixtureMissing(f"{len(found)} scripts fit this session")
        script = found[0]
        said = script[min(len(request.history), len(script) - 1)]
        return TurnReply(
            session=request.session,
            structured=said,
            raw_text="",
            tool_calls=(),
            tokens_in=1,
            tokens_out=1,
            timings={},
        )

    def end_session(self, session: str) -> None:
        """Nothing is kept."""


def run(change: Callable[[SandboxProvider], Any] = lambda real: real) -> int:
    """`change` may put something before the sandboxes."""
    (file,) = sys.argv[1:]
    settings = config.load()
    log.configure(as_json=False, level=settings.log_level)
    adapters = main.build(settings, role="all")
    assert adapters.worker is not None
    agent = cast("Any", ByGoal(answers=json.loads(Path(file).read_text())))
    worker = replace(adapters.worker, agent=agent, sandboxes=change(adapters.worker.sandboxes))
    return main.run(settings, role="all", adapters=replace(adapters, worker=worker))


if __name__ == "__main__":
    sys.exit(run())
