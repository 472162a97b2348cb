"""The leader's Lease while the API server does not answer: a try that failed, never the end of the election."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord

from controller.core.errors import Permanent, Unavailable
from controller.kube import lease

RECORD = LeaderElectionRecord("me", "15", "2026-01-01 00:00:00", "2026-01-01 00:00:00")


@pytest.fixture
async def nobody() -> AsyncIterator[client.ApiClient]:
    """A client of an address where nothing listens."""
    settings = client.Configuration()
    settings.host = "http://127.0.0.1:1"
    async with client.ApiClient(configuration=settings) as api:
        yield api


async def test_no_answer_is_a_try_that_failed(nobody: client.ApiClient) -> None:
    lock = lease._Lock("l", "ns", "me", nobody)
    got, why = await lock.get("l", "ns")
    assert not got
    assert isinstance(why, ApiException)
    assert why.body is None, "nothing that looks like a missing Lease"
    assert await lock.create("l", "ns", RECORD) is False
    lock.lease_reference = client.V1Lease(spec=client.V1LeaseSpec())
    assert await lock.update("l", "ns", RECORD) is False


async def test_a_stop_without_an_api_server_is_a_stop(nobody: client.ApiClient) -> None:
    await lease.release(nobody, namespace="ns", identity="me")


async def test_a_follower_keeps_trying(nobody: client.ApiClient) -> None:
    ended: list[str] = []

    async def call() -> None:
        ended.append("called")

    election = asyncio.create_task(lease.lead(nobody, namespace="ns", identity="me", leading=call, lost=call))
    await asyncio.sleep(0.2)
    assert not election.done() and ended == []
    election.cancel()
    await asyncio.gather(election, return_exceptions=True)


class Held(lease._Lock):
    """A Lease that is always ours."""

    async def get(self, name: str, namespace: str) -> tuple[bool, None]:
        return True, None

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return True


@pytest.mark.parametrize(
    ("failures", "told"),
    [([Unavailable("away")], ["led"]), ([Permanent("403: no roles yet")], ["led"]), ([KeyError("bug")], ["lost"])],
)
async def test_a_leader_that_cannot_begin_tries_again_and_one_that_fails_ends(
    nobody: client.ApiClient, monkeypatch: pytest.MonkeyPatch, failures: list[Exception], told: list[str]
) -> None:
    """The library leaves a failed `leading` alone: a leader that does nothing, and nobody else may begin."""
    monkeypatch.setattr(lease, "_Lock", Held)
    monkeypatch.setattr(lease, "RETRY_SECONDS", 1.01)  # the library refuses less
    seen: list[str] = []

    async def leading() -> None:
        if failures:
            raise failures.pop()
        seen.append("led")

    async def lost() -> None:
        seen.append("lost")

    election = asyncio.create_task(lease.lead(nobody, namespace="ns", identity="me", leading=leading, lost=lost))
    async with asyncio.timeout(5):
        while not seen:  # noqa: ASYNC110 - whatever is waited for has no event
            await asyncio.sleep(0.005)
    election.cancel()
    await asyncio.gather(election, return_exceptions=True)
    assert seen == told
