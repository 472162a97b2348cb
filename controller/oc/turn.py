"""One turn: a prompt, watched until it ends or must be ended, and what its end means.

A stall shows as the daemon's own retry after a silence on the wire (opencode.json: headerTimeout, chunkTimeout), or as a turn
that outlives its deadline. Whatever is ended here is aborted and reverted, so that the session is as it was before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from controller.core.errors import ContextOverflow, InvalidPlan, Permanent, SisuError, TurnStalled, Unavailable
from controller.core.model import TurnRequest
from controller.oc.client import ABORT_SECONDS, OpenCodeClient
from controller.oc.events import Progress

SILENT = ("timed out",)  # "Provider response headers timed out after 20000ms", "SSE read timed out"
PATIENCE_SECONDS = 20.0  # the daemon may wait so long by itself before it asks the model again
DAEMON_RETRIES = 1  # then it is our turn: with a wait that can be canceled
MAX_STEPS = (
    4  # model calls in one turn: an answer whose JSON is broken is asked for again by the daemon, without an end
)
# The model answered, but not as asked: the caller may ask again.
_NO_ANSWER = frozenset({"StructuredOutputError", "MessageOutputLengthError"})
_TRY_AGAIN = frozenset({"MessageAbortedError", "UnknownError"})


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of one turn. `tokens` None: as many as it takes. `canceled` is asked once a second."""

    seconds: float
    tokens: int | None
    canceled: Callable[[], bool]


async def ask(
    client: OpenCodeClient, progress: Progress, session: str, *, message: str, request: TurnRequest, bounds: Bounds
) -> dict[str, Any]:
    """The daemon's {info, parts}. Raises what `ended` says, after the turn was aborted and reverted, and what the client raises."""
    post = asyncio.create_task(
        client.prompt(
            session,
            message=message,
            agent=request.agent,
            text=request.prompt,
            schema=request.schema,
            seconds=bounds.seconds + 2 * ABORT_SECONDS,
        )
    )
    post.add_done_callback(lambda task: task.cancelled() or task.exception())  # asked for by nobody after a verdict
    try:
        verdict = await _watched(post, progress, bounds)
        if verdict is None:
            return await post
        if progress.lost is None:
            await _undo(client, session, message, post)
        raise verdict
    finally:
        post.cancel()


async def _watched(post: asyncio.Task[dict[str, Any]], progress: Progress, bounds: Bounds) -> SisuError | None:
    """None when the turn ended by itself, else why it must be ended."""
    until = time.monotonic() + bounds.seconds
    while True:
        changed = asyncio.create_task(progress.changed.wait())
        try:
            timeout = min(1.0, max(0.0, until - time.monotonic()))
            await asyncio.wait({post, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        progress.changed.clear()
        # The verdict first: a foreign tool call fails the turn, even when an answer followed it.
        verdict = ended(progress, now=time.time(), late=time.monotonic() >= until, bounds=bounds, done=post.done())
        if verdict is not None or post.done():
            return verdict


def ended(progress: Progress, *, now: float, late: bool, bounds: Bounds, done: bool) -> SisuError | None:
    """Why this turn must not go on, or None. `now` in seconds since the epoch; `done`: it ended by itself."""
    if progress.foreign:
        return Permanent(f"the model called the tool {progress.foreign[0][:60]!r}, but its agent has none")
    if done:
        return None
    if bounds.canceled():
        return Permanent("canceled before there was a plan")
    if progress.lost is not None:
        return Unavailable(f"OpenCode went away during the turn: {progress.lost}")
    if bounds.tokens is not None and (took := sum(progress.tokens)) > bounds.tokens:
        return Permanent(f"spec.limits.maxTokens: the turn alone took {took}, {bounds.tokens} were left")
    if progress.steps > MAX_STEPS:
        return InvalidPlan(f"the model answered {progress.steps} times in one turn, and never with valid JSON")
    if late:
        return TurnStalled(f"the model did not end its answer within {bounds.seconds:g} s")
    return None if progress.retry is None else _retrying(progress.retry, now=now)


def _retrying(retry: Mapping[str, Any], *, now: float) -> SisuError | None:
    said = str(retry.get("message", ""))[:300]
    if any(sign in said for sign in SILENT):
        return TurnStalled(f"the model fell silent: {said}")
    wait = float(retry.get("next") or 0) / 1000 - now
    if wait <= PATIENCE_SECONDS and int(retry.get("attempt") or 0) <= DAEMON_RETRIES:
        return None
    return Unavailable(f"the model's provider does not serve us: {said}", retry_after=max(0.0, wait))


async def _undo(client: OpenCodeClient, session: str, message: str, post: asyncio.Task[dict[str, Any]]) -> None:
    """Abort, wait for the turn's end, and take it out of the context. Raises Unavailable when the daemon does not do it."""
    await client.abort(session)
    await asyncio.wait({post}, timeout=ABORT_SECONDS)
    await client.revert(session, message)


def judge(info: Mapping[str, Any]) -> str | None:
    """What to tell a model that answered otherwise than asked, beyond that there was no answer. Raises for every other failure."""
    error, finish = info.get("error") or {}, info.get("finish")
    name, data = str(error.get("name", "")), error.get("data") or {}
    if finish == "length":
        return "the answer was cut off because it was too long; give a shorter one"
    if name in _NO_ANSWER or (not name and finish is not None):
        return None
    said = str(data.get("message", ""))[:300]
    message = f"OpenCode: {name or 'the turn ended without a result'}: {said}"
    status = data.get("statusCode")
    if name == "ContextOverflowError":
        raise ContextOverflow(f"the prompt is too long for the model: {said}")
    if name == "ContentFilterError":
        raise Permanent(f"the provider's content filter refused the turn: {said}")
    if name == "ProviderAuthError" or status in (401, 403):
        raise Permanent(f"the provider refused the key (OC_MODEL_API_KEY): {said}")
    if name in _TRY_AGAIN or not name or (name == "APIError" and data.get("isRetryable")):
        raise Unavailable(message, retry_after=_retry_after(data.get("responseHeaders") or {}))
    raise Permanent(message)


def _retry_after(headers: Mapping[str, Any]) -> float:
    """Seconds, where the provider said so in seconds."""
    value = str(headers.get("retry-after", ""))
    return float(value) if value.isdecimal() else 0.0
