"""Shared by all tests: one cluster with the chart and its people per session, and the product on it for end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.stack import Stack, scratch
from opencode.install import InstallError, ensure


@pytest.fixture(scope="session")
def cluster() -> Iterator[Stack]:
    """API server, PostgreSQL, chart and people, for the whole session. Whoever needs a controller starts one."""
    with scratch() as state, Stack(state, fsync=False) as stack:
        yield stack


@pytest.fixture(scope="session")
def opencode_binary() -> Path:
    """The pinned daemon, installed on first use."""
    try:
        return ensure()
    except InstallError as e:
        pytest.skip(f"the real OpenCode daemon is NOT tested: {e}")


@pytest.fixture
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
