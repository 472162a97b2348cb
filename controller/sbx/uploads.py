"""What goes into a sandbox: the files that a request names by sha256, checked before anything is started.

Shared by every provider. Also the start log, the tests' oracle of how often a command was started.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from controller.core.contract import SBXReq
from controller.core.model import Owner


class Verifier:
    """Compares bytes with their sha256, remembering the last few objects: a fan-out sends one archive 1,000 times."""

    def __init__(self, *, remember: int = 4) -> None:
        self._remember = remember
        self._seen: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def complaint(self, request: SBXReq, files: Mapping[str, bytes]) -> str | None:
        """What is wrong with the files that the request names, or None."""
        for wanted in request.files_in:
            content = files.get(wanted.sha256)
            if content is None:
                return f"the {wanted.kind} {wanted.sha256} was not given"
            if not self._matches(wanted.sha256, content):
                return f"the bytes of the {wanted.kind} do not match its sha256 {wanted.sha256}"
        return None

    def _matches(self, sha256: str, content: bytes) -> bool:
        with self._lock:
            if self._seen.get(sha256) is content:
                return True
        if hashlib.sha256(content).hexdigest() != sha256:
            return False
        with self._lock:
            self._seen[sha256] = content
            while len(self._seen) > self._remember:
                self._seen.popitem(last=False)
        return True


def log_start(path: Path | None, owner: Owner) -> None:
    """Appends `task_key attempt fence` in one write, which O_APPEND keeps whole among processes."""
    if path is None:
        return
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, f"{owner.task_key} {owner.attempt} {owner.fence}\n".encode())
    finally:
        os.close(fd)
