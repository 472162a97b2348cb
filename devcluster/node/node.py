"""One real node for a `ControlPlane(node=True)`: containerd and a kubelet in namespaces of their own.

Everything of it is under `STATE/node`. Attached, it ends with the process that started it; detached, `stop` ends it.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from devcluster import build
from devcluster.certs import ensure_node_pki, issue_kubelet
from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.identities import NODE, NODE_NAME, write_private
from devcluster.node import images, settings, store
from devcluster.node.host import CGROUPS, RECORD, SYSTEM_PATH, sweep
from devcluster.node.packages import TOOLS
from devcluster.processes import Child, spawn, wait_ready

HERE = Path(__file__).parent
READY_SECONDS = 90.0
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")
# A process enters namespaces but not cgroups; and it must not outlive the one outside that stands for it.
JOIN = 'for c in /sys/fs/cgroup/*/; do echo 0 > "${c}cgroup.procs"; done; exec setpriv --pdeathsig KILL -- "$@"'


def missing() -> str | None:
    """Why this machine cannot have a node, or None."""
    if os.geteuid() != 0:
        return "a node needs root, for namespaces and cgroups of its own"
    for tool in (*TOOLS, "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"a node is made from Debian packages in namespaces; {tool} is missing"
    if not (CGROUPS / "memory" / "cgroup.procs").exists():
        return "a node needs the cgroup v1 memory controller (version 2 alone has not been tried)"
    if not os.access(CGROUPS / "memory", os.W_OK):
        return "a node needs cgroups of its own, and they are read-only here"
    done = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    return f"namespaces cannot be made here: {done.stderr.strip()}" if done.returncode else None


class Node:
    """The node of one control plane."""

    def __init__(self, cluster: ControlPlane, *, detach: bool = False) -> None:
        self.home = cluster.state / "node"
        self._cluster = cluster
        self._detach = detach
        self._record = self.home / "node.json"
        self._children: dict[str, Child] = {}
        self._images: images.Images | None = None
        if self._record.exists():
            self._children = {one["name"]: Child.from_record(one) for one in json.loads(self._record.read_text())}

    @property
    def images(self) -> images.Images:
        if self._images is None:
            self._images = images.ensure()
        return self._images

    @property
    def children(self) -> dict[str, Child]:
        """keeper, containerd and kubelet; ended ones too. The latter two are our side of the namespaces: see `pids`."""
        return dict(self._children)

    @property
    def running(self) -> bool:
        return len(self._children) == 3 and all(child.alive() for child in self._children.values())

    def pids(self) -> dict[str, int]:
        """Of what lives inside, as the host sees it: `first` (its end ends the node), `containerd`, `kubelet`."""
        found = {"first": self._first(), "containerd": self._inner("containerd"), "kubelet": self._inner("kubelet")}
        return {name: pid for name, pid in found.items() if pid is not None}

    def start(self) -> None:
        """Returns when the node is Ready and the images are there. Does nothing when it already runs."""
        if self.running:
            return
        if reason := missing():
            raise DevclusterError(reason)
        kubelet = build.ensure(build.KUBELET).parent
        machine = self.images.machine
        self.stop()
        for folder in ("root", "var/lib", "var/log/pods", "etc/cni"):
            (self.home / folder).mkdir(parents=True, exist_ok=True, mode=0o755)
        self._cluster.logs.mkdir(exist_ok=True)
        try:
            address = self._start_keeper(machine, kubelet)
            self._write_settings(address)
            self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", HERE / "access.yaml")
            self._start_containerd()
            self.restart_kubelet()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the node and its Pods at once, and gives back what it had of the host. Its disk stays."""
        for name, step in (("kubelet", 0.0), ("containerd", 0.0), ("keeper", 30.0)):
            if name in self._children:
                self._children[name].stop(*([(signal.SIGTERM, step)] if step else []))
        if self._children:
            sweep(self.images.machine)  # a keeper that was killed could not
            self._children = {}
            self._save()

    def wipe(self) -> None:
        """Removes everything a stopped node has left in its directory."""
        if any(child.alive() for child in self._children.values()):
            raise DevclusterError("stop the node before removing its disk")
        shutil.rmtree(self.home, ignore_errors=True)

    def kill_kubelet(self) -> None:
        """SIGKILL. Pods go on; nobody reports them."""
        self._kill("kubelet")

    def restart_kubelet(self) -> None:
        """Ends the kubelet if it runs, starts it, and waits until it answers and the node is Ready."""
        if "kubelet" in self._children:
            self.kill_kubelet()
        flags = ["--config=/etc/node/kubelet.yaml", "--kubeconfig=/etc/node/kubeconfig"]
        address = self._keeper_record()["address"]
        flags += [f"--hostname-override={NODE_NAME}", f"--node-ip={address}"]
        child = self._spawn_inside("kubelet", "/opt/kubelet/kubelet", *flags)
        wait_ready(child, self._ready, log=self._log("kubelet"), timeout=READY_SECONDS)

    def run(self, *command: str, stdin: Path | None = None) -> str:
        """Runs a program of the node's machine inside, and returns what it says. Raises DevclusterError when it fails."""
        with (stdin or Path(os.devnull)).open("rb") as source:
            done = subprocess.run(self._enter(*command), stdin=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DevclusterError(f"{' '.join(command)} failed in the node: {done.stderr.strip()}")
        return done.stdout

    def _start_keeper(self, machine: Path, kubelet: Path) -> str:
        record = self.home / RECORD
        record.unlink(missing_ok=True)
        command: list[str | Path] = [sys.executable, "-m", "devcluster.node.keeper"]
        command += [self.home, machine, kubelet, str(self._cluster.port)]
        self._spawn("keeper", command, death=signal.SIGTERM)
        wait_ready(self._children["keeper"], record.exists, log=self._log("keeper"), timeout=READY_SECONDS)
        return str(self._keeper_record()["address"])

    def _write_settings(self, address: str) -> None:
        pki = ensure_node_pki(self._cluster.state / "pki", now=dt.datetime.now(dt.UTC))
        issue_kubelet(pki, address, now=dt.datetime.now(dt.UTC))
        etc = self.home / "etc"
        for source in (pki.ca, pki.kubelet_cert, pki.kubelet_key):
            write_private(etc / source.name, source.read_text())
        write_private(etc / "kubeconfig", self._cluster.kubeconfig(NODE.name).read_text())
        write_private(etc / "kubelet.yaml", settings.kubelet(address))
        write_private(etc / "containerd.toml", settings.containerd(self.images.reference("pause")))
        write_private(etc / "cni" / "10-pods.conflist", settings.cni())

    def _start_containerd(self) -> None:
        disk = self.home / "var" / "lib" / "containerd"
        if self.images.store.exists() and not disk.exists():
            store.give(self.images.store, disk)
        self._launch_containerd()
        known = set(self._ctr("images", "ls", "-q").split())
        if known.issuperset(map(self.images.reference, self.images.digests)):
            return
        fresh = not known
        self._ctr("images", "import", "-", stdin=self.images.archive)
        if fresh and not self.images.store.exists():
            self._kill("containerd")
            store.keep(disk, self.images.store)
            self._launch_containerd()

    def _launch_containerd(self) -> None:
        child = self._spawn_inside("containerd", "/usr/bin/containerd", "--config=/etc/node/containerd.toml")
        wait_ready(child, self._containerd_answers, log=self._log("containerd"), timeout=READY_SECONDS)

    def _containerd_answers(self) -> bool:
        try:
            self._ctr("version")
        except DevclusterError:
            return False
        return True

    def _ctr(self, *words: str, stdin: Path | None = None) -> str:
        return self.run("ctr", "--address", settings.SOCKET, "--namespace", "k8s.io", *words, stdin=stdin)

    def _ready(self) -> bool:
        asks = (
            ("get", "--raw", f"/api/v1/nodes/{NODE_NAME}/proxy/healthz"),
            ("wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=1s"),
        )
        return all(self._cluster.kubectl(*ask, check=False).returncode == 0 for ask in asks)

    def _spawn_inside(self, name: str, *command: str) -> Child:
        return self._spawn(name, self._enter("/bin/sh", "-c", JOIN, name, *command))

    def _spawn(self, name: str, command: list[str | Path], *, death: signal.Signals = signal.SIGKILL) -> Child:
        log = self._log(name)
        env = {"PATH": SYSTEM_PATH, "PYTHONPATH": str(HERE.parents[1])}
        child = spawn(name, command, log=log, detach=self._detach, cwd=self.home, death=death, env=env)
        self._children[name] = child
        self._save()
        return child

    def _enter(self, *command: str) -> list[str | Path]:
        return ["nsenter", f"--target={self._first()}", *NAMESPACES, "--", *command]

    def _kill(self, name: str) -> None:
        inner = self._inner(name)
        self._children[name].stop()
        # The kernel ends it when what stands for it outside has ended.
        deadline = time.monotonic() + 10
        while inner is not None and Path(f"/proc/{inner}").exists():
            if time.monotonic() > deadline:
                raise DevclusterError(f"{name} (pid {inner}) outlives its end")
            time.sleep(0.02)

    def _inner(self, name: str) -> int | None:
        """The pid of the process inside that one of our children stands for."""
        pid = self._children[name].pid
        try:
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        except (FileNotFoundError, IndexError):
            return None

    def _first(self) -> int:
        return int(self._keeper_record()["pid"])

    def _keeper_record(self) -> dict[str, str | int]:
        try:
            found: dict[str, str | int] = json.loads((self.home / RECORD).read_text())
        except FileNotFoundError as e:
            raise DevclusterError(f"no node runs in {self.home}") from e
        return found

    def _log(self, name: str) -> Path:
        return self._cluster.logs / f"{name}.log"

    def _save(self) -> None:
        write_private(self._record, json.dumps([child.record() for child in self._children.values()]))
