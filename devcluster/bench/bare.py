"""What DBOS itself can do on this machine: 1,000 workflows without and with one step, in a worker and a database of their own.

`python -m devcluster.bench.bare URL READY` is the worker: our settings (controller/workflows/engine.py) without our product.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psycopg
from dbos import DBOS, DBOSPortableJSONSerializer

from controller.db.migrate import sqlalchemy_url
from devcluster.errors import DevclusterError
from devcluster.processes import spawn, wait_ready
from devcluster.stack import ROOT, Stack
from devcluster.trial.numbers import Row, rate

APPLICATION, QUEUE, VERSION = "bare", "bareQ", "v1"
CONCURRENCY, POLL_SECONDS = 32, 0.1
WARM_UP = 100
LIMIT_SECONDS = 60.0
ENQUEUE = """SELECT count(dbos.enqueue_workflow(workflow_name => %(workflow)s, queue_name => %(queue)s, workflow_id => %(tag)s || g,
  positional_args => ARRAY[to_json(g)], app_version => %(version)s, application_name => %(application)s))
FROM generate_series(1, %(n)s) g"""
DONE = "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS' AND workflow_uuid LIKE %s"


def measure(stack: Stack, *, count: int) -> list[Row]:
    """Workflows per second of an otherwise idle worker, from enqueueing to the last success."""
    assert stack.postgres is not None
    url = stack.postgres.create_database("bench_bare")
    log, ready = stack.state / "bare.log", stack.state / "bare.ready"
    command = [sys.executable, "-m", "devcluster.bench.bare", url, str(ready)]
    worker = spawn("bare DBOS worker", command, log=log, detach=False, cwd=ROOT, death=signal.SIGTERM)
    try:
        wait_ready(worker, ready.exists, log=log, timeout=60)
        with psycopg.connect(url, autocommit=True) as c:
            _run(c, "BareStepWF", WARM_UP, tag="warm-")
            empty, one = (_run(c, name, count, tag=f"{name}-") for name in ("BareEmptyWF", "BareStepWF"))
    finally:
        worker.stop((signal.SIGTERM, 5.0))
    note = f"n={count}, worker_concurrency {CONCURRENCY}, polling {POLL_SECONDS} s"
    return [
        Row(
            key="bare_empty_per_s",
            what="bare DBOS queue, empty workflows",
            value=rate(count, empty),
            unit="/s",
            note=note,
        ),
        Row(
            key="bare_one_step_per_s",
            what="bare DBOS queue, one-step workflows",
            value=rate(count, one),
            unit="/s",
            note=note,
        ),
    ]


def _run(c: psycopg.Connection[tuple[int]], workflow: str, count: int, *, tag: str) -> float:
    began = time.monotonic()
    params = {
        "workflow": workflow,
        "queue": QUEUE,
        "tag": tag,
        "version": VERSION,
        "application": APPLICATION,
        "n": count,
    }
    c.execute(ENQUEUE, params)
    while True:
        row = c.execute(DONE, (f"{tag}%",)).fetchone()
        if row is not None and row[0] >= count:
            return time.monotonic() - began
        if time.monotonic() - began > LIMIT_SECONDS:
            raise DevclusterError(f"{workflow}: {row} of {count} within {LIMIT_SECONDS:.0f} s")
        time.sleep(0.03)


# ------------------------------------------------------------------ the worker


@DBOS.step(name="bare_step")
def _step(i: int) -> int:
    return i


@DBOS.workflow(name="BareStepWF")
def _one_step(i: int) -> int:
    return _step(i)


@DBOS.workflow(name="BareEmptyWF")
def _empty(i: int) -> int:
    return i


def _work(url: str, ready: Path) -> None:
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": sqlalchemy_url(url),
            "application_version": VERSION,
            "executor_id": "bare",
            "serializer": DBOSPortableJSONSerializer(),
            "sys_db_pool_size": 20,
            "max_executor_threads": CONCURRENCY + 8,
            "use_listen_notify": True,
            "db_engine_kwargs": {"pool_pre_ping": False},
            "enable_otlp": False,
            "log_level": "WARNING",
        }
    )
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=CONCURRENCY, polling_interval_sec=POLL_SECONDS)
    ready.touch()
    signal.pause()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _work(sys.argv[1], Path(sys.argv[2]))
