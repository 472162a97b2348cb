"""Law 4: approve, reject, cancel, expire and delete at the same moment, and two controllers at once. The first commit wins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from controller.kube.lease import LEASE_SECONDS, RETRY_SECONDS
from tests.e2e.product import APPROVE, REJECT, Product

Act = Callable[[], Any]
ENDS = ("succeeded", "failed", "canceled", "rejected", "expired")
ROUNDS = 3
OF = "JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s"


def together(*acts: Act) -> list[Any]:
    """All at one moment, each in its thread; what they returned."""
    gate = threading.Barrier(len(acts))
    found: list[Any] = [None] * len(acts)

    def run(index: int, act: Act) -> None:
        gate.wait()
        found[index] = act()

    threads = [threading.Thread(target=run, args=(i, act)) for i, act in enumerate(acts)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return found


class Rival:
    """What people do to one Intent; `approval` is known beforehand, because the Intent may go."""

    def __init__(self, product: Product, name: str) -> None:
        self.product, self.name, self.approval = product, name, product.approval_of(name)

    def _kubectl(self, user: str, *args: str) -> Any:
        return self.product.stack.kubectl("-n", self.product.namespace, *args, user=user, check=False)

    def approve(self) -> Any:
        return self._kubectl("alice", "patch", "planapproval", self.approval, "--type=json", "-p", APPROVE)

    def reject(self) -> Any:
        return self._kubectl("admin", "patch", "planapproval", self.approval, "--type=json", "-p", REJECT)

    def cancel(self) -> Any:
        return self._kubectl("carol", "patch", "intent", self.name, "--type=merge", "-p", '{"spec":{"cancel":true}}')

    def delete(self) -> Any:
        return self._kubectl("carol", "delete", "intent", self.name, "--wait=false")


def settled(product: Product, name: str) -> str:
    """How this run ended, by its row; the row stays when the object goes."""

    def ended() -> str | None:
        ((status,),) = product.sql(f"SELECT r.status FROM app.runs r {OF}", name)
        return str(status) if status in ENDS else None

    return product.wait(ended, f"{name} has ended")


def assert_one_outcome(product: Product, name: str, ended: str) -> None:
    """The winner's effect, and none of a loser's."""
    ((attempts,),) = product.sql(
        f"SELECT count(*) FROM app.sbx_attempts a JOIN app.runs r ON r.id = a.run_id {OF}", name
    )
    ((executions,),) = product.sql(f"SELECT r.execution_no FROM app.runs r {OF}", name)
    if ended == "succeeded":
        assert (attempts, executions) == (1, 1)
    elif ended == "canceled":
        assert attempts <= executions <= 1, "a cancel may come after the quorum was consumed"
    else:
        assert (attempts, executions) == (0, 0), f"{ended} plans never run"
    moves = product.sql(f"SELECT t.status FROM app.run_transitions t JOIN app.runs r ON r.id = t.run_id {OF}", name)
    assert [s for (s,) in moves if s in ENDS] == [ended], "it ended once"
    assert product.sql(f"SELECT r.closed <= r.execution_no FROM app.runs r {OF}", name) == [(True,)]


@pytest.mark.parametrize(
    ("rivals", "outcomes"),
    [
        (("approve", "reject"), {"succeeded", "rejected"}),
        (("approve", "cancel"), {"succeeded", "canceled"}),
        (("approve", "delete"), {"succeeded", "canceled"}),
        (("reject", "cancel"), {"rejected", "canceled"}),
        pytest.param(
            ("approve", "reject", "cancel", "delete"), {"succeeded", "rejected", "canceled"}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_law_4_rivals_at_one_moment_have_one_outcome(
    product: Product, rivals: Sequence[str], outcomes: set[str]
) -> None:
    product.start()
    names = [f"r{n}" for n in range(ROUNDS)]
    for name in names:
        product.apply(name, "say hello")
    for name in names:
        product.wait_phase(name, "WaitingInput")
    for name in names:
        one = Rival(product, name)
        answers = together(*(getattr(one, act) for act in rivals))
        ended = settled(product, name)
        assert ended in outcomes
        for answer in answers:
            late = ("takes no more decisions", "NotFound", "the object has been modified")
            assert answer.returncode == 0 or any(says in answer.stderr for says in late), "the loser sees why"
        assert_one_outcome(product, name, ended)
        if ended == "rejected":
            query = "SELECT verdict FROM app.plan_approvals WHERE approval_name = %s AND approver = 'admin@corp'"
            assert product.sql(query, one.approval) == [("Reject",)]
    assert max(product.starts().values(), default=1) == 1
    product.assert_once()


def test_law_4_a_vote_at_the_deadline_is_either_in_time_or_expired(product: Product) -> None:
    product.start()
    product.apply("e", "say hello", approval={"expiresAfterSeconds": 3})
    product.wait_phase("e", "WaitingInput")
    one = Rival(product, "e")
    left = "SELECT extract(epoch FROM approval_deadline - clock_timestamp())::float FROM app.runs"
    time.sleep(max(0.0, product.sql(left)[0][0] - 0.1))
    one.approve()
    ended = settled(product, "e")
    assert ended in ("succeeded", "expired")
    assert_one_outcome(product, "e", ended)
    counted = product.sql("SELECT count(*) FROM app.plan_approvals")
    assert counted == [(1 if ended == "succeeded" else 0,)]
    product.assert_once()


def test_law_4_a_cancel_at_the_finish_never_makes_two_ends(product: Product) -> None:
    product.start()
    names = [f"f{n}" for n in range(ROUNDS)]
    for name in names:
        product.apply(name, "say hello")
    for name in names:
        product.wait_phase(name, "WaitingInput")
        product.vote(name)
        Rival(product, name).cancel()  # kubectl takes about as long as the task
        ended = settled(product, name)
        assert ended in ("succeeded", "canceled")
        assert_one_outcome(product, name, ended)
    product.assert_once()


@pytest.mark.slow
def test_law_4_of_two_controllers_one_leads_and_the_other_takes_over(product: Product) -> None:
    first = product.start(POD_NAME="one")
    product.wait(lambda: "leading identity=one" in first.log.read_text(), "one leads")
    second = product.start(POD_NAME="two")
    assert second.ready(), "a follower is ready, too"
    names = [f"t{n}" for n in range(4)]
    for name in names:
        product.apply(name, "say hello")
    for name in names:
        product.wait_phase(name, "WaitingInput")
    product.vote(names[0])
    product.wait_phase(names[0], "Succeeded")
    assert "leading identity=two" not in second.log.read_text()

    first.kill()
    began = time.monotonic()
    for name in names[1:]:
        product.vote(name)
    for name in names[1:]:
        assert product.wait_phase(name, "Succeeded", "Failed", seconds=60)["phase"] == "Succeeded"
    assert "leading identity=two" in second.log.read_text()
    assert time.monotonic() - began < LEASE_SECONDS + 2 * RETRY_SECONDS + 10, "lease time, two retries, and the work"
    assert sorted(product.starts().values()) == [1, 1, 1, 1]
    product.assert_once()


@pytest.mark.slow
def test_law_4_two_that_both_believe_to_lead_consume_a_quorum_once(product: Product) -> None:
    """The same POD_NAME holds the Lease twice: correctness must not rest on the Lease."""
    first, second = product.start(), product.start()
    for one in (first, second):
        product.wait(lambda one=one: "leading identity=e2e" in one.log.read_text(), "it believes to lead")  # type: ignore[misc]
    names = [f"b{n}" for n in range(4)]
    for name in names:
        product.apply(name, "say hello")
    for name in names:
        product.wait_phase(name, "WaitingInput")
    together(*(lambda name=name: product.vote(name) for name in names))
    for name in names:
        assert product.wait_phase(name, "Succeeded", "Failed")["phase"] == "Succeeded"
    assert sorted(product.starts().values()) == [1, 1, 1, 1]
    assert product.sql("SELECT max(execution_no), max(closed) FROM app.runs") == [(1, 1)]
    assert product.sql("SELECT count(*) FROM app.plan_approvals") == [(4,)]
    product.assert_once()
