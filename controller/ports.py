"""The seams: what the workflows and the control loop need from the outside world, as Protocols. Nothing here does I/O.

Each port has one contract suite in tests/ that runs against every implementation, the in-memory one included.
RunStore is the control loop's view of the database, WorkStore the workflows'; one transaction per method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from controller.core.contract import Edit, SBXReq, SBXRes
from controller.core.model import Artifact, Chunk, GitSource, Owner, Patch, Snapshot, TurnReply, TurnRequest
from controller.core.run import Intent, Run, Vote
from controller.core.settings import Settings
from controller.core.work import Attempt, Context, Execution, Outcome, TaskResult


class Clock(Protocol):
    """Wall time, injected so that core and workflows stay deterministic."""

    def now(self) -> datetime:
        """Current time, timezone-aware, UTC."""

    def monotonic(self) -> float:
        """Seconds that only grow."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class LeaseStore(Protocol):
    """Who is alive, and what the dead left behind. Times are the database's."""

    def take(self, executor: str, *, ttl: float) -> None:
        """Begin this process incarnation's lease."""

    def renew(self, executor: str, *, ttl: float) -> bool:
        """Go on with it. False: it had run out, so that somebody else may be doing its work already."""

    def release(self, executor: str) -> None:
        """Give the lease up: peers may take the work over at once."""

    def sweep(self, recover: Callable[[Sequence[str]], None]) -> Mapping[str, int]:
        """Hand dead executors' work to `recover` and repair what ended without an outcome.

        One sweeper at a time. Returns what it had to do, by kind; empty when another process is sweeping.
        """

    def live_attempts(self, fences: Sequence[int]) -> frozenset[int]:
        """Those of them whose attempt has not ended and whose executor lives."""


def never() -> bool:
    """Not canceled."""
    return False


class AgentServer(Protocol):
    """OpenCode, or a recording of it. Never falls back to anything."""

    @property
    def mode(self) -> str:
        """`live`, `record` or `replay`."""

    def turn(self, request: TurnRequest, *, canceled: Callable[[], bool] = never) -> TurnReply:
        """Send one prompt and wait for its answer. `canceled` is asked at least once a second and ends the turn with Permanent.

        Raises TurnStalled or ContextOverflow when less should be asked for, Unavailable when later, FixtureMissing or Permanent
        when asking again is no use.
        """

    def end_session(self, session: str) -> None:
        """Forget a session; unknown ones are fine."""


class Workspace(Protocol):
    """Git repositories, read by commit through git objects only: links are never followed, nothing in a repository is run.

    `source=None` means an Intent without a repository: an empty tree at a fixed commit.
    """

    def resolve(self, source: GitSource | None) -> str:
        """The commit (40 hex digits) that the source's ref names now; fetches what is needed. Raises WorkspaceRefused, Unavailable."""

    def snapshot(self, source: GitSource | None, commit: str) -> Snapshot:
        """The commit's tree as a deterministic tar archive. Raises WorkspaceRefused when it is over the size cap."""

    def map(self, source: GitSource | None, commit: str, *, max_bytes: int) -> str:
        """One line per file (path and size), cut at max_bytes with a visible mark."""

    def read(self, source: GitSource | None, commit: str, path: str, *, max_bytes: int) -> str:
        """A plain file's text, cut at max_bytes with a visible mark. Raises WorkspaceRefused for anything else."""

    def search(self, source: GitSource | None, commit: str, pattern: str, *, max_bytes: int) -> str:
        """`path:line:text` matches of an extended regular expression, bounded in bytes and seconds. Raises WorkspaceRefused."""

    def diff(self, source: GitSource | None, commit: str, edits: Sequence[Edit]) -> Patch:
        """The edits as a diff made by git, checked to apply to the commit. Raises InvalidPlan or WorkspaceRefused naming the edit."""


