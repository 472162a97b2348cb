"""What a node takes of its host: one veth pair with a /30 network, and one directory in each cgroup hierarchy.

All of it is named after the number of the network, and the link's alias says which process holds it. So whoever comes next
can tell what a killed holder has left, and removes it. For `devcluster.node.keeper`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.processes import Child

CGROUPS = Path("/sys/fs/cgroup")
LINKS = Path("/sys/class/net")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PREFIX = "sisu-node-"
RECORD = "keeper.json"  # in the node's directory: pid of its first process, name on the host, address
# Set aside for measurements between networks (RFC 2544), so nobody's own network has it.
POOL = ipaddress.IPv4Network("198.18.0.0/15")
NUMBERS = 2 ** (30 - POOL.prefixlen)
GONE_SECONDS = 10.0


@dataclass(frozen=True)
class Ground:
    """One node's share of the host. `machine` is a root directory that has `ip`."""

    number: int
    machine: Path

    @property
    def name(self) -> str:
        """Of the host's end of the link, and of the cgroups."""
        return f"{PREFIX}{self.number:x}"

    @property
    def peer(self) -> str:
        """The node's end, until it is moved there."""
        return f"sisu-peer-{self.number:x}"

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(POOL.network_address) + 4 * self.number, 30))

    @property
    def host_address(self) -> str:
        return str(self.network[1])

    @property
    def node_address(self) -> str:
        return str(self.network[2])

    def connect(self, pid: int) -> None:
        """Gives the other end to the network namespace of `pid` and sets both addresses."""
        ip(self.machine, "addr", "add", f"{self.host_address}/30", "dev", self.name)
        ip(self.machine, "link", "set", self.name, "up")
        ip(self.machine, "link", "set", self.peer, "netns", str(pid), "name", "eth0")
        for words in (f"addr add {self.node_address}/30 dev eth0", "link set eth0 up", "link set lo up"):
            ip(self.machine, *words.split(), netns=pid)

    def release(self) -> None:
        """Removes it all from the host. The node's processes must have ended."""
        with _alone():
            _release(self)


def claim(machine: Path, holder: Child) -> Ground:
    """Takes what is free, for `holder`; removes before what dead holders have left."""
    with _alone():
        _sweep(machine)
        taken = _networks(machine)
        for number in random.sample(range(NUMBERS), 64):
            ground = Ground(number, machine)
            if not any(ground.network.overlaps(one) for one in taken):
                break
        else:
            raise DevclusterError(f"the networks of {POOL} are all in use on this machine")
        ip(machine, "link", "add", ground.name, "type", "veth", "peer", "name", ground.peer)
        try:
            ip(machine, "link", "set", ground.name, "alias", json.dumps(holder.record()))
            for hierarchy in _hierarchies():
                _make_cgroup(hierarchy, ground.name)
        except BaseException:
            _release(ground)
            raise
        return ground


def sweep(machine: Path) -> None:
    """Removes what dead holders have left."""
    with _alone():
        _sweep(machine)


def _sweep(machine: Path) -> None:
    left = {path.name for hierarchy in _hierarchies() for path in hierarchy.glob(f"{PREFIX}*")}
    left |= {path.name for path in LINKS.glob(f"{PREFIX}*")}
    for name in left:
        alias = LINKS / name / "ifalias"
        owner = alias.read_text().strip() if alias.exists() else ""
        if not owner or not Child.from_record(json.loads(owner)).alive():
            _release(Ground(int(name.removeprefix(PREFIX), 16), machine))


def _release(ground: Ground) -> None:
    if (LINKS / ground.name).exists():
        # It may be going already: it does when the last process of its other end's namespace has ended.
        ip(ground.machine, "link", "del", ground.name, check=False)
    deadline = time.monotonic() + GONE_SECONDS
    for hierarchy in _hierarchies():
        for folder, _, _ in os.walk(hierarchy / ground.name, topdown=False):
            _rmdir(Path(folder), deadline)


def _rmdir(folder: Path, deadline: float) -> None:
    """A cgroup stays busy for a moment after its last process."""
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise DevclusterError(f"{folder} cannot be removed: {e.strerror}") from e
            time.sleep(0.02)


def _make_cgroup(hierarchy: Path, name: str) -> None:
    (hierarchy / name).mkdir()
    for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new cpuset, and nobody can enter it then
        if (hierarchy / name / setting).exists():
            (hierarchy / name / setting).write_text((hierarchy / setting).read_text())


def _hierarchies() -> list[Path]:
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _networks(machine: Path) -> list[ipaddress.IPv4Network]:
    """What the host's routes lead to, by any table."""
    routes = json.loads(ip(machine, "-json", "-4", "route", "show", "table", "all") or "[]")
    names = [str(route["dst"]) for route in routes]
    return [ipaddress.IPv4Network(name) for name in names if name != "default"]


def ip(machine: Path, *words: str, netns: int | None = None, check: bool = True) -> str:
    """Runs `ip` of the node's machine in this, or another process', network namespace."""
    enter = [] if netns is None else ["nsenter", f"--net=/proc/{netns}/ns/net", "--"]
    done = subprocess.run(
        [*enter, "chroot", machine, "/usr/bin/ip", *words], capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise DevclusterError(f"ip {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def _alone() -> Iterator[None]:
    """One at a time on this machine, whichever user's cache or checkout it comes from."""
    folder = os.open(CGROUPS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
