"""Credentials in memory: Secrets are a dictionary, the rule where they may be sent is the real one. Counts who asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.core import binding
from controller.core.errors import InvalidIntent


@dataclass(frozen=True, kw_only=True)
class MemorySecret:
    """A basic-auth Secret that may be read."""

    token: str
    annotation: str | None


@dataclass(kw_only=True)
class MemoryCredentials:
    """`secrets` by (namespace, name). `asked` keeps every question, in order."""

    secrets: dict[tuple[str, str], MemorySecret] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def git(self, namespace: str, name: str, url: str) -> str:
        self.asked.append((namespace, name, url))
        secret = self.secrets.get((namespace, name))
        if secret is None:
            raise InvalidIntent(binding.FIELD, f"Secret {namespace}/{name}: there is none")
        if (reason := binding.refusal(secret.annotation, url)) is not None:
            raise InvalidIntent(binding.FIELD, f"Secret {namespace}/{name}: {reason}")
        return secret.token
