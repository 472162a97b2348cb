"""What every provider checks before a task and says after it, so that they refuse and report alike."""

from __future__ import annotations

import os
from collections.abc import Sequence

from controller.core.contract import Metrics, SBXReq, SBXRes
from controller.core.errors import InvalidIntent
from controller.core.model import Artifact, Owner
from controller.sbx.artifacts import index
from controller.sbx.jail import WORKSPACE
from controller.sbx.output import Capture
from controller.sbx.task import Verdict

MAX_COMMAND = 65_536


def check(request: SBXReq) -> None:
    """Raises InvalidIntent for a working directory elsewhere and for text that cannot be a command or a variable."""
    workdir = request.workdir or WORKSPACE
    if workdir != WORKSPACE and (os.path.normpath(workdir) != workdir or not workdir.startswith(f"{WORKSPACE}/")):
        raise InvalidIntent("spec.sandbox", f"the working directory {workdir!r} is not in {WORKSPACE}")
    if len(request.cmd) > MAX_COMMAND or any("=" in name or not name for name in request.env):
        raise InvalidIntent("spec.sandbox", f"a command over {MAX_COMMAND} characters, or a variable without a name")
    if not all(map(_is_plain, (request.cmd, *request.env, *request.env.values()))):
        raise InvalidIntent("spec.sandbox", "the command or a variable holds a NUL or is not Unicode text")


def response(
    verdict: Verdict, found: Sequence[Artifact], *, capture: Capture, metrics: Metrics, ref: str, owner: Owner
) -> SBXRes:
    """The verdict's note becomes the last line of stderr."""
    if verdict.note:
        capture.note(verdict.note)
    return SBXRes(
        exit=verdict.exit,
        stdout=capture.tail("stdout"),
        stderr=capture.tail("stderr"),
        files_out=index(found),
        metrics=metrics,
        sandbox_ref=ref,
        err_code=verdict.code,
        task_key=owner.task_key,
    )


def _is_plain(text: str) -> bool:
    """Whether it can be an argument: a lone surrogate has no bytes, and a NUL would end it."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
