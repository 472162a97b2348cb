"""The whole program as a process, on the session's cluster: one namespace and one database per test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from devcluster.stack import Stack
from tests.e2e.product import Product

_NUMBERS = itertools.count(1)


@pytest.fixture
def product(cluster: Stack, request: pytest.FixtureRequest) -> Iterator[Product]:
    """A fresh namespace, database and start log. Start a controller with `product.start(...)`; it ends with the test."""
    number = next(_NUMBERS)
    with Product(cluster, name=f"e2e-{number}", title=request.node.name) as one:
        yield one
