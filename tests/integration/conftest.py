"""One PostgreSQL for all integration tests; each module has a migrated database of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from controller.db.migrate import migrate
from devcluster.postgres import Postgres


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The server; its data goes with the test session."""
    server = Postgres(tmp_path_factory.mktemp("postgres"), fsync=False)
    try:
        with server:
            yield server
    finally:
        server.wipe()


@pytest.fixture(scope="module")
def database(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """URL of a migrated database that only this module uses."""
    url = postgres.create_database(f"db_{request.module.__name__.rpartition('.')[2]}"[:60])
    migrate(url)
    return url
