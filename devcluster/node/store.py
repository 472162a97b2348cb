"""containerd's directory with the images unpacked in it: made by the first node, given to every later one in no time.

Files are hard links where the file system allows it: neither containerd nor an overlay ever changes one. Databases are copied;
containerd must not run meanwhile.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from devcluster.cache import locked
from devcluster.errors import DevclusterError


def keep(disk: Path, store: Path) -> None:
    """Makes `store` from a node's directory, unless somebody else was first."""
    with locked(store.with_name(store.name + ".lock")):
        if store.exists():
            return
        with tempfile.TemporaryDirectory(dir=store.parent, prefix="keep-") as scratch:
            give(disk, Path(scratch) / "store")
            (Path(scratch) / "store").rename(store)


def give(store: Path, disk: Path) -> None:
    """Makes a new node's directory from `store`."""
    linked = subprocess.run(["cp", "--archive", "--link", store, disk], capture_output=True, text=True, check=False)
    if linked.returncode != 0:  # another file system
        shutil.rmtree(disk, ignore_errors=True)
        copied = subprocess.run(["cp", "--archive", store, disk], capture_output=True, text=True, check=False)
        if copied.returncode != 0:
            raise DevclusterError(f"could not copy {store} to {disk}: {copied.stderr.strip()}")
    for database in disk.glob("*/*.db"):
        fresh = database.with_name("fresh")
        shutil.copy2(database, fresh)
        fresh.replace(database)
