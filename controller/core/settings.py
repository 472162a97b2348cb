"""What an Intent may do in its namespace: the stricter of the request and the namespace's policy, with every default filled in.

The result is stored with the run and goes into the digest; nothing reads the Intent's spec again after the start.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from controller.core.errors import InvalidIntent

DEFAULT_RECIPE = "sandbox-default"
RUN_ALL = "RunAll"
MAX_PARALLELISM = 64  # "unlimited" must be a finite window, or no task can be carried on


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named way to carry an Intent out: what happens after a task failed, and caps (None: none) that no Intent may pass."""

    on_failure: str = RUN_ALL
    max_tasks: int | None = None
    parallelism: int | None = None
    timeout_seconds: int | None = None
    max_sandbox_minutes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The chart's policy for one namespace. `sha256` is of the whole policy file, and goes into the digest."""

    required: int
    allow_requester: bool
    templates: tuple[str, ...]
    egress: tuple[str, ...]
    max_priority: int
    recipes: Mapping[str, Recipe]
    max_executions: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Effective settings of one run. Seconds, MiB and thousandths of a CPU."""

    recipe: str
    partition: str
    priority: int
    template: str
    egress_mode: str
    egress_allow: tuple[str, ...]
    cpu_millis: int
    memory_mb: int
    task_timeout_seconds: int
    max_tasks: int
    parallelism: int
    timeout_seconds: int
    max_tokens: int
    max_sandbox_minutes: int
    required: int
    allow_requester: bool
    expires_after_seconds: int
    max_executions: int
    policy_sha256: str
    on_failure: str = RUN_ALL

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as stored in app.runs.settings."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Settings:
        """The inverse of to_json."""
        return Settings(**{**value, "egress_allow": tuple(value["egress_allow"])})


def effective(spec: Mapping[str, Any], *, namespace: str, policy: Policy) -> Settings:
    """Merge. Raises InvalidIntent naming the first field that the policy does not admit, and what it would admit."""
    sandbox, limits, approval = spec.get("sandbox") or {}, spec.get("limits") or {}, spec.get("approval") or {}
    egress = sandbox.get("egress") or {}
    name = spec.get("recipe", DEFAULT_RECIPE)
    _admit("spec.recipe", name, policy.recipes)
    recipe = policy.recipes[name]
    settings = Settings(
        recipe=name,
        partition=f"{namespace}/{spec.get('queuePartitionKey', '')}",
        priority=spec.get("priority", 0),
        template=sandbox.get("template", "python"),
        egress_mode=egress.get("mode", "None"),
        egress_allow=tuple(egress.get("allow", ())),
        cpu_millis=cpu_millis(str(sandbox.get("cpu", "1"))),
        memory_mb=memory_mb(str(sandbox.get("memory", "512Mi"))),
        task_timeout_seconds=sandbox.get("taskTimeoutSeconds", 300),
        max_tasks=_least(limits.get("maxTasks", 100), recipe.max_tasks),
        parallelism=_least(limits.get("parallelism", 10), recipe.parallelism, MAX_PARALLELISM),
        timeout_seconds=_least(limits.get("timeoutSeconds", 7200), recipe.timeout_seconds),
        max_tokens=limits.get("maxTokens", 500_000),
        max_sandbox_minutes=_least(limits.get("maxSandboxMinutes", 60), recipe.max_sandbox_minutes),
        required=max(approval.get("required", 1), policy.required),
        allow_requester=policy.allow_requester,
        expires_after_seconds=approval.get("expiresAfterSeconds", 259_200),
        max_executions=policy.max_executions,
        policy_sha256=policy.sha256,
        on_failure=recipe.on_failure,
    )
    _admit("spec.sandbox.template", settings.template, policy.templates)
    _admit("spec.sandbox.egress.mode", settings.egress_mode, policy.egress)
    if settings.priority > policy.max_priority:
        raise InvalidIntent(
            "spec.priority", f"{settings.priority} is above this namespace's cap of {policy.max_priority}"
        )
    return settings


def _least(asked: int, *caps: int | None) -> int:
    return min([asked, *(cap for cap in caps if cap is not None)])


def _admit(field: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise InvalidIntent(
            field, f"{value!r} is not allowed in this namespace; its policy allows {', '.join(allowed)}"
        )


def cpu_millis(quantity: str) -> int:
    """Kubernetes CPU quantity in thousandths: `1` is 1000, `250m` is 250."""
    if re.fullmatch(r"[0-9]{1,7}m", quantity):
        return int(quantity[:-1])
    if re.fullmatch(r"[0-9]{1,4}([.][0-9]{1,3})?", quantity):
        return round(float(quantity) * 1000)
    raise InvalidIntent("spec.sandbox.cpu", f"{quantity!r} is not a CPU quantity such as 1 or 250m")


MOST_MEMORY_MB = 2**31 - 1  # int32 in the PlanApproval: with more in it the API server refuses all of it
_UNITS = {"Ki": 1 / 1024, "Mi": 1, "Gi": 1024, "M": 1000 * 1000 / 1048576, "G": 1000**3 / 1048576}


def memory_mb(quantity: str) -> int:
    """Kubernetes memory quantity in MiB: `512Mi` is 512."""
    for unit, factor in _UNITS.items():
        if quantity.endswith(unit) and quantity[: -len(unit)].isdigit():
            value = max(1, int(int(quantity[: -len(unit)]) * factor))
            if value > MOST_MEMORY_MB:
                raise InvalidIntent("spec.sandbox.memory", f"{quantity} is more than any machine has")
            return value
    raise InvalidIntent("spec.sandbox.memory", f"{quantity!r} is not a memory quantity such as 512Mi or 1Gi")
