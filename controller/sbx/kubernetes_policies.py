"""The NetworkPolicies that a Pod's egress label relies on: as shipped (policies/egress.yaml) against the live ones. Fails closed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("policies") / "egress.yaml"


@cache
def shipped() -> Mapping[str, Mapping[str, Any]]:
    """By name."""
    return {one["metadata"]["name"]: one for one in yaml.safe_load_all(FILE.read_text(encoding="utf-8"))}


def policy_of(label: str) -> str:
    """The name of the policy that holds Pods with this egress label."""
    return f"sisu-kodo-egress-{label}"


def complaint(name: str, live: Mapping[str, Any] | None) -> str | None:
    """What is wrong with the live one, or None."""
    if live is None:
        return f"NetworkPolicy {name} is missing: nothing would hold the task's network; the chart installs it"
    if "deletionTimestamp" in live["metadata"]:
        return f"NetworkPolicy {name} is being deleted"
    if live.get("spec") != shipped()[name]["spec"]:
        return f"NetworkPolicy {name} is not the shipped one; the chart installs it"
    return None
