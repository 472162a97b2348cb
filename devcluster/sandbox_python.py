"""Builds the toolchain of the sandbox template `python`: an interpreter and pytest from a hash-locked file, once.

Kept in the cache, in a folder named by the lock and the interpreter. A jail sees it read-only at /opt/sisu-kodo; its
outer uid must be able to pass every folder above it, hence /var/cache when root's home is closed to others.
Prints the path of the manifest that controller.sbx.templates.load reads.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devcluster.cache import Report, cache_dir, locked, open_to_all, say
from devcluster.errors import DevclusterError

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "sandbox-python.lock"
LAYOUT = "1"  # raise it when this module arranges the folder differently
VENV = "/opt/sisu-kodo/venv"
OLDEST = (3, 11)
SYSTEM = Path("/usr/bin/python3")
# Parts of a Python installation that no task needs, most of its size.
UNWANTED = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "config-*", "*.a"
)
ASK = (
    "import json, platform, sys; print(json.dumps([platform.python_version(), sys.base_prefix, sys._base_executable]))"
)


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """`prefix` must be there under the same path inside the jail: executables find their library and modules by it."""

    version: str
    prefix: Path
    executable: Path

    @property
    def minor(self) -> str:
        """As in `python3.11`."""
        return ".".join(self.version.split(".")[:2])

    @property
    def of_system(self) -> bool:
        """Whether every jail has it anyway, with /usr."""
        return self.prefix == Path("/usr")


def toolchain(
    *, python: Path | None = None, cache: Path | None = None, lock: Path = LOCK, report: Report = say
) -> Path:
    """The manifest's path; builds what is missing. `python` is the host's /usr/bin/python3 if new enough, else our own."""
    interpreter = _inspect(python) if python else _choose()
    identity = {"lock": hashlib.sha256(lock.read_bytes()).hexdigest(), "python": interpreter.version}
    name = hashlib.sha256(json.dumps([LAYOUT, identity, str(interpreter.prefix)]).encode()).hexdigest()[:16]
    home = (cache or _open_cache()) / "sandbox-python" / name
    if not (home / "manifest.json").exists():
        with locked(home.with_name(home.name + ".lock"), report=report):
            if not (home / "manifest.json").exists():
                report(f"building the sandbox toolchain `python` ({interpreter.version}), once, in {home}")
                _build(home, interpreter, identity, lock)
    return home / "manifest.json"


def _choose() -> Interpreter:
    if SYSTEM.exists():
        found = _inspect(SYSTEM)
        if found.of_system and tuple(map(int, found.minor.split("."))) >= OLDEST:
            return found
    return _inspect(Path(sys.executable))


def _inspect(python: Path) -> Interpreter:
    done = subprocess.run([python, "-I", "-c", ASK], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevclusterError(f"{python} does not run: {done.stderr.strip()}")
    version, prefix, executable = json.loads(done.stdout)
    return Interpreter(version=version, prefix=Path(prefix).resolve(), executable=Path(executable).resolve())


def _open_cache() -> Path:
    """The cache, or /var/cache/sisu-kodo when root has it in a home that other users cannot pass."""
    chosen = cache_dir()
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen if open_to_all(chosen) or os.geteuid() != 0 else Path("/var/cache/sisu-kodo")


def _build(home: Path, interpreter: Interpreter, identity: dict[str, str], lock: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir(mode=0o755)
        _venv(tree / "venv", interpreter, lock)
        binds = {str(home / "venv"): VENV}
        if not interpreter.of_system:
            _copy(interpreter, tree / "base")
            binds[str(home / "base")] = str(interpreter.prefix)
        manifest = {"name": "python", "identity": identity, "binds": binds, "path": [f"{VENV}/bin"], "env": {}}
        (tree / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        subprocess.run(["chmod", "-R", "a+rX,go-w", str(tree)], check=True)
        shutil.rmtree(home, ignore_errors=True)  # of a build that was killed between two steps
        tree.rename(home)


def _venv(venv: Path, interpreter: Interpreter, lock: Path) -> None:
    """A virtual environment for its place inside the jail, so not made by `venv`, which writes the place where it runs."""
    packages = venv / "lib" / f"python{interpreter.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (venv / "bin").mkdir()
    for name in ("python", "python3", f"python{interpreter.minor}"):
        (venv / "bin" / name).symlink_to(interpreter.executable)
    (venv / "pyvenv.cfg").write_text(f"home = {interpreter.executable.parent}\nversion = {interpreter.version}\n")
    with tempfile.TemporaryDirectory(prefix="sisu-kodo-pip-") as scratch:
        argv = [
            *_pip(Path(scratch)),
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-cache-dir",
            "--require-hashes",
        ]
        argv += ["--no-deps", "--only-binary", ":all:", "--python-version", interpreter.minor, "--no-compile"]
        done = subprocess.run(
            [*argv, "--target", str(packages), "--requirement", str(lock)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise DevclusterError(f"could not install {lock.name} for the sandbox: {done.stderr.strip()}")
    _scripts(packages / "bin", venv / "bin")
    # The jail's view is read-only: without byte code every task would compile pytest again.
    compile_ = [str(interpreter.executable), "-I", "-m", "compileall", "-q", "-s", str(venv), "-p", VENV]
    subprocess.run([*compile_, "--invalidation-mode", "unchecked-hash", str(packages)], check=True)


def _scripts(source: Path, target: Path) -> None:
    """pip wrote its own interpreter into the first line."""
    for script in source.iterdir():
        _, _, body = script.read_text().partition("\n")
        (target / script.name).write_text(f"#!{VENV}/bin/python\n{body}")
        (target / script.name).chmod(0o755)
    shutil.rmtree(source)


def _pip(scratch: Path) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", str(scratch / "venv")], check=True)
    return [str(scratch / "venv" / "bin" / "python"), "-m", "pip"]


def _copy(interpreter: Interpreter, base: Path) -> None:
    """The interpreter's own installation: it may lie where the outer uid cannot go, such as /root/.pyenv."""
    for folder in ("bin", "lib"):
        shutil.copytree(interpreter.prefix / folder, base / folder, symlinks=True, ignore=UNWANTED)
    (base / "lib" / f"python{interpreter.minor}" / "site-packages").mkdir(exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", type=Path, help="the interpreter to offer (default: /usr/bin/python3 when it is 3.11 or newer)"
    )
    parser.add_argument("--cache", type=Path, help="where to keep it (default: $SISUKODO_CACHE, or the user's cache)")
    options = parser.parse_args()
    try:
        print(toolchain(python=options.python, cache=options.cache))
    except DevclusterError as e:
        sys.exit(f"sandbox_python: {e}")


if __name__ == "__main__":
    main()
