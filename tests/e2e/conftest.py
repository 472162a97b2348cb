"""The whole program as a process, on the session's cluster: one namespace and one database per test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from devcluster.stack import Stack
from tests.e2e.product import Product

_NUMBERS = itertools.count(1)
# One of each kind runs on every commit; the rest of the [hold] files belongs to `make full`.
SLOW = ("policy", "gitops", "races", "deletion", "bad_input", "store", "quorum", "repository")
FAST = {
    "test_law_8_nothing_executes_when_the_policy_changed_after_the_quorum[audit-only]",
    "test_law_4_applying_the_same_manifest_again_changes_nothing[replace]",
    "test_law_4_rivals_at_one_moment_have_one_outcome[approve-cancel-]",
    "test_law_5_the_controller_refuses_the_rest_and_writes_no_row",
    "test_law_10_another_store_starts_nothing[reset]",
    "test_law_10_votes_of_the_old_store_do_not_count_in_the_new_one",
    "test_law_4_a_late_vote_is_admitted_and_never_counted",
    "test_law_8_a_quorum_of_two_is_two_people[namespace]",
    "test_law_7_bytes_changed_between_approval_and_execution_are_refused[change_record]",
    "test_law_3_a_thousand_tasks_stay_under_64_kib",
    "test_law_13_edits_that_want_out_are_refused_and_what_leads_inside_is_carried",
    "test_law_5_deep_json_ends_nothing_but_its_own_intent[3000]",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep `make test` under 12 minutes."""
    for item in items:
        if any(f"test_hold_{kind}.py" in item.nodeid for kind in SLOW) and item.name not in FAST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def product(cluster: Stack, request: pytest.FixtureRequest) -> Iterator[Product]:
    """A fresh namespace, database and start log. Start a controller with `product.start(...)`; it ends with the test."""
    number = next(_NUMBERS)
    with Product(cluster, name=f"e2e-{number}", title=request.node.name) as one:
        yield one
