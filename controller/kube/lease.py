"""Leader election by a Lease: one controller reconciles at a time. Correctness does not rest on it; it spares double work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from controller.core.errors import SisuError

log = logging.getLogger(__name__)
NAME = "sisu-kodo-controller"
# An API server that restarts is away for 5 to 20 s, and a leader that ends takes its running tasks with it: 15 and 10 were too short.
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 30, 20, 2
ANSWER_SECONDS = 6.0
NO_ANSWER = (aiohttp.ClientError, TimeoutError)


class _Lock(LeaseLock):
    """The library's lock, but an API server that does not answer is a try that failed (37.0.2 lets that end the election).

    Its own create() passes `pretty=True`, which the same release's client refuses.
    """

    async def get(
        self, name: str, namespace: str
    ) -> tuple[bool, LeaderElectionRecord] | tuple[bool, Exception] | tuple[bool, None]:
        try:
            return await asyncio.wait_for(super().get(name, namespace), ANSWER_SECONDS)
        except NO_ANSWER as e:
            return False, ApiException(status=0, reason=type(e).__name__)

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        try:
            return bool(await asyncio.wait_for(super().update(name, namespace, updated_record), ANSWER_SECONDS))
        except NO_ANSWER as e:
            log.warning("leader lease not renewed", extra={"error": type(e).__name__})
            return False

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await asyncio.wait_for(self.api_instance.create_namespaced_lease(namespace, body), ANSWER_SECONDS)
        except (ApiException, *NO_ANSWER) as e:
            log.warning("leader lease not created", extra={"error": type(e).__name__})
            return False
        return True


async def release(api: client.ApiClient, *, namespace: str, identity: str) -> None:
    """Give the Lease up at a clean stop, so that the next leader need not wait for it to run out."""
    leases = client.CoordinationV1Api(api)
    try:
        held = await leases.read_namespaced_lease(NAME, namespace)
        if held.spec is not None and held.spec.holder_identity == identity:
            held.spec.holder_identity = None
            await leases.replace_namespaced_lease(NAME, namespace, held)
    except (ApiException, *NO_ANSWER) as e:
        log.warning("leader lease not released", extra={"error": type(e).__name__})


async def lead(
    api: client.ApiClient,
    *,
    namespace: str,
    identity: str,
    leading: Callable[[], Coroutine[Any, Any, None]],
    lost: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Wait for the Lease, run `leading` while it is held, then call `lost` (which ends the process).

    The library does not look at how `leading` ends. One that the API server kept from beginning begins again (it may be away, or
    answer 403 until it has loaded its roles); any other failure is a leader that would do nothing while it holds the Lease: `lost`.
    """

    async def watched() -> None:
        while True:
            try:
                return await leading()
            except SisuError as e:
                log.warning("leading could not begin", extra={"error": str(e)})
            except Exception:
                log.exception("leading failed")
                return await lost()
            await asyncio.sleep(RETRY_SECONDS)

    lock = _Lock(NAME, namespace, identity, api)
    await LeaderElection(
        Config(
            lock,
            lease_duration=LEASE_SECONDS,
            renew_deadline=RENEW_SECONDS,
            retry_period=RETRY_SECONDS,
            onstarted_leading=watched,
            onstopped_leading=lost,
        )
    ).run()
