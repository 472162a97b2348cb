"""A task's Pod as data: its name, the mark of its owner, and everything that keeps the task in its place. No I/O.

One container whose main process waits; the task and our own commands come by exec. What a NetworkPolicy must hold back is told
by the label EGRESS (kubernetes_policies.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.core.contract import Egress, Limits
from controller.core.errors import InvalidIntent
from controller.core.model import Owner
from controller.sbx.jail import OUTPUT, WORKSPACE
from controller.sbx.kubernetes_canary import API_SERVER

CONTAINER = "task"
UID = 1000
HOME = "/home/task"
MANAGED_BY = "app.kubernetes.io/managed-by"
STORE, FENCE, EGRESS = "sisukodo.dev/store", "sisukodo.dev/fence", "sisukodo.dev/egress"
STORE_ID, RUN, TASK, ATTEMPT = (f"sisukodo.dev/{name}" for name in ("store-id", "run", "task-key", "attempt"))
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})$")
NODE_GONE_SECONDS = 30  # how long a Pod stays bound to a node that does not answer; Kubernetes' default is 300
# Waits without a child: a task may kill whatever its uid may kill, and a fork may fail in the midst of a fork bomb. SIGCHLD is
# ignored, so that the kernel buries what a task orphans; SIGTERM is not, so that a deleted Pod ends at once. Not by exit 0: the
# kubelet keeps the reason of an eviction or a deadline only where the Pod's phase becomes Failed.
STOPPED = 143
WAIT = (
    f"trap '' CHLD; trap 'exit {STOPPED}' TERM; mkfifo /tmp/.wait && exec <> /tmp/.wait && rm /tmp/.wait || exit 1;"
    " while :; do read -r _; done"
)
VOLUMES = {"workspace": WORKSPACE, "output": OUTPUT, "tmp": "/tmp", "home": HOME}

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PodSettings:
    """What all Pods have in common. `boot` is how many seconds a Pod may take until it runs, pulling its image included.

    `claims`: taken from warm pools of agent-sandbox, where one fits. `canary`: what no Pod may be able to connect to
    (kubernetes_canary.py).
    """

    namespace: str
    runtime_class: str = ""
    pull_secrets: Sequence[str] = ()
    node_selector: Mapping[str, str] | None = None
    tolerations: Sequence[Mapping[str, str]] = ()
    boot: float = 120.0
    claims: bool = False
    canary: str = API_SERVER


def name_of(owner: Owner) -> str:
    """The same for the same attempt, so that a create that is repeated can never make two."""
    return f"sisu-kodo-{hashlib.sha256(owner.store_id.encode()).hexdigest()[:12]}-{owner.fence}"


def store_label(store_id: str) -> str:
    """The store id, or its hash where a label cannot hold it."""
    return store_id if LABEL.fullmatch(store_id) else hashlib.sha256(store_id.encode()).hexdigest()[:40]


def selector(store_id: str) -> str:
    """For lists: everything of this store."""
    return f"{MANAGED_BY}=sisu-kodo,{STORE}={store_label(store_id)}"


def owner_of(found: Mapping[str, Any]) -> Owner | None:
    """Of a Pod or a claim; None when it is not ours."""
    labels, notes = found["metadata"].get("labels") or {}, found["metadata"].get("annotations") or {}
    with contextlib.suppress(KeyError, ValueError):
        return Owner(
            store_id=notes[STORE_ID],
            run_id=notes[RUN],
            task_key=notes[TASK],
            attempt=int(notes[ATTEMPT]),
            fence=int(labels[FENCE]),
        )
    return None


def egress_label(egress: Egress) -> str:
    """Raises InvalidIntent for what a NetworkPolicy cannot hold to."""
    if egress.mode == "Allow":
        raise InvalidIntent(
            "spec.sandbox.egress.mode", "a NetworkPolicy knows addresses, not host names: None or Public"
        )
    return egress.mode.lower()


def manifest(template: Object, *, owner: Owner, settings: PodSettings, seconds: float) -> Object:
    """The Pod, which ends by itself after `seconds`."""
    metadata = mark(owner, settings=settings)
    metadata["labels"] |= template["metadata"]["labels"]
    spec = template["spec"] | {"activeDeadlineSeconds": math.ceil(seconds)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def mark(owner: Owner, *, settings: PodSettings) -> Object:
    """Metadata of what is made for an attempt: its name and whose it is."""
    return {
        "name": name_of(owner),
        "namespace": settings.namespace,
        "labels": {
            "app.kubernetes.io/name": "sisu-kodo-sandbox",
            MANAGED_BY: "sisu-kodo",
            STORE: store_label(owner.store_id),
            FENCE: str(owner.fence),
        },
        "annotations": {
            STORE_ID: owner.store_id,
            RUN: owner.run_id,
            TASK: owner.task_key,
            ATTEMPT: str(owner.attempt),
        },
    }


def template(limits: Limits, egress: Egress, *, image: str, settings: PodSettings) -> Object:
    """Everything that keeps a task in its place: spec and label of all Pods with this image, these limits and this egress."""
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [*_node_gone(), *map(dict, settings.tolerations)],
        "containers": [_container(limits, image)],
        "volumes": [{"name": name, "emptyDir": {"sizeLimit": f"{limits.disk_mb}Mi"}} for name in sorted(VOLUMES)],
        "dnsPolicy": "ClusterFirst",
    }
    if egress.mode == "None":  # refused at once instead of after a resolver's patience
        spec |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
    if settings.runtime_class:
        spec["runtimeClassName"] = settings.runtime_class
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    return {"metadata": {"labels": {EGRESS: egress_label(egress)}}, "spec": spec}


def image_digest(pod: Mapping[str, Any]) -> str | None:
    """The digest that the node's runtime says the container is made of; None where it tells none."""
    for one in (pod.get("status") or {}).get("containerStatuses") or ():
        if one.get("name") == CONTAINER and (found := DIGEST.search(str(one.get("imageID") or ""))):
            return found[1]
    return None


def running(pod: Mapping[str, Any]) -> bool:
    """Whether commands can be run in it."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return any(one.get("name") == CONTAINER and "running" in (one.get("state") or {}) for one in statuses)


def _container(limits: Limits, image: str) -> Object:
    amounts = {
        "cpu": f"{limits.cpu_millis}m",
        "memory": f"{limits.memory_mb}Mi",
        "ephemeral-storage": f"{limits.disk_mb}Mi",
    }
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/sh", "-c", WAIT],
        "workingDir": "/",
        "env": [{"name": "HOME", "value": HOME}, {"name": "TMPDIR", "value": "/tmp"}],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in sorted(VOLUMES.items())],
    }


def _node_gone() -> list[Object]:
    return [
        {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute"}
        | {"tolerationSeconds": NODE_GONE_SECONDS}
        for state in ("not-ready", "unreachable")
    ]
