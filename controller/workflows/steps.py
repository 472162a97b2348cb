"""The stable steps before approval: CompileST, ApplyPatchST, DecideST. No side effect beyond the database and the git cache.

Each commits its output in app.run_steps before it returns (run_tracked_step); a repeated step finds its row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.core import binding
from controller.core import digest as digests
from controller.core.approval import PART_BYTES
from controller.core.contract import PlanOutput
from controller.core.errors import InvalidIntent, InvalidPlan
from controller.core.model import Artifact, GitSource, Patch, TurnReply, TurnRequest
from controller.core.prompt import PROMPT_VERSION
from controller.core.visible import visible
from controller.core.work import Context
from controller.ports import never
from controller.workflows.compile import Bounds, Brief, Compiled, compile_plan, repair_plan
from controller.workflows.execute import requests
from controller.workflows.parts import Parts

log = logging.getLogger(__name__)


Outputs = Mapping[str, Mapping[str, Any]]  # committed outputs of this plan generation, by step


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a step's action returns."""

    output: Mapping[str, Any]
    artifacts: Sequence[Artifact] = ()
    commit: str | None = None


def run_tracked_step(
    me: Parts, ctx: Context, known: Outputs, step_id: str, action: Callable[[], Tracked]
) -> Mapping[str, Any]:
    """The committed output of this step and plan generation; runs `action` only where there is none in `known`."""
    if step_id in known:
        return known[step_id]
    started = me.clock.monotonic()
    done = action()
    kept = me.store.save_step(
        ctx.run_id, step_id, ctx.plan_no, output=done.output, artifacts=done.artifacts, commit=done.commit
    )
    me.observe(f"step:{step_id}", "ok", me.clock.monotonic() - started)
    return kept


def compile_st(me: Parts, ctx: Context, known: Outputs) -> Mapping[str, Any]:
    """Resolve the commit, keep its snapshot, and have OpenCode compile the plan."""

    def action() -> Tracked:
        source = git_source(me, ctx)
        commit = me.workspace.resolve(source)
        snapshot = me.workspace.snapshot(source, commit)
        me.store.put_blob(snapshot.archive)
        compiled = compile_plan(
            brief(ctx, commit, source),
            agent=_Canceling(me, ctx),
            workspace=me.workspace,
            ledger=me.ledger(ctx),
            session=session(ctx, "compile"),
            bounds=Bounds(max_tokens=ctx.settings.max_tokens),
        )
        plan = plain(compiled.plan)
        output = {"commit": commit, "snapshotSha256": snapshot.sha256, "plan": plan, "tokens": compiled.tokens}
        card = Artifact(name="plan.json", kind="plan_card", content=json.dumps(plan, indent=1).encode())
        return Tracked(output=output, artifacts=[card], commit=commit)

    return run_tracked_step(me, ctx, known, "CompileST", action)


def apply_patch_st(me: Parts, ctx: Context, known: Outputs, compiled: Mapping[str, Any]) -> Mapping[str, Any]:
    """Have git make the diff of the plan's edits; ask the model once more when an edit does not apply."""
    commit = str(compiled["commit"])
    plan = PlanOutput.model_validate(compiled["plan"])

    def action() -> Tracked:
        final, patch = _patched(me, ctx, commit, plan)
        if (size := len(visible(patch.diff.decode("utf-8", "replace")).encode())) > PART_BYTES:
            raise InvalidPlan(f"the diff takes {size} bytes; at most {PART_BYTES} can be shown to whoever approves it")
        output = {
            "patchSha256": patch.sha256,
            "files": list(patch.files),
            "additions": patch.additions,
            "deletions": patch.deletions,
            "plan": plain(final),
        }
        artifacts = [Artifact(name="patch.diff", kind="diff", content=patch.diff)]
        if final != plan:
            artifacts.append(
                Artifact(name="plan.json", kind="plan_card", content=json.dumps(plain(final), indent=1).encode())
            )
        return Tracked(output=output, artifacts=artifacts)

    return run_tracked_step(me, ctx, known, "ApplyPatchST", action)


def _patched(me: Parts, ctx: Context, commit: str, plan: PlanOutput) -> tuple[PlanOutput, Patch]:
    source = git_source(me, ctx)
    try:
        return plan, me.workspace.diff(source, commit, plan.edits)
    except InvalidPlan as e:
        log.info("edits do not apply", extra={"run": ctx.run_id, "error": str(e)})
        again: Compiled = repair_plan(
            brief(ctx, commit, source),
            failed=plan,
            error=str(e),
            agent=_Canceling(me, ctx),
            workspace=me.workspace,
            ledger=me.ledger(ctx),
            session=session(ctx, "repair"),
            bounds=Bounds(max_tokens=ctx.settings.max_tokens),
        )
        return again.plan, me.workspace.diff(source, commit, again.plan.edits)


