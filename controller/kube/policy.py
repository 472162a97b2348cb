"""The namespace policy of the release: a file that the chart mounts read-only. Its hash is part of every plan's digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from controller.core.errors import Permanent
from controller.core.settings import Policy

_FIELDS = {
    "required": int,
    "allowRequester": bool,
    "templates": list,
    "egress": list,
    "maxPriority": int,
    "recipes": list,
    "maxExecutions": int,
}


class Policies:
    """Read once; a changed ConfigMap takes effect with the Deployment's roll-out."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            document = yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as e:
            raise Permanent(f"POLICY_FILE {path}: {e}") from e
        self._sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._default: dict[str, Any] = (document or {}).get("default") or {}
        self._namespaces: dict[str, dict[str, Any]] = (document or {}).get("namespaces") or {}
        for namespace in ("", *self._namespaces):
            self.of(namespace)

    def of(self, namespace: str) -> Policy:
        """The policy of one namespace: its own fields over the default's. Raises Permanent naming a bad field."""
        merged = {**self._default, **(self._namespaces.get(namespace) or {})}
        for name, kind in _FIELDS.items():
            if not isinstance(merged.get(name), kind):
                raise Permanent(
                    f"POLICY_FILE: {namespace or 'default'}.{name} must be a {kind.__name__}, not {merged.get(name)!r}"
                )
        return Policy(
            required=merged["required"],
            allow_requester=merged["allowRequester"],
            templates=tuple(merged["templates"]),
            egress=tuple(merged["egress"]),
            max_priority=merged["maxPriority"],
            recipes=tuple(merged["recipes"]),
            max_executions=merged["maxExecutions"],
            sha256=self._sha256,
        )
