"""What a new plan is told about the one before it (DESIGN 3.3). Pure."""

from __future__ import annotations

from controller.core.phases import Stage, Status
from controller.core.prompt import cut, tasks_feedback
from controller.core.run import Run


def of_run(run: Run) -> str | None:
    """Why the former plan is not good enough; None when there was none (OpenCode or git failed)."""
    if run.plan is None:
        return None
    if run.stage in (Stage.EXECUTE, Stage.FINISH):
        failures = [(f.task, f.err_code) for f in run.tasks.failures]
        return tasks_feedback(summary=str(run.plan["summary"]), failures=failures)
    if run.status is Status.EXPIRED:
        return f"The former plan was: {cut(str(run.plan['summary']))}\nNobody decided on it in time."
    if run.status is Status.REJECTED:
        return f"The former plan was: {cut(str(run.plan['summary']))}\nPeople did not accept it: {cut(run.error or 'no reason was given')}"
    return None
