"""How long E2B may take for an answer, and when its SDK is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds. Every wait for E2B is one of these."""

    create: float = 60.0
    api: float = 20.0  # any other answer of the control plane
    transfer: float = 120.0  # one file, in or out
    tool: float = 120.0  # one command of ours in the box
    probe: float = 10.0  # between two looks at the box while the task's command runs, and for each look
    busy: float = 60.0  # how long 429, 503 and refused connections are waited out while a box is made
    grace: float = 5.0  # for a command to end after it was killed
    sweeps: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 60.0)  # looks for a box whose creation was not answered


def load() -> None:
    """Imports the SDK, in the calling thread: it takes 0.9 s and more, in which the loop would answer nobody."""
    import e2b
    import e2b.api.client_async  # noqa: F401
