"""Ledger v2 over app.opencode_calls: every model call of a run, by op_key. Failures are kept, never served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from controller.core import storable
from controller.core.digest import sha256_json
from controller.core.errors import InvalidPlan, SisuError
from controller.core.model import Recorded, TurnReply, TurnRequest
from controller.core.visible import visible
from controller.core.work import Context
from controller.db.pool import SQL, Pool, one, transaction

STEP = "CompileST"


class PgTurnLedger:
    """The ledger of one run and plan generation. op_key = (run, step, attempt, schema hash, hash of the prompts so far)."""

    def __init__(self, pool: Pool, ctx: Context, *, ids: Callable[[], object] = uuid4) -> None:
        self._pool, self._ctx, self._ids = pool, ctx, ids

    def look(self, request: TurnRequest) -> Recorded:
        row = one(self._pool, "ledger_look", op_key=self._op_key(request), run_id=self._ctx.run_id)
        assert row is not None
        spent = int(row["spent"])
        if row["op_key"] is None or row["err_code"] is not None:
            return Recorded(reply=None, error=row["err_code"], spent=spent)
        reply = TurnReply(
            session=row["session"] or "",
            structured=row["structured"],
            raw_text=row["raw_text"] or "",
            tool_calls=tuple(row["tool_calls"] or ()),
            tokens_in=row["tokens"]["in"],
            tokens_out=row["tokens"]["out"],
            timings=row["timings"] or {},
            problem=row["problem"],
        )
        return Recorded(reply=reply, error=None, spent=spent)

    def put(self, request: TurnRequest, reply: TurnReply) -> None:
        if (wrong := storable.problem([reply.structured, reply.raw_text, *reply.tool_calls])) is not None:
            # The compile loop refuses such an answer right after this.
            refused = InvalidPlan(f"{wrong}: {visible(reply.raw_text)[:2048]}")
            refused.tokens = (reply.tokens_in, reply.tokens_out)
            self.failed(request, refused)
            return
        tokens = {"in": reply.tokens_in, "out": reply.tokens_out}
        response = {"structured": reply.structured, "text": reply.raw_text, "problem": reply.problem, "tokens": tokens}
        self._write(
            request,
            {
                "session": reply.session,
                "response": Jsonb(response),
                "structured": Jsonb(reply.structured),
                "raw_text": reply.raw_text,
                "tool_calls": Jsonb([dict(t) for t in reply.tool_calls]),
                "timings": Jsonb(dict(reply.timings)),
                "tokens": Jsonb(tokens),
                "err_code": None,
                "error": None,
            },
        )

    def failed(self, request: TurnRequest, error: Exception) -> None:
        nothing = dict.fromkeys(("session", "response", "structured", "raw_text", "tool_calls", "timings"))
        took = error.tokens if isinstance(error, SisuError) else (0, 0)
        told = {"err_code": type(error).__name__, "error": visible(str(error))[:4096]}
        self._write(request, {**nothing, **told, "tokens": Jsonb({"in": took[0], "out": took[1]})})

    def _write(self, request: TurnRequest, reply: Mapping[str, Any]) -> None:
        params = {
            "op_key": self._op_key(request),
            "try_id": str(self._ids()),
            "run_id": self._ctx.run_id,
            "step_id": STEP,
            "attempt": self._ctx.plan_no,
            "seq": len(request.history),
            "agent": request.agent,
            "schema_hash": sha256_json(dict(request.schema)),
            "prompt": request.prompt,
            "request": Jsonb({"agent": request.agent, "commit": request.commit, "session": request.session}),
            **reply,
        }

        def body(c: psycopg.Connection[DictRow]) -> None:
            c.execute(SQL["ledger_put"], params)
            c.execute(SQL["add_tokens"], {"run_id": self._ctx.run_id})

        transaction(self._pool, body)

    def _op_key(self, request: TurnRequest) -> str:
        return sha256_json(
            {
                "run": self._ctx.run_id,
                "step": STEP,
                "attempt": self._ctx.plan_no,
                "schema": sha256_json(dict(request.schema)),
                "prompts": sha256_json([request.agent, *request.history, request.prompt]),
            }
        )
