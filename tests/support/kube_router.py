"""A network whose policies are enforced, and something to reach in it: kube-router in a node's namespaces, a small world behind it.

KUBE_ROUTER names a kube-router program (2.10 or newer: it must know nftables). No registry that tests may rely on has one, so
without the variable its tests are skipped, aloud.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devcluster.identities import NODE_NAME
from devcluster.node import NodeCluster
from devcluster.node.host import ip
from devcluster.node.node import NAMESPACES
from devcluster.processes import spawn, wait_ready

VARIABLE = "KUBE_ROUTER"
PROGRAM = "/var/kube-router"  # as the node sees them: its disk is the only place that both sides can write
TABLE = "kube-router-filter-ipv4"
PORT = 80
# What tasks might want to reach. Nothing leaves the namespaces: these addresses are the world's own.
PUBLIC = "93.184.215.14"
METADATA = "169.254.169.254"
PRIVATE = ("10.99.0.1", "172.31.0.2", "192.168.77.1", "100.64.0.1")
LISTEN = f"""
import socket, time
server = socket.create_server(("0.0.0.0", {PORT}), backlog=512)
while True:
    server.accept()[0].close()
"""


def missing() -> str | None:
    """Why there is none, or None."""
    program = os.environ.get(VARIABLE, "")
    if not program:
        return f"{VARIABLE} names no kube-router"
    return None if os.access(program, os.X_OK) else f"{VARIABLE}={program} cannot be executed"


@contextmanager
def world(cluster: NodeCluster, folder: Path) -> Iterator[None]:
    """Addresses that Pods made from now on can reach over TCP on PORT, through their node. Gone with the context."""
    node, machine = cluster.pids()["first"], cluster.node.images.machine
    listen: list[str | Path] = ["unshare", "--net", "--", sys.executable, "-c", LISTEN]
    child = spawn("world", listen, log=folder / "world.log", detach=False, cwd=folder)
    try:
        _wait_for_namespace(child.pid)
        for words in (
            "link set lo up",
            f"link add out0 type veth peer name world0 netns {node}",
            f"addr add {PRIVATE[1]}/30 dev out0",
            "link set out0 up",
            "route add default via 172.31.0.1",
            *(f"addr add {one}/32 dev lo" for one in (PUBLIC, METADATA, *PRIVATE) if one != PRIVATE[1]),
        ):
            ip(machine, *words.split(), netns=child.pid)
        for words in (
            "addr add 172.31.0.1/30 dev world0",
            "link set world0 up",
            *(f"route add {one}/32 via {PRIVATE[1]}" for one in (PUBLIC, METADATA, *PRIVATE) if one != PRIVATE[1]),
        ):
            ip(machine, *words.split(), netns=node)
        _route_pods(cluster, node)
        yield
    finally:
        child.stop()


@contextmanager
def running(cluster: NodeCluster) -> Iterator[None]:
    """Enforces NetworkPolicies on the node; ends with the context."""
    disk = cluster.node.home / "var"
    shutil.copy(os.environ[VARIABLE], disk / "kube-router")
    shutil.copy(cluster.kubeconfig("admin"), disk / "kube-router.kubeconfig")
    # iptables is looked for even where it is not used.
    cluster.node.run("mkdir", "-p", "/run/tools")
    for name in (f"{family}{what}" for family in ("iptables", "ip6tables") for what in ("", "-save", "-restore")):
        cluster.node.run("ln", "-sf", f"/usr/sbin/{name.replace('tables', 'tables-nft', 1)}", f"/run/tools/{name}")
    command: list[str | Path] = ["nsenter", f"--target={cluster.pids()['first']}", *NAMESPACES, "--"]
    command += ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--", "/usr/bin/env", "PATH=/run/tools:/usr/sbin:/usr/bin"]
    command += [PROGRAM, f"--kubeconfig={PROGRAM}.kubeconfig", f"--hostname-override={NODE_NAME}"]
    command += ["--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false"]
    command += ["--run-firewall=true", "--use-nftables-for-netpol"]
    log = cluster.control_plane.logs / "kube-router.log"
    child = spawn("kube-router", command, log=log, detach=False, cwd=cluster.node.home)
    try:
        wait_ready(child, lambda: TABLE in cluster.node.run("nft", "list", "tables"), log=log, timeout=60)
        yield
    finally:
        child.stop()


def _wait_for_namespace(pid: int) -> None:
    mine, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/net") == mine:
        assert time.monotonic() < deadline, "no network namespace of its own"
        time.sleep(0.01)


def _route_pods(cluster: NodeCluster, node: int) -> None:
    """A way out for Pods, which ours have not: a route in each, and a node that forwards."""
    settings = cluster.node.home / "etc" / "cni" / "10-pods.conflist"
    network = json.loads(settings.read_text())
    network["plugins"][0]["ipam"]["routes"] = [{"dst": "0.0.0.0/0"}]
    settings.write_text(json.dumps(network))
    command = ["nsenter", f"--net=/proc/{node}/ns/net", "--", "tee", "/proc/sys/net/ipv4/ip_forward"]
    subprocess.run(command, input=b"1\n", stdout=subprocess.DEVNULL, check=True)
