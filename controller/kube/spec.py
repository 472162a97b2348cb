"""Is this Intent's spec something that can be carried out? The rules that neither the CRD nor admission can state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from controller.core import binding
from controller.core.digest import canonical
from controller.core.errors import InvalidIntent
from controller.core.settings import Policy, Settings, effective
from controller.core.storable import deeper_than
from controller.core.visible import first_hidden
from controller.kube.crd import MAX_FREE_JSON_BYTES, IntentSpec

MAX_GOAL_BYTES = 8 * 1024
MAX_DEPTH = 32


def check(
    spec: Mapping[str, Any], *, namespace: str, policy: Policy, allow_loopback_http: bool, private_repositories: bool
) -> Settings:
    """The run's effective settings. Raises InvalidIntent naming the field and what would be right."""
    _not_too_deep(spec)
    try:
        IntentSpec.model_validate(dict(spec))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise InvalidIntent(".".join(["spec", *map(str, first["loc"])]), str(first["msg"])) from e
    if (mark := first_hidden(str(spec["goal"]))) is not None:
        raise InvalidIntent("spec.goal", f"holds the hidden character {mark}; whoever approves must see what was asked")
    if (size := len(str(spec["goal"]).encode())) > MAX_GOAL_BYTES:
        raise InvalidIntent("spec.goal", f"{size} bytes; at most {MAX_GOAL_BYTES} are possible")
    if "\0" in str(spec.get("requestedBy", "")):
        raise InvalidIntent("spec.requestedBy", "holds a NUL")
    for field in ("inputs", "constraints"):
        _storable(f"spec.{field}", spec.get(field, {}))
        size = len(json.dumps(spec.get(field, {}), ensure_ascii=False).encode())
        if size > MAX_FREE_JSON_BYTES:
            raise InvalidIntent(f"spec.{field}", f"{size} bytes of JSON; at most {MAX_FREE_JSON_BYTES} are possible")
    _repository((spec.get("workspace") or {}).get("git") or {}, allow_loopback_http, private_repositories)
    return effective(spec, namespace=namespace, policy=policy)


def _repository(git: Mapping[str, Any], allow_loopback_http: bool, private: bool) -> None:
    if git.get("secretRef") and not private:
        raise InvalidIntent(binding.FIELD, binding.NOT_ENABLED)
    if str(git.get("url", "https:")).startswith("http:") and not allow_loopback_http:
        raise InvalidIntent(
            "spec.workspace.git.url", "must be https://; http to loopback is a development setting of the controller"
        )
    if git.get("secretRef"):
        try:
            binding.place(str(git["url"]))
        except ValueError as e:
            raise InvalidIntent("spec.workspace.git.url", f"credentials are not sent there: {e}") from e


def _not_too_deep(spec: Mapping[str, Any]) -> None:
    """First of all: the API server takes 10,000 levels, and whatever walks them recursively would end for everybody."""
    for field in ("inputs", "constraints"):
        if deeper_than(MAX_DEPTH, spec.get(field)):
            raise InvalidIntent(f"spec.{field}", f"is nested more than {MAX_DEPTH} levels deep")


def _storable(field: str, value: Any) -> None:
    try:
        text = canonical(value)
    except ValueError as e:
        raise InvalidIntent(
            field, f"{e}; numbers must be exact in JSON (whole ones up to 2^53), text must be valid Unicode"
        ) from e
    if b"\\u0000" in text:
        raise InvalidIntent(field, "holds a NUL, which no database can carry")
