"""Everything outside that a process talks to, as main.build() composes it. Tests replace single fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kubernetes.aio.client import ApiClient

from controller.core.work import Context
from controller.db.pool import Pool
from controller.kube.client import KubeCluster
from controller.ports import (
    Admission,
    AgentServer,
    Clock,
    Credentials,
    LeaseStore,
    RunStore,
    SandboxProvider,
    Workspace,
    WorkStore,
)
from controller.workflows.compile import TurnLedger


@dataclass(frozen=True, kw_only=True)
class WorkerAdapters:
    """What only a worker needs. `executor` is this process incarnation, never reused.

    `credentials` is None where private repositories are not enabled.
    """

    executor: str
    agent: AgentServer
    workspace: Workspace
    credentials: Credentials | None
    sandboxes: SandboxProvider
    admission: Admission
    store: WorkStore
    leases: LeaseStore
    ledger: Callable[[Context], TurnLedger]


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """`worker` is None in a process that only controls."""

    clock: Clock
    pool: Pool
    runs: RunStore
    worker: WorkerAdapters | None
    cluster: Callable[[ApiClient], KubeCluster] = field(default=KubeCluster)
