"""What of a machine a node might change, as comparable facts; what other nodes and sandboxes on it do meanwhile is left out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Where kubelets, containerd and CNI plugins keep things on a machine that is theirs.
FIXED = (
    *("/etc/cni", "/etc/containerd", "/etc/kubernetes", "/opt/cni", "/opt/containerd", "/run/containerd", "/run/netns"),
    *("/run/nri", "/run/runc", "/run/xtables.lock", "/var/lib/cni", "/var/lib/containerd", "/var/lib/containers"),
    *("/var/lib/dockershim", "/var/lib/kubelet", "/var/log/containers", "/var/log/pods", "/usr/libexec/kubernetes"),
    *("/var/lib/apt/lists", "/var/cache/apt/archives"),
)
OTHERS = re.compile(r"sisu-|198\.(18|19)\.")
COUNTERS = re.compile(r"/fs/(dentry|file|inode)-|/fs/quota/|/random/|/ns_last_pid|/pty/nr")


def settings() -> dict[str, str]:
    """What `sysctl -a` says, without counters, random numbers and the interfaces of others."""
    found = {}
    for path in Path("/proc/sys").rglob("*"):
        if OTHERS.search(str(path)) or COUNTERS.search(str(path)):
            continue
        try:
            found[str(path)] = path.read_text()
        except (OSError, UnicodeDecodeError):
            continue
    return found


def facts(machine: Path) -> dict[str, object]:
    """Mounts, interfaces, addresses, routes, packet filter, cgroups, fixed paths. `machine` has the programs to ask with."""

    def ask(*command: str) -> list[str]:
        done = subprocess.run(["chroot", machine, *command], capture_output=True, text=True, check=True)
        return sorted(line for line in done.stdout.splitlines() if not OTHERS.search(line))

    return {
        "mounts": Path("/proc/self/mounts").read_text(),
        "links": ask("ip", "-oneline", "-brief", "link"),
        "addresses": ask("ip", "-oneline", "-brief", "address"),
        "routes": ask("ip", "route", "show", "table", "all"),
        "filter": ask("nft", "list", "ruleset"),
        "cgroups": sorted(str(path) for path in CGROUPS.glob("*/*/") if not OTHERS.search(path.name)),
        "paths": {path: sorted(map(str, Path(path).rglob("*"))) if Path(path).exists() else None for path in FIXED},
    }


def traces(name: str) -> list[str]:
    """Everything on the machine that has a node's name."""
    places = (Path("/sys/class/net"), *CGROUPS.iterdir())
    return [str(place / name) for place in places if (place / name).exists()]


def processes_of(state: Path) -> list[int]:
    """Live processes that name the directory in their arguments or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if str(state) in words or (entry / "cwd").readlink().is_relative_to(state):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
