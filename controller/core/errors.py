"""The one exception tree. Adapters translate into it at their edge, `from e`; workflows and reconcile decide on it.

SisuError
├── Transient            try again later; nothing was decided
│   ├── Unavailable      a daemon, database, API server or sandbox provider did not answer
│   └── TurnStalled      the model fell silent in a turn, which was taken back: ask for less
├── Permanent            record it and stop; trying again gives the same answer
│   ├── InvalidIntent    the Intent asks for something that cannot be: names the field and what would be right
│   ├── InvalidPlan      the model's plan breaks its contract
│   ├── ContextOverflow  a prompt is too long for the model: ask for less
│   ├── FixtureMissing   OC_MODE=replay has no recording of this turn
│   ├── DigestMismatch   stored bytes are not the approved bytes
│   └── WorkspaceRefused the repository or an edit breaks a safety rule (path, link, size, protocol)
└── Conflict             somebody else moved first: re-read
    └── Drift            a unique key exists with other content
"""

from __future__ import annotations


class SisuError(Exception):
    """Root of all errors that this product raises on purpose.

    `tokens`: in and out, as far as they were reported for the model's turn that ended so.
    """

    tokens: tuple[int, int] = (0, 0)


class Transient(SisuError):
    """Try again later; nothing was decided."""


class Unavailable(Transient):
    """A daemon, database, API server or sandbox provider did not answer. `retry_after`: seconds that it asked for."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TurnStalled(Transient):
    """The model fell silent in a turn, which was taken back: ask for less."""


class Permanent(SisuError):
    """Record it and stop; trying again gives the same answer."""


class InvalidIntent(Permanent):
    """The Intent asks for something that cannot be. `field` is its path, such as `spec.workspace.git.url`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class InvalidPlan(Permanent):
    """The model's plan breaks its contract."""


class ContextOverflow(Permanent):
    """A prompt is too long for the model: ask for less."""


class FixtureMissing(Permanent):
    """OC_MODE=replay has no recording of this turn; the message names the key and how to record it."""


class DigestMismatch(Permanent):
    """Stored bytes are not the approved bytes."""


class WorkspaceRefused(Permanent):
    """The repository or an edit breaks a safety rule: path, link, size or protocol."""


class Conflict(SisuError):
    """Somebody else moved first: re-read and decide again."""


class Drift(Conflict):
    """A unique key exists with other content than the one offered."""