class Credentials(Protocol):
    """What opens private repositories. Asked whenever git is about to talk to one, so that a rotated or revoked Secret counts."""

    def git(self, namespace: str, name: str, url: str) -> str:
        """`user:password` from the Secret of this namespace, for this URL alone. Never kept, logged or shown.

        Raises InvalidIntent, saying what would be right, where the Secret is missing, may not be read, is of another type, or
        does not say itself that it may be sent to this URL; Unavailable when later.
        """


class Admission(Protocol):
    """What a sandbox provider lets us do at once. Asked before each create, by all workers."""

    def wait(self, fence: int) -> float:
        """Seconds until this attempt may ask again; 0: it may create its sandbox now, and counts until it has ended."""


class SandboxProvider(Protocol):
    """Runs one task in a fresh sandbox. Creating one is not idempotent anywhere: the caller journals before and fences after."""

    @property
    def name(self) -> str:
        """`local`, `mock`, `e2b` or `kubernetes`."""

    def resolve(self, template: str) -> str:
        """The template as an immutable reference (image digest, build id, toolchain hash). Raises InvalidIntent when unknown."""

    def check(self, request: SBXReq) -> object:
        """Raises InvalidIntent for what cannot be run here as it is meant. Asks nobody; what it returns is the provider's own."""

    def run(
        self,
        request: SBXReq,
        *,
        owner: Owner,
        files: Mapping[str, bytes],
        emit: Callable[[Chunk], None],
        canceled: Callable[[], bool],
    ) -> tuple[SBXRes, Sequence[Artifact]]:
        """Create, upload, run, collect, kill. `files` maps each filesIn sha256 to its bytes.

        `emit` gets output as it comes; `canceled` is asked at least once a second and ends the task with CANCELED.
        Never raises for what a task does or for failing infrastructure: that is `err_code`. Artifacts are what the task
        left in $SISU_OUTPUT_DIR (kind `junit` for junit.xml, else `file`), capped in number and size.
        """

    def kill(self, owner: Owner) -> int:
        """Kill the sandboxes that carry this owner's fence; how many there were. Safe to repeat."""

    def owned(self, store_id: str) -> Sequence[Owner]:
        """Every live sandbox of this store, wherever it was started from, all pages."""


class RunStore(Protocol):
    """What the control loop reads and decides. Every decision is a compare-and-set: False means somebody else moved first."""

    def store_id(self) -> str:
        """Which store this is (law 10)."""

    def run(self, intent_id: str) -> Run | None:
        """The Intent's run with its task counts, or None when it never started here."""

    def start(self, intent: Intent, settings: Settings, *, requested_by: str) -> None:
        """Rows and `RunIntentWF <uid>` in one transaction; repeating it changes nothing."""

    def patch(self, run: Run) -> bytes:
        """The stored diff of the run's plan, verified by its hash."""

    def record_approval_object(self, run: Run, *, name: str, uid: str) -> bool:
        """Votes count only on the object with this UID."""

    def approve(self, run: Run, votes: Sequence[Vote]) -> bool:
        """Consume a quorum: decisions, the run, and `ExecutePlanWF <uid>:execute:<n>` in one transaction."""

    def reject(self, run: Run, votes: Sequence[Vote]) -> bool:
        """One Reject of exactly this plan ends the run."""

    def expire(self, run: Run) -> bool:
        """End the run if its deadline has passed on the database's clock."""

    def cancel(self, run: Run, *, reason: str) -> bool:
        """Stop it, at once when nothing runs, else as soon as the last sandbox is gone."""

    def adjust(self, run: Run, *, partition: str, priority: int) -> bool:
        """Take over a changed partition (until tasks exist) and priority."""

    def retry(self, run: Run, *, count: int) -> bool:
        """Carry out spec.retry (DESIGN 3.3)."""

    def open_runs(self) -> Sequence[Mapping[str, Any]]:
        """Runs that are not terminal: {intent_id, namespace, name, status, stage}."""

    def progress(self) -> Mapping[str, str]:
        """Per Intent whose run is at work a mark that changes with its stage, last step, tokens, and when a task begins or ends."""

    def overdue(self) -> Sequence[str]:
        """Intents whose approval deadline has passed."""


