"""Installs the pinned OpenCode daemon (opencode.version) into the cache, outside the checkout. Needs npm, once.

`python -m opencode.install` prints the binary's path; `ensure()` is the same for tests and `make oc-daemon-up`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from devcluster.cache import cache_dir, locked

HERE = Path(__file__).parent
VERSION = (HERE / "opencode.version").read_text().strip()
CONFIG = HERE / "opencode.json"
# Of bin/opencode in the package, so that a changed package under the same version is noticed.
SHA256 = {("opencode-linux-x64", "1.18.33"): "0abbb7c32ab0294c0a7bfa2705f9ff0df5dce5ab721d1f00cccfe393f2a11427"}
INSTALL_SECONDS = 300


class InstallError(Exception):
    """One line that says what is missing and what to do."""


def package() -> str:
    """npm's package with the daemon for this machine."""
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine().lower())
    system = {"linux": "linux", "darwin": "darwin"}.get(sys.platform)
    if machine is None or system is None:
        raise InstallError(f"there is no OpenCode daemon for {sys.platform} on {platform.machine()}")
    return f"opencode-{system}-{machine}"


def ensure() -> Path:
    """The binary's path, installed if need be. Raises InstallError."""
    name = package()
    folder = cache_dir() / "opencode" / f"{name}-{VERSION}"
    binary = folder / "node_modules" / name / "bin" / "opencode"
    if binary.is_file():
        return binary
    with locked(folder.with_suffix(".lock")):
        if not binary.is_file():
            _install(name, folder)
    return binary


def _install(name: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InstallError(f"npm is not on PATH: install Node.js 20 or newer, or put OpenCode {VERSION} at {folder}")
    with tempfile.TemporaryDirectory(prefix="opencode-", dir=folder.parent) as scratch:
        command = [
            npm,
            "install",
            "--prefix",
            scratch,
            "--no-save",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            f"{name}@{VERSION}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as e:
            raise InstallError(
                f"npm did not install {name}@{VERSION} within {INSTALL_SECONDS} s; is the registry reachable?"
            ) from e
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
            raise InstallError(f"npm could not install {name}@{VERSION}: {errors[0] if errors else done.stderr[-200:]}")
        made = Path(scratch) / "node_modules" / name / "bin" / "opencode"
        _verify(made, SHA256.get((name, VERSION)))
        os.chmod(scratch, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder, symlinks=True)


def _verify(binary: Path, want: str | None) -> None:
    if not binary.is_file():
        raise InstallError(f"the package holds no {binary.name}")
    with binary.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if want is not None and found != want:
        raise InstallError(f"{binary.name} {VERSION} has sha256 {found}, but {want} is pinned in opencode/install.py")


def main() -> None:
    """Print the path, or one line of what is wrong."""
    try:
        print(ensure())
    except InstallError as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
