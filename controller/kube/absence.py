"""Runs whose Intent is gone. Believed only after a GET finds it gone (name, then UID compared) while CRD and namespace exist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from controller.kube.client import KubeCluster, Object
from controller.ports import RunStore

log = logging.getLogger(__name__)
MASS = 10  # more at once are not deletions but a fault: a person must look (docs/runbooks.md#sisukodorunsorphaned)

Row = Mapping[str, Any]


class Absence:
    """`found` gets every Intent that is there after all, which neither a list nor the watch told of."""

    def __init__(self, cluster: KubeCluster, store: RunStore, *, found: Callable[[Object], None]) -> None:
        self._cluster, self._store, self._found = cluster, store, found

    async def missing(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those of these whose Intent a GET does not find, for whatever reason. Raises Unavailable: then nothing is known."""
        return [row for row in rows if not await self._there(row)]

    async def orphans(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those of these open runs (RunStore.open_runs) whose Intent is gone. Raises as `missing`."""
        missing = await self.missing(rows)
        if not missing or not await self._cluster.crd_exists():
            return ()
        namespaces = {
            name: await self._cluster.namespace_exists(name) for name in {str(row["namespace"]) for row in missing}
        }
        return [row for row in missing if namespaces[row["namespace"]]]

    async def cancel(self, rows: Sequence[Row]) -> int:
        """End these runs as those of deleted Intents; how many were open still."""
        return sum([await asyncio.to_thread(self._cancel, str(row["intent_id"])) for row in rows])

    async def _there(self, row: Row) -> bool:
        obj = await self._cluster.intent(row["namespace"], row["name"])
        if obj is None or obj["metadata"]["uid"] != row["intent_id"]:
            return False
        self._found(obj)
        return True

    def _cancel(self, uid: str) -> bool:
        run = self._store.run(uid)
        if run is None or run.status.terminal:
            return False
        log.warning("Intent is gone; canceling its run", extra={"uid": uid})
        return self._store.cancel(run, reason="Deleted")
