"""The identity gate (law 8): does the cluster, right now, enforce who may approve? Asked before every quorum is consumed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from controller.core.errors import Conflict, Permanent
from controller.kube import identity

log = logging.getLogger(__name__)


class AdmissionCluster(identity.AdmissionReader, Protocol):
    """The requests that the gate makes."""

    async def try_forged(self, body: Mapping[str, Any]) -> str | None:
        """Dry-run a write that must be denied: the denial, or None."""


class IdentityGate:
    """Compares the live policies with the shipped ones and has a forged write denied."""

    def __init__(self, cluster: AdmissionCluster, *, namespace: str, service_account: str) -> None:
        self._cluster = cluster
        self._running: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None
        self._shipped: Sequence[Mapping[str, Any]] = identity.shipped(namespace, service_account)

    async def policies(self) -> str | None:
        """What is wrong with the live policies, or None."""
        try:
            found = await identity.verify(self._cluster, self._shipped)
        except (Permanent, Conflict) as e:
            return f"the admission policies cannot be read: {e}"
        return "; ".join(found)[:900] or None

    def _shared(self) -> asyncio.Task[str | None]:
        """One look at the policies for all quorums that stood before it began; never one that had begun earlier."""
        if self._next is None:
            self._next = asyncio.create_task(self._look(self._running))
        return self._next

    async def _look(self, before: asyncio.Task[str | None] | None) -> str | None:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        return await self.policies()

    async def check(self, approval: Mapping[str, Any]) -> str | None:
        """Why a quorum on this PlanApproval must not be consumed, or None."""
        wrong = await asyncio.shield(self._shared())
        if wrong is not None:
            return wrong
        answer = await self._cluster.try_forged(identity.forged_write(approval))
        if answer is None:
            return "the API server let a forged decision through"
        if identity.FORGED_WRITE_ANSWER not in answer:
            return f"a forged decision was refused, but not by our policy: {answer}"[:900]
        return None
