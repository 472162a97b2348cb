"""What a person asks and does about runs whose Intent is gone (`python -m controller orphans`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from controller.config import Settings
from controller.core.phases import Status
from controller.db.pool import open_pool
from controller.db.runs import PgRunStore
from controller.kube import client as kube
from controller.kube.absence import Absence


async def find(settings: Settings, *, cancel: bool) -> Sequence[Mapping[str, Any]]:
    """{namespace, name, intent_id, phase} of each, ended if told so. Raises SisuError when one of them does not answer."""
    api = await kube.connect(settings.kubeconfig)
    try:
        with open_pool(settings.database_url, size=1, name="sisu-kodo-orphans") as pool:
            store, cluster = PgRunStore(pool, app_version=settings.app_version), kube.KubeCluster(api)
            rows = await asyncio.to_thread(store.open_runs)
            seen = {str(obj["metadata"]["uid"]) async for obj in cluster.intents()}
            absence = Absence(cluster, store, found=lambda obj: None)
            orphans = await absence.orphans([row for row in rows if row["intent_id"] not in seen])
            if cancel:
                await absence.cancel(orphans)
            return [{**row, "phase": Status(row["status"]).phase} for row in orphans]
    finally:
        await api.close()  # type: ignore[no-untyped-call]
