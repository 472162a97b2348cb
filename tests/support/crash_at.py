"""The product as it is, killed at the nth operation of one kind on one path: an audit hook of the interpreter looks, no code of ours knows.

`python -m tests.support.crash_at EVENT PATTERN NTH MARKER`: SIGKILL just before the NTH event (docs.python.org/3/library/audit_events.html)
whose first argument matches PATTERN, unless MARKER exists. MARKER then names the sandboxes that were there.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from controller.__main__ import cli

DRAFT = ".new-"


def arm(event: str, pattern: str, nth: int, marker: Path) -> None:
    """From now on."""
    wanted, count, boxes = re.compile(pattern), itertools.count(1), Path(os.environ["SBX_ROOT"]) / "boxes"

    def hook(happening: str, args: tuple[Any, ...]) -> None:
        if (
            happening != event
            or not isinstance(args[0], str | os.PathLike)
            or wanted.search(os.fspath(args[0])) is None
        ):
            return
        if next(count) == nth:
            names = sorted(name.removeprefix(DRAFT) for name in os.listdir(boxes))
            marker.write_text("".join(f"{name}\n" for name in names))
            os.kill(os.getpid(), signal.SIGKILL)

    if not marker.exists():
        sys.addaudithook(hook)


if __name__ == "__main__":
    arm(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    cli(["run", "--role", "all"])
