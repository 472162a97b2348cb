"""SIGKILL of the controller at every step. After each restart: one effective outcome, the right status, nothing stuck.

The oracle is outside PostgreSQL: the provider's own log of starts and the worker's log of settled fences are joined with the journal.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.e2e.product import Product

# adapter method, before or after its nth call, whether the person votes before the crash is awaited
EVERY_COMMIT = [
    ("planned", "after", 1, False),
    ("approve", "after", 1, True),
    ("sandboxes.run", "after", 1, True),  # after the effect, before the outcome
    ("record_outcome", "after", 1, True),
]
FULL = [
    ("start", "after", 1, False),
    ("begin_attempt", "after", 1, True),
    ("finish", "after", 1, True),
    ("start_plan", "after", 1, False),
    ("workspace.snapshot", "after", 1, False),
    ("save_step", "before", 1, False),
    ("save_step", "after", 1, False),
    ("save_step", "after", 2, False),
    ("save_step", "after", 3, False),
    ("create_approval", "after", 1, False),
    ("record_approval_object", "after", 1, False),
    ("patch_status", "before", 2, False),
    ("patch_status", "after", 2, False),
    ("approve", "before", 1, True),
    ("begin_execution", "before", 1, True),
    ("begin_execution", "after", 1, True),
    ("sandboxes.run", "before", 1, True),
    ("results", "after", 1, True),
    ("save_step", "after", 4, True),  # ExecuteST is written, the run is not closed
    ("set_finalizer", "after", 2, True),
]
POINTS = [*EVERY_COMMIT, *(pytest.param(*p, marks=pytest.mark.slow) for p in FULL)]


@pytest.mark.parametrize(("method", "when", "nth", "voted"), POINTS, ids=str)
def test_a_kill_at_this_point_changes_nothing_that_counts(
    product: Product, method: str, when: str, nth: int, *, voted: bool
) -> None:
    crashing = product.start_crashing(method, when, nth)
    product.apply("k", "say hello")
    if voted:
        product.wait_phase("k", "WaitingInput")
        product.vote("k")
    product.wait(lambda: not crashing.child.alive(), f"the kill {when} {method} #{nth}")

    product.start(
        program=("-m", "tests.support.crash_main", "none", "after", "1", "/dev/null", str(product.settled_log))
    )
    if not voted:
        product.wait_phase("k", "WaitingInput")
        product.vote("k")
    assert product.wait_phase("k", "Succeeded", "Failed", "Canceled", seconds=40)["phase"] == "Succeeded"
    product.wait(lambda: "finalizers" not in product.intent("k")["metadata"], "the finalizer is gone")
    product.assert_once()
    assert_explained(product)


def assert_explained(product: Product) -> None:
    """Every start is an attempt in the journal, at most one fence per task settled, and that one is the accepted one."""
    journal = {
        int(f): (k, a, s) for f, k, a, s in product.sql("SELECT fence, task_key, attempt, state FROM app.sbx_attempts")
    }
    starts = [line.split() for line in product.start_log.read_text().splitlines()]
    for key, attempt, fence in starts:
        assert journal[int(fence)][:2] == (key, int(attempt)), "a sandbox was started that the journal does not know"
    assert max(Counter(fence for _, _, fence in starts).values()) == 1, "one fence, one start"
    settled = (
        [line.split() for line in product.settled_log.read_text().splitlines()] if product.settled_log.exists() else []
    )
    assert max(Counter(key for key, _, _ in settled).values(), default=0) <= 1, "an outcome was accepted twice"
    done = {k for k, _, s in journal.values() if s == "done"}
    accepted = {k for (k,) in product.sql("SELECT task_key FROM app.sbx_runs WHERE outcomes = 1")}
    assert done == accepted, "what the journal calls done is what was accepted"
    assert {key for key, _, _ in settled} <= accepted
