"""Who exists in the development cluster: their tokens, and the kubeconfig files that speak for them.

Real users to the API server (a token file), so RBAC and admission policies see whom they would see in production.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from pathlib import Path

import yaml

CLUSTER = "sisu-kodo-dev"
NAMESPACE = "sisu-kodo-system"
SERVICE_ACCOUNT = "sisu-kodo-controller"
PEOPLE_GROUP = "sisukodo:people"


@dataclass(frozen=True)
class Identity:
    """A line of the token file. `name` is the kubeconfig's file name, `user` what the API server calls them."""

    name: str
    user: str
    groups: tuple[str, ...]


CONTROLLER_MANAGER = Identity("controller-manager", "system:kube-controller-manager", ())
SCHEDULER = Identity("scheduler", "system:kube-scheduler", ())
NODE_NAME = "node1"
NODE = Identity("node", f"system:node:{NODE_NAME}", ("system:nodes",))
IDENTITIES = (
    Identity("admin", "admin@corp", ("system:masters",)),
    Identity("alice", "alice@corp", ("sisukodo:approvers", PEOPLE_GROUP)),
    Identity("bob", "bob@corp", ("sisukodo:editors", PEOPLE_GROUP)),
    Identity("carol", "carol@corp", ("sisukodo:authors", PEOPLE_GROUP)),
    CONTROLLER_MANAGER,
    SCHEDULER,
    NODE,
)
PROGRAMS = (CONTROLLER_MANAGER, SCHEDULER, NODE)


def ensure_tokens(path: Path) -> dict[str, str]:
    """Tokens by identity name, random, from the API server's token file at `path`; whoever is not in it is added."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {line.split(",")[2] for line in lines}
    fresh = [i for i in IDENTITIES if i.name not in known]
    if fresh:
        lines += [f'{secrets.token_hex(24)},{i.user},{i.name},"{",".join(i.groups)}"' for i in fresh]
        write_private(path, "\n".join(lines) + "\n")
    rows = (line.split(",") for line in lines)
    return {row[2]: row[0] for row in rows}


def write_kubeconfig(path: Path, *, server: str, ca: Path, user: str, token: str) -> None:
    """Writes a kubeconfig with one context, for one user."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": CLUSTER,
        "clusters": [
            {
                "name": CLUSTER,
                "cluster": {
                    "server": server,
                    "certificate-authority-data": base64.b64encode(ca.read_bytes()).decode(),
                },
            }
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": CLUSTER, "context": {"cluster": CLUSTER, "user": user, "namespace": "default"}}],
    }
    write_private(path, yaml.safe_dump(content, sort_keys=False))


def write_private(path: Path, content: str) -> None:
    """Writes a file that only we can read, replacing it in one step."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(content)
    fresh.replace(path)
