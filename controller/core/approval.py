"""The PlanApproval of a run: its spec, rebuilt byte for byte from the stored plan, and what is wrong with one that differs.

Pure, so that the object people voted on can be compared with what the database holds before a vote counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.core import digest as digests
from controller.core.run import Run
from controller.core.status import stamp
from controller.core.visible import visible

INLINE_BYTES = (
    16 * 1024
)  # tasks and diff each; with the texts, the goal and the file list a PlanApproval stays under 64 KiB
TEXT_BYTES = 12 * 1024  # summary, design, files, risks and tests together, as people see them
FILES_BYTES = 4 * 1024
NAME_CHARACTERS = 1024  # one file's name, as the CRD has it
PART_BYTES = 900 * 1024  # what one ConfigMap takes
TEXTS = ("summary", "design", "files", "risks", "tests")
PART_KEY = "content"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """`spec` of the PlanApproval (without decisions) and the ConfigMaps, by name, that hold what does not fit."""

    spec: Mapping[str, Any]
    parts: Mapping[str, str]


def build(run: Run, *, intent_name: str, diff: bytes) -> Shown:
    """The approval of a waiting run. `diff` is the stored patch."""
    assert (
        run.plan is not None and run.record is not None and run.digest is not None and run.approval_deadline is not None
    )
    name = digests.approval_name(intent_name, run.digest)
    parts: dict[str, str] = {}
    tasks, record = list(run.record["tasks"]), run.record
    plan: dict[str, Any] = {
        "digest": run.digest,
        "goal": record["goal"],
        **{key: _shown(run.plan[key]) for key in TEXTS},
        "taskCount": len(tasks),
        "patch": _patch(run, diff, name, parts),
        "execution": record["execution"],
    }
    listed = digests.canonical(tasks).decode()
    if len(listed.encode()) <= INLINE_BYTES:
        plan["tasks"] = tasks
    else:
        plan["tasksRef"] = _spill(parts, f"{name}-tasks", tasks_text(tasks))
    policy = {
        "required": run.settings.required,
        "allowRequester": run.settings.allow_requester,
        "requestedBy": run.requested_by,
        "expiresAt": stamp(run.approval_deadline),
    }
    return Shown(
        spec={"intent": {"name": intent_name, "uid": run.intent_id}, "plan": plan, "policy": policy}, parts=parts
    )


def _patch(run: Run, diff: bytes, name: str, parts: dict[str, str]) -> dict[str, Any]:
    assert run.plan is not None
    text = visible(diff.decode("utf-8", "replace"))
    patch: dict[str, Any] = {
        "sha256": run.patch_sha256,
        **run.plan["patch"],
        "files": _files(run.plan["patch"]["files"]),
    }
    if len(text.encode()) <= INLINE_BYTES:
        patch["diff"] = text
    else:
        patch["diff"] = (
            text.encode()[:8192].decode("utf-8", "ignore") + "\n[the whole diff is in the ConfigMap of moreRef]\n"
        )
        patch["moreRef"] = _spill(parts, f"{name}-diff", text)
    return patch


def _files(names: Sequence[str]) -> list[str]:
    """As many as fit; the diff has them all."""
    shown: list[str] = []
    left = FILES_BYTES
    for name in map(_name, names):
        left -= len(name.encode()) + 4
        if left < 0:
            return [*shown, f"[and {len(names) - len(shown)} more]"]
        shown.append(name)
    return shown


def _name(path: str) -> str:
    """Spelled out, a name can be ten times as long: the API server would refuse the whole object."""
    name, mark = visible(path), "[cut]"
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - len(mark)] + mark


def text_bytes(plan: Mapping[str, Any]) -> int:
    """How much a plan's texts take when they are shown."""
    return sum(len(json.dumps(_shown(plan[key]), ensure_ascii=False).encode()) for key in TEXTS)


def tasks_text(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Spilled tasks, for people to read."""
    return json.dumps([digests.task_record(task) for task in tasks], indent=1, ensure_ascii=False)


def _spill(parts: dict[str, str], name: str, text: str) -> dict[str, str]:
    parts[name] = text
    return {"name": name, "sha256": digests.sha256(text.encode())}


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else [visible(v) for v in value]


def problem(obj: Mapping[str, Any], expected: Shown, *, parts: Mapping[str, str | None]) -> str | None:
    """Why votes on this object do not count; None when it shows exactly the stored plan. `parts` are the live ConfigMaps."""
    spec = obj["spec"]
    for key in ("intent", "plan", "policy"):
        if digests.canonical(spec.get(key)) != digests.canonical(expected.spec[key]):
            return f"spec.{key} of the PlanApproval is not what was stored"
    for name, text in expected.parts.items():
        if parts.get(name) != text:
            return f"ConfigMap {name} is missing or not what was stored"
    tasks = spec["plan"].get("tasks")
    if tasks is None:
        tasks = json.loads(expected.parts[spec["plan"]["tasksRef"]["name"]])
    if digests.plan_digest(digests.record_of_approval(spec["plan"], tasks)) != spec["plan"]["digest"]:
        return "the digest does not belong to the plan that is shown"
    return None
