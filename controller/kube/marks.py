"""The copies of the stores' marks outside PostgreSQL: an annotation of one Lease in the controller's namespace (docs/adr/0009)."""

from __future__ import annotations

import json
from collections.abc import Mapping

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException

from controller.core.errors import Unavailable

NAME = "sisu-kodo-store"
ANNOTATION = "sisukodo.dev/store-marks"
KEPT = 32  # stores; the oldest are forgotten


class Marks:
    """Store id → the highest mark that was seen of it. Every failure is Unavailable: ask again."""

    def __init__(self, api: client.ApiClient, *, namespace: str) -> None:
        self._leases, self._namespace = client.CoordinationV1Api(api), namespace

    async def read(self) -> Mapping[str, int]:
        """All that are known. A Lease that is gone knows none."""
        try:
            lease = await self._leases.read_namespaced_lease(NAME, self._namespace)
        except (ApiException, aiohttp.ClientError, TimeoutError) as e:
            if isinstance(e, ApiException) and e.status == 404:
                return {}
            raise Unavailable(f"the Lease {NAME} cannot be read: {e}") from e
        found = lease.metadata.annotations if lease.metadata is not None else None
        text = (found or {}).get(ANNOTATION, "{}")
        try:
            return {str(store): int(mark) for store, mark in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as e:
            raise Unavailable(
                f"the annotation {ANNOTATION} of the Lease {NAME} is not {{store: mark}}; remove it: {text[:80]!r}"
            ) from e

    async def write(self, known: Mapping[str, int], store_id: str, mark: int) -> None:
        """`known` and this one."""
        others = [(store, seen) for store, seen in known.items() if store != store_id]
        value = json.dumps(dict([*others, (store_id, mark)][-KEPT:]))
        meta = client.V1ObjectMeta(name=NAME, annotations={ANNOTATION: value})
        try:
            try:
                patch = {"metadata": {"annotations": meta.annotations}}
                await self._leases.patch_namespaced_lease(NAME, self._namespace, patch)
            except ApiException as e:
                if e.status != 404:
                    raise
                await self._leases.create_namespaced_lease(self._namespace, client.V1Lease(metadata=meta))
        except (ApiException, aiohttp.ClientError, TimeoutError) as e:
            raise Unavailable(f"the Lease {NAME} cannot be written: {e}") from e
