"""The namespace policy of the release: a file that the chart mounts read-only. Its hash is part of every plan's digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controller.core.errors import Permanent
from controller.core.settings import DEFAULT_RECIPE, RUN_ALL, Policy, Recipe

M = TypeVar("M", bound=BaseModel)
Cap = Annotated[int, Field(ge=1)] | None


class _Recipe(BaseModel):
    """One of the file's `recipes`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    onFailure: Literal["RunAll", "FailFast"]
    maxTasks: Cap = None
    parallelism: Cap = None
    timeoutSeconds: Cap = None
    maxSandboxMinutes: Cap = None


class _Rules(BaseModel):
    """One namespace's policy in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    required: Annotated[int, Field(ge=1, le=8)]
    allowRequester: bool
    templates: Annotated[list[str], Field(min_length=1)]
    egress: Annotated[list[str], Field(min_length=1)]
    maxPriority: int
    recipes: Annotated[list[str], Field(min_length=1)]
    maxExecutions: Annotated[int, Field(ge=1, le=100)]


class Policies:
    """Read once; a changed ConfigMap takes effect with the Deployment's roll-out."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            document = yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as e:
            raise Permanent(f"POLICY_FILE {path}: {e}") from e
        self._sha256 = hashlib.sha256(text.encode()).hexdigest()
        if document is None:
            document = {}
        if not isinstance(document, dict):
            raise Permanent(f"POLICY_FILE {path}: must hold `recipes:`, `default:` and `namespaces:`")
        recipes = document.get("recipes") or {DEFAULT_RECIPE: {"onFailure": RUN_ALL}}
        self._recipes = {name: _recipe(name, rules) for name, rules in recipes.items()}
        self._default: dict[str, Any] = document.get("default") or {}
        self._namespaces: dict[str, dict[str, Any]] = document.get("namespaces") or {}
        for namespace in ("", *self._namespaces):
            self.of(namespace)

    def of(self, namespace: str) -> Policy:
        """The policy of one namespace: its own fields over the default's. Raises Permanent naming a bad field."""
        merged = {**self._default, **(self._namespaces.get(namespace) or {})}
        rules = _validated(_Rules, merged, namespace or "default")
        if unknown := set(rules.recipes) - set(self._recipes):
            known = ", ".join(sorted(self._recipes)) or "none"
            raise Permanent(
                f"POLICY_FILE: {namespace or 'default'}.recipes: {', '.join(sorted(unknown))}: not among `recipes:` ({known})"
            )
        return Policy(
            required=rules.required,
            allow_requester=rules.allowRequester,
            templates=tuple(rules.templates),
            egress=tuple(rules.egress),
            max_priority=rules.maxPriority,
            recipes={name: self._recipes[name] for name in rules.recipes},
            max_executions=rules.maxExecutions,
            sha256=self._sha256,
        )


def _validated(model: type[M], value: Any, where: str) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise Permanent(f"POLICY_FILE: {'.'.join(map(str, (where, *first['loc'])))}: {first['msg']}") from e


def _recipe(name: str, rules: Any) -> Recipe:
    one = _validated(_Recipe, rules, f"recipes.{name}")
    return Recipe(
        on_failure=one.onFailure,
        max_tasks=one.maxTasks,
        parallelism=one.parallelism,
        timeout_seconds=one.timeoutSeconds,
        max_sandbox_minutes=one.maxSandboxMinutes,
    )
