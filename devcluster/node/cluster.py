"""A control plane with one real node, as one thing: what tests of Pods use."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from devcluster.cluster import ControlPlane
from devcluster.node.node import Node


class NodeCluster:
    """`with NodeCluster(state) as cluster:`. Raises DevclusterError with the reason where a node cannot be had."""

    def __init__(self, state: Path, *, detach: bool = False) -> None:
        self.control_plane = ControlPlane(state, detach=detach, node=True)
        self.node = Node(self.control_plane, detach=detach)

    def __enter__(self) -> NodeCluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def server(self) -> str:
        return self.control_plane.server

    def start(self) -> None:
        """Returns when the node is Ready and the images are there."""
        self.control_plane.start()
        try:
            self.node.start()
        except BaseException:
            self.control_plane.stop()
            raise

    def stop(self) -> None:
        """Ends it all; nothing is left running, and the host is as it was. The state stays."""
        try:
            self.node.stop()
        finally:
            self.control_plane.stop()

    def wipe(self) -> None:
        """Removes everything a stopped cluster has left in its directory."""
        self.node.wipe()
        self.control_plane.wipe()

    def kubectl(
        self, *args: str | Path, identity: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """As `ControlPlane.kubectl`."""
        return self.control_plane.kubectl(*args, identity=identity, stdin=stdin, check=check)

    def kubeconfig(self, name: str) -> Path:
        """As `ControlPlane.kubeconfig`."""
        return self.control_plane.kubeconfig(name)

    def kubeconfigs(self) -> dict[str, Path]:
        """As `ControlPlane.kubeconfigs`."""
        return self.control_plane.kubeconfigs()

    def image(self, name: str) -> str:
        """The reference of `python`, `base` or `pause`, by digest: what a Pod's `image` says."""
        return self.node.images.reference(name)

    def pids(self) -> dict[str, int]:
        """As `Node.pids`."""
        return self.node.pids()

    def kill_kubelet(self) -> None:
        """As `Node.kill_kubelet`."""
        self.node.kill_kubelet()

    def restart_kubelet(self) -> None:
        """As `Node.restart_kubelet`."""
        self.node.restart_kubelet()
