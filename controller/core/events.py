"""Which events a change of status is worth: what `kubectl describe` tells afterwards. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.core.run import Approval


@dataclass(frozen=True, kw_only=True)
class Happening:
    """One event. `key` tells repetitions of a reason apart; the same key is emitted once."""

    reason: str
    message: str
    warning: bool
    key: str


def between(old: Mapping[str, Any], new: Mapping[str, Any], approval: Approval | None) -> list[Happening]:
    """Events for the transition old → new; nothing when the phase and the reason stay."""
    phase, reason = new.get("phase"), str(new.get("reason"))
    if (old.get("phase"), old.get("reason")) == (phase, reason):
        return []
    key = f"{new.get('plan', {}).get('digest', '')}/{new.get('observedRetry', 0)}/{phase}"
    found: list[Happening] = []
    if phase == "WaitingInput" and reason == "plan_not_approved":
        plan = new.get("plan", {})
        count = plan.get("taskCount", 0)
        text = f"{count} task{'s' * (count != 1)}, digest {plan.get('digest', '')}: review PlanApproval {plan.get('approvalName', '')}"
        found.append(Happening(reason="PlanReady", message=text, warning=False, key=key))
    if (
        old.get("phase") == "WaitingInput"
        and phase in ("Running", "Succeeded", "Failed", "RetriesExceeded")
        and approval is not None
    ):
        for vote in approval.votes:
            if vote.verdict != "Approve":  # it came after the quorum was consumed, and before anybody could know
                continue
            text = f"{vote.approver} approved {approval.digest}"
            found.append(Happening(reason="ApprovedBy", message=text, warning=False, key=f"{key}/{vote.approver}"))
    for failure in new.get("failures", ()) if phase in ("Failed", "RetriesExceeded") else ():
        text = f"task {failure['task']}: {failure['errCode']}: {failure['message']}"
        found.append(Happening(reason="TaskFailed", message=text, warning=True, key=f"{key}/{failure['task']}"))
    found += _end(str(phase), reason, new, key)
    return found


_ENDS = {
    "Succeeded": ("Succeeded", False),
    "Failed": ("Failed", True),
    "RetriesExceeded": ("Failed", True),
    "Rejected": ("Rejected", True),
    "Expired": ("Expired", True),
    "Canceled": ("Canceled", False),
}
_ALARMS = ("IdentityNotEnforced", "ApprovalTampered", "StoreBehind", "InvalidSpec")


def _end(phase: str, reason: str, new: Mapping[str, Any], key: str) -> list[Happening]:
    said = next((c["message"] for c in new.get("conditions", ()) if c["reason"] == reason and c["message"]), reason)
    if reason in _ALARMS:
        return [Happening(reason=reason, message=said, warning=True, key=key)]
    if phase in _ENDS:
        name, warning = _ENDS[phase]
        return [Happening(reason=name, message=said, warning=warning, key=key)]
    return []