class _Canceling:
    """The AgentServer for one run: its turns end when the run is canceled."""

    def __init__(self, me: Parts, ctx: Context) -> None:
        self._me, self._ctx = me, ctx
        self.mode = me.agent.mode
        self.end_session = me.agent.end_session

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        """See ports.AgentServer."""
        return self._me.agent.turn(request, canceled=lambda: canceled() or self._ctx.run_id in self._me.canceled_runs())


def decide_st(me: Parts, ctx: Context, known: Outputs, compiled: Mapping[str, Any], patched: Mapping[str, Any]) -> bool:
    """Bind everything that will run into one digest, and stop: `plan_not_approved`. False: somebody moved the run on first."""

    def action() -> Tracked:
        plan = bounded(PlanOutput.model_validate(patched["plan"]), ctx)
        record = digests.execution_record(
            goal=ctx.goal,
            tasks=plan["tasks"],
            patch_sha256=str(patched["patchSha256"]),
            execution=execution(me, ctx, compiled),
        )
        for task in requests(ctx, record):  # nobody should approve what cannot be run
            me.sandboxes.check(task.request)
        digest = digests.plan_digest(record)
        output = {"decision": "plan_not_approved", "digest": digest, "record": record, "plan": plan}
        return Tracked(output=output)

    decided = run_tracked_step(me, ctx, known, "DecideST", action)
    return me.store.planned(
        ctx,
        plan={**decided["plan"], "patch": {k: patched[k] for k in ("files", "additions", "deletions")}},
        record=decided["record"],
        digest=decided["digest"],
        patch_sha256=str(patched["patchSha256"]),
        approval_name=digests.approval_name(ctx.intent_name, decided["digest"]),
    )


def execution(me: Parts, ctx: Context, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """`spec.plan.execution` of the PlanApproval: what the tasks run on and within."""
    s = ctx.settings
    return {
        "commit": compiled["commit"],
        "snapshotSha256": compiled["snapshotSha256"],
        "inputsSha256": digests.sha256_json(ctx.inputs),
        "constraintsSha256": digests.sha256_json(ctx.constraints),
        "template": me.sandboxes.resolve(s.template),
        "egress": {"mode": s.egress_mode, "allow": list(s.egress_allow)},
        "limits": {
            "cpuMillis": s.cpu_millis,
            "memoryMb": s.memory_mb,
            "pids": 256,
            "diskMb": 1024,
            "parallelism": s.parallelism,
            "maxSandboxMinutes": s.max_sandbox_minutes,
            "timeoutSeconds": s.timeout_seconds,
        },
        "onFailure": s.on_failure,
        "secrets": [name] if (name := secret_name(ctx)) else [],
        "policySha256": s.policy_sha256,
        "compilerVersion": digests.COMPILER_VERSION,
        "promptVersion": PROMPT_VERSION,
        "generation": ctx.plan_no,
    }


def bounded(plan: PlanOutput, ctx: Context) -> dict[str, Any]:
    """The plan as JSON, each task's time cut to the Intent's ceiling."""
    value = plain(plan)
    for task in value["tasks"]:
        task["timeoutSeconds"] = min(task["timeoutSeconds"], ctx.settings.task_timeout_seconds)
    return value


def plain(plan: PlanOutput) -> dict[str, Any]:
    """camelCase JSON."""
    return plan.model_dump(mode="json", by_alias=True)


def git_source(me: Parts, ctx: Context) -> GitSource | None:
    """Where the repository is; None for an Intent without one. Reads the Secret: once for each step that runs, and keeps it nowhere.

    Also where git has everything already: who lost the right to a repository gets no plan from a clone of it.
    """
    if ctx.workspace is None:
        return None
    url, token = ctx.workspace["url"], None
    if (name := secret_name(ctx)) is not None:
        if me.credentials is None:
            raise InvalidIntent(binding.FIELD, binding.NOT_ENABLED)
        token = me.credentials.git(ctx.namespace, name, url)
    return GitSource(url=url, ref=ctx.workspace.get("ref", "HEAD"), token=token)


def secret_name(ctx: Context) -> str | None:
    """The Secret that opens the repository, in the Intent's namespace."""
    ref = (ctx.workspace or {}).get("secretRef")
    return str(ref["name"]) if ref else None


def brief(ctx: Context, commit: str, source: GitSource | None) -> Brief:
    """What the model is asked."""
    return Brief(
        goal=ctx.goal,
        inputs=ctx.inputs,
        constraints=ctx.constraints,
        source=source,
        commit=commit,
        max_tasks=ctx.settings.max_tasks,
        feedback=ctx.feedback,
    )


def session(ctx: Context, purpose: str) -> str:
    """One OpenCode session per run, plan generation and purpose."""
    return f"{ctx.run_id}:{ctx.plan_no}:{purpose}"
