"""Where built things and long-lived state are kept: outside the checkout, shared by all checkouts of one user.

Also the lock that keeps two processes from building or starting the same thing at once.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Report = Callable[[str], None]


def say(line: str) -> None:
    """The default report: one line to standard error, at once."""
    print(line, file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """`$SISUKODO_CACHE`, else `$XDG_CACHE_HOME/sisu-kodo`, else `~/.cache/sisu-kodo`. Not created here."""
    if own := os.environ.get("SISUKODO_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG specification says that a relative path is to be ignored.
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and Path(xdg).is_absolute():
        return Path(xdg) / "sisu-kodo"
    return Path.home() / ".cache" / "sisu-kodo"


def open_to_all(path: Path) -> bool:
    """Whether other users, sandboxes among them, can pass every folder down to `path`, as far as they exist."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.absolute().parents) if folder.exists())


@contextmanager
def locked(path: Path, *, report: Report = say) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; the kernel drops it if the holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
