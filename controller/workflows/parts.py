"""The handle through which workflows get their ports. main sets it once, before DBOS is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from controller.core.work import Context
from controller.ports import Admission, AgentServer, Clock, Credentials, SandboxProvider, Workspace, WorkStore
from controller.workflows.compile import TurnLedger
from controller.workflows.room import Room


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything outside.

    `blob` reads by hash through a small cache; `jitter` is in [0, 1), seeded. `fence_off` ends the process at once: a zombie
    must not go on. `credentials` is None where private repositories are not enabled.
    """

    store: WorkStore
    store_id: str
    ledger: Callable[[Context], TurnLedger]
    agent: AgentServer
    workspace: Workspace
    credentials: Credentials | None
    sandboxes: SandboxProvider
    admission: Admission
    clock: Clock
    canceled_runs: Callable[[], frozenset[str]]
    blob: Callable[[str], bytes]
    observe: Callable[[str, str, float], None]
    jitter: Callable[[], float]
    fence_off: Callable[[str], None]
    room: Room = field(default_factory=Room)


class _Registry:
    parts: Parts | None = None


def install(parts: Parts) -> None:
    """Called by main, once per process."""
    _Registry.parts = parts


def parts() -> Parts:
    """The installed ports. Raises RuntimeError before install()."""
    if _Registry.parts is None:
        raise RuntimeError("workflows.parts.install() was not called")
    return _Registry.parts


def generation(workflow_id: str) -> int:
    """n of `<uid>:plan:<n>`, `<uid>:execute:<n>`, `<uid>:finish:<n>`, with or without a repair's `:r<k>`; 1 for `<uid>`."""
    pieces = workflow_id.split(":")
    return int(pieces[2]) if len(pieces) > 2 else 1
