"""One real Kubernetes node on a machine with root, without Docker, systemd or an image registry: docs/adr/0012.

`NodeCluster` is what tests use; `missing` says why a node cannot be had here.
"""

from __future__ import annotations

from devcluster.node.cluster import NodeCluster
from devcluster.node.node import Node, missing

__all__ = ["Node", "NodeCluster", "missing"]
