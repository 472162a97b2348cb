"""Every Prometheus metric, in one place; low-cardinality labels, never a uid. docs/metrics.md is the reader's list."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

QUEUE_DEPTH = Gauge("sisukodo_queue_depth", "Workflows on a queue.", ["queue", "status"])
QUEUE_OLDEST = Gauge("sisukodo_queue_oldest_seconds", "Age of the oldest workflow that waits on a queue.", ["queue"])
INTENTS = Gauge("sisukodo_intents", "Runs by phase.", ["phase"])
RUN_AGE = Gauge("sisukodo_run_age_seconds", "Time since the least recently changed run of a phase changed.", ["phase"])
STRANDED = Gauge("sisukodo_workflows_stranded", "Queued workflows that no live worker serves.", ["reason"])
SANDBOX_SECONDS = Histogram(
    "sisukodo_sandbox_duration_seconds", "Time in a sandbox.", ["provider", "stage", "outcome"], buckets=_FAST
)
STEP_SECONDS = Histogram("sisukodo_step_duration_seconds", "Time of a stable step.", ["step", "outcome"], buckets=_FAST)
OPENCODE_SECONDS = Histogram(
    "sisukodo_opencode_turn_seconds",
    "Time of a turn of the model, waiting for a free place included.",
    ["outcome"],
    buckets=(0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
)
STATUS_LAG = Histogram(
    "sisukodo_status_lag_seconds", "From a run's change in the database to its Intent's status.", buckets=_FAST
)
WATCH_STALENESS = Gauge("sisukodo_watch_staleness_seconds", "Since the last watch event or resync.", ["kind"])
IDENTITY_ENFORCED = Gauge(
    "sisukodo_approval_identity_enforced", "1 while the live admission policies are the shipped ones, else 0."
)
IDENTITY_ENFORCED.set(float("nan"))  # not known here: only the leader looks, and an alert on 0 must not fire elsewhere
STALLED = Gauge("sisukodo_intents_stalled", "Intents that wait for a person outside the normal course.", ["reason"])
RUNS_ORPHANED = Gauge(
    "sisukodo_runs_orphaned", "Open runs whose Intent is gone, kept because they are too many to be deletions."
)
DATABASE_UP = Gauge("sisukodo_database_up", "1 while PostgreSQL answers the leader, else 0.")
DATABASE_UP.set(float("nan"))
RECONCILE_SECONDS = Histogram("sisukodo_reconcile_duration_seconds", "One reconcile of one Intent.", buckets=_FAST)
RECONCILE_BACKLOG = Gauge("sisukodo_reconcile_backlog", "Intents that are being reconciled or wait for it.")
RESYNC_SECONDS = Histogram(
    "sisukodo_resync_duration_seconds",
    "Listing everything, from the first page to the last look queued.",
    buckets=_FAST,
)
FENCE_REJECTIONS = Counter(
    "sisukodo_fence_rejections_total", "Outcomes refused because a newer attempt owned the task."
)
SANDBOXES = Gauge("sisukodo_sandboxes", "Sandboxes of this store that the provider has.", ["provider", "state"])
ORPHANS = Counter("sisukodo_sandbox_orphans_reaped_total", "Sandboxes killed because nobody waited for them.")
BUILD_INFO = Gauge("sisukodo_build_info", "Always 1; the labels say what runs.", ["version", "app_version", "role"])


def names() -> set[str]:
    """Every metric family that we declare, for the documentation's test."""
    return {m.name for m in REGISTRY.collect() if m.name.startswith("sisukodo_")}
