"""Leader election by a Lease: one controller reconciles at a time. Correctness does not rest on it; it spares double work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

log = logging.getLogger(__name__)
NAME = "sisu-kodo-controller"
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2


class _Lock(LeaseLock):
    """The library's lock. Its own create() passes `pretty=True`, which the same release's client refuses (37.0.2)."""

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, body)
        except ApiException as e:
            log.warning("leader lease not created", extra={"status": e.status})
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
    except ApiException as e:
        log.warning("leader lease not released", extra={"status": e.status})


async def lead(
    api: client.ApiClient,
    *,
    namespace: str,
    identity: str,
    leading: Callable[[], Coroutine[Any, Any, None]],
    lost: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Wait for the Lease, run `leading` while it is held, then call `lost` (which ends the process)."""
    lock = _Lock(NAME, namespace, identity, api)
    await LeaderElection(
        Config(
            lock,
            lease_duration=LEASE_SECONDS,
            renew_deadline=RENEW_SECONDS,
            retry_period=RETRY_SECONDS,
            onstarted_leading=leading,
            onstopped_leading=lost,
        )
    ).run()
