"""The values that move between the parts: sources, snapshots, patches, turns, sandbox owners, artifacts. Frozen; no I/O.

Database rows that reconcile looks at are in core.plan; wire contracts with untrusted parties are in core.contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = ("CompileST", "ApplyPatchST", "DecideST", "ExecuteST")


@dataclass(frozen=True, kw_only=True)
class GitSource:
    """Where a repository is. `token` is never logged, stored or shown."""

    url: str
    ref: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One commit as a tar archive (uncompressed, paths relative to the root). `sha256` is of the archive's bytes."""

    commit: str
    sha256: str
    size: int
    archive: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A diff in git's format that applies to its snapshot. `sha256` is of `diff`'s bytes; empty when nothing changes."""

    sha256: str
    files: tuple[str, ...]
    additions: int
    deletions: int
    diff: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class TurnRequest:
    """One prompt to an agent. `history` are the prompts sent before in the same session, oldest first.

    `session` names the session (one per run and plan generation); it is not part of the fixture key, and neither is
    `max_tokens`, what the turn may still take.
    """

    session: str
    agent: str
    schema: Mapping[str, Any]
    prompt: str
    commit: str
    history: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class TurnReply:
    """What the agent answered. `structured` is unvalidated; without it `problem` may tell the model what was wrong.

    Tokens count the whole turn; timings are milliseconds per phase.
    """

    session: str
    structured: Any
    raw_text: str
    tool_calls: tuple[Mapping[str, Any], ...]
    tokens_in: int
    tokens_out: int
    timings: Mapping[str, int]
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the ledger has of a call: its reply, or the name of the error that it ended in, or neither.

    `spent` are the tokens that all turns of the Intent took so far, failed ones and all tries, as far as they were reported.
    """

    reply: TurnReply | None
    error: str | None
    spent: int


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The mark on a sandbox: whose it is. Travels as metadata, so that an orphan can be found and killed."""

    store_id: str
    run_id: str
    task_key: str
    attempt: int
    fence: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a task's output, in order. `kind` is `stdout` or `stderr`."""

    kind: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A named piece of evidence. `kind`: plan_card, diff, junit, stdout, stderr, file or index."""

    name: str
    kind: str
    content: bytes = field(repr=False)
