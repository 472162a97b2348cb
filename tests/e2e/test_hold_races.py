"""Law 4: approve, reject, cancel, expire and delete at the same moment, and two controllers at once. The first commit wins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.e2e.product import REJECT, Product

Act = Callable[[], Any]
SETTLED = ("Succeeded", "Failed", "Canceled", "Rejected", "Expired")
ROUNDS = 3


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


def approve(product: Product, name: str) -> Any:
    return product.vote(name, check=False)


def reject(product: Product, name: str) -> Any:
    return product.vote(name, user="admin", patch=REJECT, check=False)


def cancel(product: Product, name: str) -> Any:
    patch = ("patch", "intent", name, "--type=merge", "-p", '{"spec":{"cancel":true}}')
    return product.stack.kubectl("-n", product.namespace, *patch, user="carol", check=False)


def delete(product: Product, name: str) -> Any:
    return product.stack.kubectl(
        "-n", product.namespace, "delete", "intent", name, "--wait=false", user="carol", check=False
    )


def settled(product: Product, name: str) -> str:
    """How this run ended, by its row; the row stays when the object goes."""
    words = {one.lower() for one in SETTLED}
    query = "SELECT r.status FROM app.runs r JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s"

    def ended() -> str | None:
        ((status,),) = product.sql(query, name)
        return str(status) if status in words else None

    return product.wait(ended, f"{name} has ended")


def one_outcome(product: Product, name: str, ended: str, starts: int) -> None:
    """The winner's effect, and none of a loser's."""
    executed = "SELECT count(*) FROM app.sbx_attempts a JOIN app.runs r ON r.id = a.run_id JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s"
    ((attempts,),) = product.sql(executed, name)
    assert attempts == starts, f"{name} {ended}: by the journal"
    moves = "SELECT t.status FROM app.run_transitions t JOIN app.runs r ON r.id = t.run_id JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s"
    ends = [s for (s,) in product.sql(moves, name) if s in {one.lower() for one in SETTLED}]
    assert ends == [ended], f"{name} ended once"


@pytest.mark.parametrize(
    ("rivals", "outcomes"),
    [
        ((approve, reject), {"succeeded", "rejected"}),
        ((approve, cancel), {"succeeded", "canceled"}),
        ((approve, delete), {"succeeded", "canceled"}),
        ((reject, cancel), {"rejected", "canceled"}),
        pytest.param((approve, reject, cancel, delete), {"succeeded", "rejected", "canceled"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(one.__name__ for one in value) if isinstance(value, tuple) else "",
)
def test_law_4_rivals_at_one_moment_have_one_outcome(
    product: Product, rivals: Sequence[Callable[[Product, str], Any]], outcomes: set[str]
) -> None:
    product.start()
    names = [f"r{n}" for n in range(ROUNDS)]
    for name in names:
        product.apply(name, "say hello")
    for name in names:
        product.wait_phase(name, "WaitingInput")
    approvals = {name: product.approval_of(name) for name in names}
    for name in names:
        answers = together(*(lambda act=act, name=name: act(product, name) for act in rivals))
        ended = settled(product, name)
        assert ended in outcomes
        refused = [a.stderr for a in answers if a.returncode != 0]
        assert all("takes no more decisions" in r or "NotFound" in r for r in refused), "the loser sees why"
        votes = product.sql(
            "SELECT approver, verdict FROM app.plan_approvals WHERE approval_name = %s", approvals[name]
        )
        if ended == "rejected":
            assert ("admin@corp", "Reject") in votes
        began = product.sql(
            "SELECT count(*) FROM app.sbx_attempts a JOIN app.runs r ON r.id = a.run_id WHERE r.approval_name = %s",
            approvals[name],
        )
        one_outcome(product, name, ended, 1 if ended == "succeeded" else int(began[0][0]) if ended == "canceled" else 0)
    assert max(product.starts().values(), default=1) == 1
    product.assert_once()


def test_law_4_a_vote_at_the_deadline_is_either_in_time_or_expired(product: Product) -> None:
    product.start()
    product.apply("e", "say hello", approval={"expiresAfterSeconds": 3})
    product.wait_phase("e", "WaitingInput")
    left = "SELECT extract(epoch FROM approval_deadline - clock_timestamp())::float FROM app.runs"
    time.sleep(max(0.0, product.sql(left)[0][0] - 0.1))
    approve(product, "e")
    ended = settled(product, "e")
    assert ended in ("succeeded", "expired")
    one_outcome(product, "e", ended, 1 if ended == "succeeded" else 0)
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
        cancel(product, name)  # kubectl takes about as long as the task
        ended = settled(product, name)
        assert ended in ("succeeded", "canceled")
        ends = "SELECT r.closed FROM app.runs r JOIN app.intents i ON i.id = r.intent_id WHERE i.name = %s"
        assert product.sql(ends, name)[0][0] <= 1
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
        assert product.wait_phase(name, "Succeeded", "Failed", seconds=40)["phase"] == "Succeeded"
    assert "leading identity=two" in second.log.read_text()
    assert time.monotonic() - began < 15 + 2 * 2 + 10, "lease time, two retries, and the work"
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
