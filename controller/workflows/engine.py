"""DBOS as we run it: pinned version, JSON only, no pickle, our two queues, one executor id per process incarnation.

Facts and traps: docs/adr/0002-dbos-as-the-engine.md.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from cachetools import TTLCache, cached
from dbos import DBOS, DBOSPortableJSONSerializer
from dbos._dbos import _get_dbos_instance
from dbos._serialization import DefaultSerializer
from dbos._utils import INTERNAL_QUEUE_NAME, GlobalParams

from controller.core.errors import Permanent
from controller.workflows import execute, finish, intent, task

log = logging.getLogger(__name__)
APPLICATION = "sisu-kodo"
QUEUE_SETTINGS_SECONDS = 10.0  # a rollout that changes them is seen by older workers, too, this much later
WORKFLOWS = (intent.run_intent, execute.execute_plan, task.run_task, finish.finish_run)


def _refuse_pickle(_self: DefaultSerializer, _serialized: str) -> Any:
    raise Permanent("a pickled DBOS row was refused: unpickling would run whatever it holds")


def launch(
    *, url: str, executor: str, app_version: str, poll_seconds: float, intent_concurrency: int, sbx_concurrency: int
) -> None:
    """Start dequeuing. The lease must be held before this. `url` is an SQLAlchemy URL."""
    # A row may name its own serializer; the configured one is only a default. With pickle, writing a row is running code.
    DefaultSerializer.deserialize = _refuse_pickle  # type: ignore[method-assign, assignment]
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": url,
            "dbos_system_schema": "dbos",
            "executor_id": executor,
            "application_version": app_version,
            "run_migrations": False,
            "serializer": DBOSPortableJSONSerializer(),
            "sys_db_pool_size": 20,
            # worker_concurrency counts only started threads: fewer would claim work that cannot begin.
            "max_executor_threads": intent_concurrency + sbx_concurrency + 8,
            "use_listen_notify": True,
            "db_engine_kwargs": {"pool_pre_ping": False},
            "enable_otlp": False,
            "log_level": "WARNING",
        }
    )
    DBOS.listen_queues(["intentQ", "sbxQ"])
    DBOS.launch()
    DBOS.register_queue(
        "intentQ", worker_concurrency=intent_concurrency, polling_interval_sec=poll_seconds, on_conflict="always_update"
    )
    DBOS.register_queue(
        "sbxQ",
        worker_concurrency=sbx_concurrency,
        partition_worker_concurrency=max(1, sbx_concurrency // 2),
        polling_interval_sec=poll_seconds,
        on_conflict="always_update",
    )
    _read_queues_rarely()
    log.info("worker ready", extra={"executor": executor, "app_version": app_version})


def _read_queues_rarely() -> None:
    """Each poll reads its queue's settings first, which is half of what an idle worker asks of the database. Here they never change."""
    system = _get_dbos_instance()._sys_db  # noqa: SLF001 - no public way to register a queue in memory only
    settings: TTLCache[Any, Any] = TTLCache(maxsize=8, ttl=QUEUE_SETTINGS_SECONDS)
    system.get_queue = cached(settings, lock=threading.Lock())(system.get_queue)  # type: ignore[method-assign]


def recover(executors: list[str]) -> int:
    """Put the pending workflows of dead executors back on their queues; how many there were."""
    return len(DBOS._recover_pending_workflows(executors))  # noqa: SLF001 - no public equivalent keeps deadlines and attempts


class LostClaims:
    """Workflows that the database has as claimed by this process, and that no thread of it runs.

    DBOS claims in one transaction and begins afterwards. When the connection is lost in between, the claim may be committed without
    anybody who knows of it, and nobody recovers what a live executor holds.
    """

    def __init__(self, executor: str) -> None:
        self._executor = executor
        self._idle: set[str] = set()

    def look(self) -> int:
        """Put back what was idle at the look before, too: between claim and thread there are milliseconds. How many."""
        engine = _get_dbos_instance()
        claimed = engine._sys_db.get_pending_workflows(self._executor, GlobalParams.app_version)  # noqa: SLF001 - not public
        running = set(engine._active_workflows_set.activeList())  # noqa: SLF001
        idle = {one.workflow_id for one in claimed} - running
        lost, self._idle = idle & self._idle, idle - self._idle
        for workflow in lost:
            engine._sys_db.reenqueue_for_recovery(workflow, [self._executor], INTERNAL_QUEUE_NAME)  # noqa: SLF001
        return len(lost)


def stop(*, seconds: int) -> None:
    """Stop dequeuing, wait a little for what runs; what is still running is taken over by a peer or the next start."""
    DBOS.destroy(workflow_completion_timeout_sec=seconds)
