"""A recorded turn as a file: named by the hash of everything that the turn depends on, and readable in a review.

The file holds its request too, so that a name that does not fit its content is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controller.core.digest import sha256_json
from controller.core.errors import FixtureMissing
from controller.core.model import TurnReply, TurnRequest

RECORD_COMMAND = "python -m opencode.record"


def key(request: TurnRequest) -> str:
    """sha256 of the RFC 8785 form of what the answer depends on. The session's name is not part of it."""
    return sha256_json(_request(request))


def _request(request: TurnRequest) -> dict[str, Any]:
    return {
        "agent": request.agent,
        "schema": dict(request.schema),
        "prompt": request.prompt,
        "commit": request.commit,
        "history": list(request.history),
    }


def write(directory: Path, request: TurnRequest, reply: TurnReply, *, opencode: str, model: str) -> Path:
    """Record one turn; an older recording of it is replaced. Ids and timings are left out, so the bytes are reproducible."""
    path = directory / f"{key(request)}.json"
    content = {
        "opencode": opencode,
        "model": model,
        "request": _request(request),
        "reply": {
            "structured": reply.structured,
            "rawText": reply.raw_text,
            "toolCalls": [dict(call) for call in reply.tool_calls],
            "tokensIn": reply.tokens_in,
            "tokensOut": reply.tokens_out,
            **({} if reply.problem is None else {"problem": reply.problem}),
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)
    return path


def read(directory: Path, request: TurnRequest) -> TurnReply:
    """The recorded reply. Raises FixtureMissing naming the key, the folder and the command that records."""
    name = key(request)
    path = directory / f"{name}.json"
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise FixtureMissing(
            f"no recording {name} in {directory} (turn {len(request.history) + 1}, prompt {request.prompt[-160:]!r}); "
            f"OC_MODE=replay knows recorded goals only: `{RECORD_COMMAND}` records opencode/scenarios, OC_MODE=record any goal"
        ) from e
    except ValueError as e:
        raise FixtureMissing(f"{path} is not JSON: {e}; record it again by `{RECORD_COMMAND}`") from e
    if content.get("request") != _request(request):
        raise FixtureMissing(f"{path} holds another turn than its name says; record it again by `{RECORD_COMMAND}`")
    reply = content["reply"]
    return TurnReply(
        session=request.session,
        structured=reply["structured"],
        raw_text=reply["rawText"],
        tool_calls=tuple(reply["toolCalls"]),
        tokens_in=reply["tokensIn"],
        tokens_out=reply["tokensOut"],
        timings={},
        problem=reply.get("problem"),
    )
