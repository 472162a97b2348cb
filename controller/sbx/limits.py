"""Ceilings of one sandbox. Which mechanism holds where:

cpu      cgroup quota (root); else none
memory   cgroup, whole tree, OOM told by the kernel's counter (root); else RLIMIT_DATA per process, seen as CMD_NONZERO
pids     cgroup (root), and everywhere RLIMIT_NPROC set inside the jail, where it counts the jail's own namespace
disk     RLIMIT_FSIZE per file, and a measurement of the whole writable tree while the command runs
files    RLIMIT_NOFILE; core dumps are off
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from controller.core.contract import Limits

OPEN_FILES = 4096
OWN_PROCESSES = 4  # bubblewrap outside and inside, prlimit, the shell: not the task's
INODES_PER_MB = 256  # an empty file costs the host about 4 KiB too
MIB = 1 << 20
REMOVE_SECONDS = 10.0


def rlimits(limits: Limits, *, memory: bool, processes: bool = True) -> list[str]:
    """The prlimit command line that runs inside the jail; `memory` where no cgroup holds it.

    Without `processes` where the uid is one of the host's: it would count what other sandboxes run under it.
    """
    argv = ["/usr/bin/prlimit", "--core=0", f"--nofile={OPEN_FILES}", f"--fsize={limits.disk_mb * MIB}"]
    if processes:
        argv += [f"--nproc={limits.pids + OWN_PROCESSES}"]
    if memory:
        argv += [f"--data={limits.memory_mb * MIB}"]
    return [*argv, "--"]


@dataclass(frozen=True, kw_only=True)
class Cgroup:
    """One sandbox's cgroup: one directory (v2), one per controller (v1), or none at all."""

    directories: tuple[Path, ...] = ()
    version: int = 0

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files that a process writes itself into."""
        return tuple(directory / "cgroup.procs" for directory in self.directories)

    def oom_kills(self) -> int:
        """How many processes the kernel killed here for memory."""
        return self._fact({1: "memory.oom_control", 2: "memory.events"}, "oom_kill") or 0

    def peak_mb(self) -> int | None:
        """The most memory that the tree held at once, its file cache and /dev/shm included."""
        peak = self._fact({1: "memory.max_usage_in_bytes", 2: "memory.peak"})
        return None if peak is None else -(-peak // MIB)

    def cpu_ms(self) -> int | None:
        """CPU time of the whole tree. Not from rusage: bubblewrap ends without waiting for its init, which has the sums."""
        if self.version == 1:
            used = self._fact({1: "cpuacct.usage"})
            return None if used is None else used // 1_000_000
        used = self._fact({2: "cpu.stat"}, "usage_usec")
        return None if used is None else used // 1000

    def remove(self) -> None:
        """Kills what is left in it and removes it. A directory stays busy until the last exit, on a loaded machine for seconds."""
        deadline = time.monotonic() + REMOVE_SECONDS
        for directory in self.directories:
            while not _removed(directory) and time.monotonic() < deadline:
                _kill_members(directory)
                time.sleep(0.005)

    def _fact(self, files: Mapping[int, str], key: str | None = None) -> int | None:
        """A number from the file of our version, wherever it is; with `key`, from the line that begins with it."""
        for directory in self.directories:
            with contextlib.suppress(OSError, ValueError, KeyError):
                text = (directory / files.get(self.version, "")).read_text()
                return int(text) if key is None else int(dict(line.split() for line in text.splitlines())[key])
        return None


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _kill_members(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in (directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class CgroupTree:
    """Where sandboxes get their cgroups. `roots` are our parents: memory, pids, cpu, cpuacct (v1), or the only one (v2)."""

    roots: tuple[Path, ...]
    version: int

    @staticmethod
    def find(*, mount: Path = Path("/sys/fs/cgroup"), parent: str = "sisu-kodo") -> CgroupTree:
        """What this host lets us use; an empty tree (version 0) where it lets us use nothing."""
        if os.geteuid() == 0:
            with contextlib.suppress(OSError):
                if (mount / "cgroup.controllers").exists():
                    return _find_v2(mount, parent)
                return _find_v1(mount, parent)
        return CgroupTree(roots=(), version=0)

    def create(self, name: str, limits: Limits) -> Cgroup:
        """Raises OSError when the kernel refuses a value."""
        group = Cgroup(directories=tuple(root / name for root in self.roots), version=self.version)
        try:
            for directory in group.directories:
                directory.mkdir()
            for file, value in self._values(group, limits):
                file.write_text(value)
        except OSError:
            group.remove()
            raise
        return group

    def leftovers(self) -> list[str]:
        """Names of the sandboxes that have a cgroup."""
        return sorted({child.name for root in self.roots for child in root.iterdir() if child.is_dir()})

    def named(self, name: str) -> Cgroup:
        """The cgroup of a sandbox that another process created."""
        return Cgroup(directories=tuple(root / name for root in self.roots), version=self.version)

    def _values(self, group: Cgroup, limits: Limits) -> list[tuple[Path, str]]:
        memory, pids = str(limits.memory_mb * MIB), str(limits.pids + OWN_PROCESSES)
        quota = str(max(1000, limits.cpu_millis * 100))  # microseconds per 100 ms
        if self.version == 0:
            return []
        if self.version == 1:
            in_memory, in_pids, in_cpu = group.directories[:3]
            values = [
                (in_memory / "memory.limit_in_bytes", memory),
                (in_memory / "memory.memsw.limit_in_bytes", memory),
            ]
            values += [(in_pids / "pids.max", pids), (in_cpu / "cpu.cfs_quota_us", quota)]
        else:
            (own,) = group.directories
            values = [(own / "memory.max", memory), (own / "memory.swap.max", "0"), (own / "pids.max", pids)]
            values += [(own / "cpu.max", f"{quota} 100000")]
        # Without swap accounting the two swap files do not exist, and there is nothing to limit.
        return [(file, value) for file, value in values if "sw" not in file.name or file.exists()]


def _find_v1(mount: Path, parent: str) -> CgroupTree:
    # Many hosts mount cpu and cpuacct together, under both names.
    mounts = dict.fromkeys(
        (mount / controller).resolve(strict=True) for controller in ("memory", "pids", "cpu", "cpuacct")
    )
    roots = tuple(controller / parent for controller in mounts)
    for root in roots:
        root.mkdir(exist_ok=True)
    return CgroupTree(roots=roots, version=1)


def _find_v2(mount: Path, parent: str) -> CgroupTree:
    wanted = "+memory +pids +cpu"
    (mount / "cgroup.subtree_control").write_text(wanted)
    (mount / parent).mkdir(exist_ok=True)
    (mount / parent / "cgroup.subtree_control").write_text(wanted)
    return CgroupTree(roots=(mount / parent,), version=2)


class DiskGauge:
    """Measures a task's writable tree by `du`, which neither follows links nor stops at deep paths. Not thread-safe.

    A quota would be exact, but needs a prepared file system; a sized tmpfs would count against the memory limit. So a
    fast writer may overshoot by what it writes between two measurements (half a second); one file may not, by RLIMIT_FSIZE.
    """

    def __init__(self, tree: Path, *, limit_mb: int, interval: float = 0.5) -> None:
        self._tree = tree
        self._limit_mb = limit_mb
        self._interval = interval
        self._next = time.monotonic() + interval

    def exceeded(self) -> bool:
        """True when the last measurement due now is over the limit. Costs nothing between two of them."""
        started = time.monotonic()
        if started < self._next:
            return False
        over = (
            self._du("--block-size=1") > self._limit_mb * MIB or self._du("--inodes") > self._limit_mb * INODES_PER_MB
        )
        now = time.monotonic()
        self._next = now + max(self._interval, 10 * (now - started))  # at most a tenth of our time
        return over

    def _du(self, unit: str) -> int:
        # A file that vanishes meanwhile makes du exit 1, with a good total all the same.
        argv = ["/usr/bin/du", "--summarize", "--one-file-system", unit, "--", str(self._tree)]
        done = subprocess.run(argv, capture_output=True, check=False, env={})
        total = done.stdout.split()
        return int(total[0]) if total else 0
