"""Law 7, decide on bytes: the canonical form, the execution record, and its digest.

The record holds big things by their sha256 (inputs, snapshot, patch), so that it can be rebuilt from a PlanApproval alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import rfc8785

RECORD_VERSION = 1
COMPILER_VERSION = "1"


def canonical(value: Any) -> bytes:
    """RFC 8785 (JCS) bytes of a JSON value. Raises ValueError for what JSON cannot carry exactly."""
    return rfc8785.dumps(value)


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of the canonical form."""
    return sha256(canonical(value))


def plan_digest(record: Mapping[str, Any]) -> str:
    """What people approve: `sha256:<64 hex>` of the record's canonical form."""
    return f"sha256:{sha256_json(dict(record))}"


def run_id(intent_id: str) -> str:
    """One run for the Intent's life; derived, so that nobody has to look it up."""
    return f"run-{sha256(intent_id.encode())[:32]}"


def approval_name(intent_name: str, digest: str) -> str:
    """`<intent>-<digest16>`."""
    return f"{intent_name}-{digest.removeprefix('sha256:')[:16]}"


def execution_record(
    *, goal: str, tasks: Sequence[Mapping[str, Any]], patch_sha256: str, execution: Mapping[str, Any]
) -> dict[str, Any]:
    """The record that is stored, hashed, approved and executed. `execution` is spec.plan.execution of a PlanApproval."""
    return {
        "version": RECORD_VERSION,
        "goal": goal,
        "tasks": [task_record(task) for task in tasks],
        "patchSha256": patch_sha256,
        "execution": dict(execution),
    }


def task_record(task: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a task, spelled out, so that a default written by somebody else cannot change the digest."""
    return {
        "id": task["id"],
        "title": task["title"],
        "command": task["command"],
        "timeoutSeconds": task["timeoutSeconds"],
        "dependsOn": list(task.get("dependsOn", ())),
    }


def record_of_approval(plan: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record as a PlanApproval's `spec.plan` states it. `tasks` are the inline or the spilled ones."""
    return execution_record(
        goal=plan["goal"], tasks=tasks, patch_sha256=plan["patch"]["sha256"], execution=plan["execution"]
    )