class WorkStore(Protocol):
    """What the workflows read and record. Every write is idempotent by a unique key or a compare-and-set."""

    def context(self, intent_id: str) -> Context | None:
        """The run and the frozen request."""

    def context_of_run(self, run_id: str) -> Context | None:
        """The same, by run."""

    def start_plan(self, ctx: Context) -> bool:
        """queued | repairing → running. False: canceled, or another plan generation."""

    def steps(self, run_id: str, attempt: int) -> Mapping[str, Mapping[str, Any]]:
        """The committed outputs of one plan generation, by step."""

    def save_step(
        self,
        run_id: str,
        step_id: str,
        attempt: int,
        *,
        output: Mapping[str, Any],
        artifacts: Sequence[Artifact],
        commit: str | None,
    ) -> Mapping[str, Any]:
        """Commit output and artifacts; what is in the table afterwards. Raises Drift when it holds another output."""

    def put_blob(self, content: bytes) -> str:
        """Store by hash; the sha256."""

    def blob(self, sha256: str) -> bytes:
        """Content by hash, verified. Raises DigestMismatch when it is missing or altered."""

    def check_blobs(self, shas: Sequence[str]) -> None:
        """Read and verify them. Raises DigestMismatch when one is missing or altered."""

    def planned(
        self,
        ctx: Context,
        *,
        plan: Mapping[str, Any],
        record: Mapping[str, Any],
        digest: str,
        patch_sha256: str,
        approval_name: str,
    ) -> bool:
        """running → waiting_input."""

    def fail_plan(self, ctx: Context, *, reason: str, error: str) -> bool:
        """No plan could be made."""

    def close_canceled(self, run_id: str) -> bool:
        """canceling → canceled, when nothing runs any more."""

    def begin_execution(self, execution: Execution) -> bool:
        """Rows of all tasks and the first window of TaskWF, in one transaction. False: not ours to begin (any more)."""

    def approved_votes(self, run_id: str, digest: str) -> int:
        """Recorded approvals of exactly this digest."""

    def refuse_execution(self, ctx: Context, *, error: str) -> bool:
        """The stored bytes are not the approved bytes."""

    def begin_attempt(self, run_id: str, workflow_id: str, *, failed: int | None = None) -> Attempt:
        """Journal the intention to create a sandbox, under a new fence.

        The attempt before it, if any, was ended by an infrastructure error when its fence is `failed`, else by its worker's death.
        """

    def note_alone(self, attempt: Attempt) -> None:
        """No other task runs beside this attempt: should its worker die now, then under this task only."""

    def record_outcome(self, attempt: Attempt, outcome: Outcome, *, workflow_id: str, carry: bool) -> Attempt | None:
        """The outcome and what follows, in one transaction; None: fenced off. The next attempt, if one was begun for us."""

    def add_chunks(self, attempt: Attempt, chunks: Sequence[Chunk], *, base: int) -> None:
        """Append output to the stream; a superseded attempt's is dropped."""

    def held(self, workflow_id: str) -> Sequence[Attempt]:
        """Journaled attempts of this workflow's task that may have left a sandbox: no outcome was accepted since."""

    def abandon(self, workflow_id: str) -> None:
        """A canceling run: the task ends without an outcome."""

    def canceling(self) -> frozenset[str]:
        """Runs that are being canceled, at most a second old."""

    def results(self, run_id: str, generation: int) -> Sequence[TaskResult]:
        """All tasks in task order."""

    def finish(
        self, ctx: Context, *, execution_no: int, event: str, reason: str, error: str | None, result: Mapping[str, Any]
    ) -> bool:
        """Close the execution."""
