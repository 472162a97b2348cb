"""What the product stands on is killed and started again under it: nothing is lost, nothing runs twice, and its process lives on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pytest

from controller.kube.lease import RENEW_SECONDS
from devcluster.bench.evidence import exactly_once
from devcluster.bench.faults import restart_api_server, restart_postgres
from devcluster.processes import tail
from devcluster.stack import Stack, scratch
from tests.e2e.product import Product


@pytest.fixture
def own() -> Iterator[Product]:
    """On a stack of its own: the session's cluster is other tests' as well."""
    with scratch() as state, Stack(state, fsync=False) as stack, Product(stack, name="load", title="load") as one:
        yield one


def begin(product: Product) -> None:
    """With the lease that the product has by default: PostgreSQL may take longer to come back than the tests' short one lasts."""
    product.start(LEASE_TTL_SECONDS="15")


def api_server_restarts(product: Product, *, down: float = 0.0) -> None:
    """And the controller lives on, unless a slow machine made it longer than a leader may be without its Lease: then as kubelet does."""
    away = restart_api_server(product.stack, down=down)
    product.stack.wait_enforced()
    if away > RENEW_SECONDS - 2 and not product.controllers[-1].child.alive():
        begin(product)
    assert product.controllers[-1].child.alive(), tail(product.controllers[-1].log, 20)


def vote(product: Product, names: Iterable[str]) -> None:
    for name in names:
        product.wait_phase(name, "WaitingInput")
        # An API server that has just started may not know the kind yet (503), and nothing was written then.
        product.wait(lambda name=name: product.vote(name, check=False).returncode == 0, f"the vote on {name} is taken")  # type: ignore[misc]


def finish(product: Product, names: Sequence[str]) -> None:
    for name in names:
        assert product.wait_phase(name, "Succeeded", "Failed")["phase"] == "Succeeded"
    product.wait(lambda: all("finalizers" not in i["metadata"] for i in product.objects("intents")), "nothing is held")
    assert product.controllers[-1].child.alive()
    exactly_once(product.database, product.start_log, runs=len(names))


@pytest.mark.slow
def test_restarts_of_api_server_and_postgres_lose_nothing(own: Product) -> None:
    begin(own)
    names = ["a", "b", "c", "d"]
    for name in names:
        own.apply(name, "say hello")
    api_server_restarts(own)  # while they are planned
    vote(own, names[:2])
    restart_postgres(own.stack)  # while two are executed
    vote(own, names[2:])
    finish(own, names)


@pytest.mark.slow
def test_many_restarts_at_any_moment_lose_nothing(own: Product) -> None:
    begin(own)
    names = [f"i{n}" for n in range(8)]
    for n, name in enumerate(names):
        own.apply(name, "twenty short waits", limits={"parallelism": 2})
        if n >= 4:
            vote(own, [names[n - 4]])
        restart_postgres(own.stack)
        if n % 2 == 1:
            api_server_restarts(own, down=n / 2)
    vote(own, names[4:])
    finish(own, names)
