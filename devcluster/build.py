"""Builds the Go programs of the development cluster, once, and keeps them in the cache.

`kcp` is the whole control plane and kubectl in one file, `helm` renders our chart; `kubelet` and `pause` are made only
when a node is wanted. Each lives in a folder named by the hash of its sources and flags, so a checkout always finds the
binary that belongs to it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from devcluster.cache import Report, cache_dir, locked, say
from devcluster.errors import DevclusterError
from devcluster.toolchain import find_go

HERE = Path(__file__).parent
PROGRESS_SECONDS = 10.0
KUBERNETES = "1.36.3"
HELM_VERSION = "3.22.0"


@dataclass(frozen=True)
class Program:
    """A Go program: its module's folder here, the package to build, linker flags, and what it is to people."""

    name: str
    module: str
    package: str
    ldflags: str
    what: str
    minutes: int
    links: tuple[str, ...] = ()
    smoke: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where `go build` runs."""
        return HERE / self.module

    @property
    def sources(self) -> list[Path]:
        """The module's own files that the program is made of."""
        own = self.folder / self.package if self.package.startswith(".") else self.folder
        return sorted({self.folder / "go.mod", self.folder / "go.sum", *own.glob("*.go")}, key=lambda path: path.name)

    @property
    def flags(self) -> tuple[str, ...]:
        # -buildvcs=false: the binary must depend on its sources only, and git may refuse a checkout owned by another.
        return ("-trimpath", "-buildvcs=false", "-ldflags", self.ldflags)


_VERSION = "k8s.io/component-base/version"
_OF_KUBERNETES = (
    f"-s -w -X {_VERSION}.gitVersion=v{KUBERNETES}"
    f" -X {_VERSION}.gitMajor={KUBERNETES.split('.')[0]} -X {_VERSION}.gitMinor={KUBERNETES.split('.')[1]}"
)
KCP = Program(
    name="kcp",
    module="kcp",
    package=".",
    ldflags=_OF_KUBERNETES,
    what=f"Kubernetes {KUBERNETES} control plane",
    minutes=6,
    links=("kubectl",),
    smoke=("kubectl", "version", "--client"),
)
KUBELET = Program(
    name="kubelet",
    module="kcp",
    package="./kubelet",
    ldflags=_OF_KUBERNETES,
    what=f"kubelet {KUBERNETES}",
    minutes=1,
    smoke=("--version",),
)
PAUSE = Program(name="pause", module="kcp", package="./pause", ldflags="-s -w", what="pause", minutes=0)
HELM = Program(
    name="helm",
    module="helm",
    package="helm.sh/helm/v3/cmd/helm",
    ldflags=f"-s -w -X helm.sh/helm/v3/internal/version.version=v{HELM_VERSION}",
    what=f"helm {HELM_VERSION}",
    minutes=2,
    smoke=("version", "--short"),
)


def digest(program: Program) -> str:
    """sha256, in hexadecimal, of everything that decides what is built: sources, flags, kind of machine."""
    whole = hashlib.sha256()
    for part in (program.package, *program.flags, platform.system(), platform.machine()):
        whole.update(part.encode() + b"\0")
    for path in program.sources:
        whole.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return whole.hexdigest()


def binary(program: Program) -> Path:
    """Where the binary of these sources is kept, built or not."""
    return cache_dir() / program.name / digest(program) / program.name


def ensure(program: Program, *, report: Report = say) -> Path:
    """Path of the built program; builds it first when the cache does not hold it. Safe to call from two processes."""
    path = binary(program)
    if not path.exists():
        with locked(path.parent.with_name(path.parent.name + ".lock"), report=report):
            if not path.exists():
                _build(program, path.parent, report)
    return path


def _build(program: Program, home: Path, report: Report) -> None:
    """Builds into a scratch folder of the cache and moves it to `home` in one step."""
    go = find_go(report=report)
    minutes = f"{program.minutes} minute{'' if program.minutes == 1 else 's'}"
    span = f"about {minutes} on 2 cores" if program.minutes else "a moment"
    report(f"building {program.what} from its Go modules: once per version, {span}; kept in {home}")
    log = home.with_name(home.name + ".log")
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="build-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        output = tree / program.name
        # The caller's own Go settings must not decide what is built here, nor let go.mod be rewritten.
        env = {k: v for k, v in os.environ.items() if k not in ("GOOS", "GOARCH")}
        env |= {"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly"}
        command = [str(go), "build", "-v", *program.flags, "-o", str(output), program.package]
        started = time.monotonic()
        code = _run(command, program, env, log, report)
        if code != 0:
            raise DevclusterError(f"building {program.what} failed (exit {code}); the end of {log}:\n{_tail(log)}")
        _check(program, output)
        for link in program.links:
            (tree / link).symlink_to(program.name)
        tree.rename(home)
        report(f"{program.what} built in {time.monotonic() - started:.0f} s")


def _run(command: list[str], program: Program, env: dict[str, str], log: Path, report: Report) -> int:
    """Runs the build, telling every few seconds how far it is."""
    started = time.monotonic()
    with log.open("w") as out:
        child = subprocess.Popen(command, cwd=program.folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            while True:
                try:
                    return child.wait(PROGRESS_SECONDS)
                except subprocess.TimeoutExpired:
                    report(f"  {program.name}: {time.monotonic() - started:4.0f} s, {_doing(log)}")
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def _doing(log: Path) -> str:
    """What the build is at: `go build -v` names each module it loads and each package it compiles."""
    lines = log.read_text(errors="replace").splitlines()
    compiled = sum(not line.startswith("go: ") for line in lines)
    if compiled:
        return f"{compiled} packages compiled"
    return f"loading modules ({len(lines)})" if lines else "compiling"


def _check(program: Program, output: Path) -> None:
    if not program.smoke:
        return
    done = subprocess.run([output, *program.smoke], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevclusterError(f"the built {program.name} does not run: {done.stderr.strip() or done.stdout.strip()}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
