"""Trees of files made from Debian packages, without installing anything on this machine.

apt resolves against an empty system, with the machine's own sources and keys and lists of our own; the packages are only
unpacked. Their scripts do not run: `_settle` does the little of it that our trees need. For `devcluster.node` only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from devcluster.errors import DevclusterError

TOOLS = ("apt-get", "dpkg-deb", "tar", "chroot")
# What no tree needs: documentation, translations, the package system's own records.
UNWANTED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "var/lib/dpkg")
# Links that the packages' scripts would make.
LINKS = {"usr/bin/sh": "dash", "usr/bin/awk": "mawk", "usr/bin/which": "which.debianutils"}
USER = "sandbox:x:1000:1000:sandbox:/home/sandbox:/bin/bash"


class Packages:
    """The packages that this machine's sources offer now. Everything is kept in `folder`, which must not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._archives = folder / "archives"
        for made in (folder / "lists" / "partial", self._archives / "partial"):
            made.mkdir(parents=True)
        (folder / "status").touch()
        options = {
            "Dir::State::status": folder / "status",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache::archives": self._archives,
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Debug::NoLocking": "1",
            "APT::Sandbox::User": "root",
            "Acquire::Retries": "2",
        }
        self._apt = ["apt-get", "-q", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
        done = _run([*self._apt, "update"], "could not read the lists of Debian packages")
        # A source that cannot be reached is only a warning to apt.
        if not list((folder / "lists").glob("*_Packages*")):
            warnings = [line for line in done.splitlines() if line.startswith(("W:", "Err:"))]
            raise DevclusterError(
                f"no list of Debian packages can be fetched; is there a network? {' '.join(warnings[:1])}"
            )

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Downloads packages and all that they depend on, and nothing else."""
        install = [*self._apt, "install", "--yes", "--no-install-recommends", *names]
        _run([*install, "--download-only"], "could not fetch Debian packages")
        listed = _run([*install, "--simulate"], "could not list Debian packages")
        # One line per package: Inst coreutils (9.1-1 Debian:12.14/stable [amd64])
        wanted = re.findall(r"^Inst (\S+) \((\S+) [^\n]*\[(\w+)\]\)", listed, re.MULTILINE)
        return [self._archives / f"{name}_{version.replace(':', '%3a')}_{arch}.deb" for name, version, arch in wanted]


def unpack(packages: Sequence[Path], tree: Path) -> None:
    """Unpacks all of them into `tree`, as one merged-/usr system with a user 1000."""
    tree.mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for package in packages:
        data = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        done = subprocess.run(
            ["tar", "--extract", "--keep-directory-symlink", "--directory", tree],
            stdin=data.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
        if data.wait() or done.returncode:
            raise DevclusterError(f"could not unpack {package.name}: {done.stderr.strip()}")
    _settle(tree)


def in_tree(tree: Path, *command: str) -> None:
    """Runs a program of the tree with the tree as its root."""
    _run(["chroot", str(tree), *command], f"{command[0]} failed in a tree of packages")


def _settle(tree: Path) -> None:
    for name in UNWANTED:
        shutil.rmtree(tree / name, ignore_errors=True)
    for name, target in LINKS.items():
        link = tree / name
        if not link.is_symlink() and not link.exists() and link.with_name(target).exists():
            link.symlink_to(target)
    masters = tree / "usr" / "share" / "base-passwd"
    for name in ("passwd", "group"):
        line = USER if name == "passwd" else "sandbox:x:1000:"
        known = masters / f"{name}.master"
        text = known.read_text() if known.exists() else ""
        (tree / "etc").mkdir(exist_ok=True)
        (tree / "etc" / name).write_text(f"{text}{line}\n")
    home = tree / "home" / "sandbox"
    home.mkdir(parents=True, exist_ok=True)
    os.chown(home, 1000, 1000)
    if (tree / "usr" / "sbin" / "ldconfig").exists():
        in_tree(tree, "/usr/sbin/ldconfig")
        shutil.rmtree(tree / "var" / "cache" / "ldconfig", ignore_errors=True)  # holds times and inode numbers


def _run(command: Sequence[str | Path], failure: str) -> str:
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env)
    if done.returncode:
        words = done.stdout.strip().splitlines()
        raise DevclusterError(f"{failure}: {' '.join(words[-3:])}")
    return done.stdout
