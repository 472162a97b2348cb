"""Law 6: a task's identity is the hash of exactly what is asked of the sandbox."""

from __future__ import annotations

from controller.core.contract import SBXReq
from controller.core.digest import sha256_json


def task_key(request: SBXReq) -> str:
    """sha256 of the RFC 8785 form of the request: 64 hex digits.

    The request carries intent, run, step, task and plan generation, so equal commands of two intents, tasks or plans differ.
    """
    return sha256_json(request.model_dump(mode="json", by_alias=True))
