"""The sandboxes of this host as directories: whose they are, whether they live, which jail runs in them now.

    <root>/boxes/<id>/ owner.json   the mark; written before the directory gets its name
                       alive        flock held by the controller process that runs the sandbox: free means that it is dead
                       gate         flock held while a jail is started or the box is killed, so that neither slips past the other
                       jail.json    pid and start time of the present jail's init
                       killed       this fence must start nothing more
                       rw/          workspace, output and tmp of the task, owned by its outer uid
    <root>/uids/<uid>  flock: one sandbox per outer uid
    <root>/making      flock: shared from a box's first directory entry to its `alive`, so that whoever has it alone sees no box in between

One root serves all controllers of one host (one PID namespace).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from controller.core.errors import Unavailable
from controller.core.model import Owner
from controller.sbx import jail, processes

DRAFT = ".new-"  # a box whose mark is still being written


class NoFreeUid(Unavailable):
    """As many sandboxes run as there are outer uids."""


def _flock(path: Path, *, wait: bool, shared: bool = False) -> int | None:
    """An open descriptor that holds the lock, or None when somebody else does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@dataclass(frozen=True, kw_only=True)
class Box:
    """One sandbox's directory."""

    directory: Path
    owner: Owner

    @property
    def name(self) -> str:
        """Also the name of its cgroup."""
        return self.directory.name

    @property
    def tree(self) -> Path:
        """All that the task can write."""
        return self.directory / "rw"

    def killed(self) -> bool:
        """Whether its fence was killed, by this or another process."""
        return (self.directory / "killed").exists()

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Exclusive among processes and threads."""
        fd = _flock(self.directory / "gate", wait=True)
        assert fd is not None
        try:
            yield
        finally:
            os.close(fd)

    def enter(self, process: processes.Process) -> None:
        """Records the jail that runs now. Only inside the gate."""
        (self.directory / "jail.json").write_text(json.dumps(asdict(process)))

    def jail(self) -> processes.Process | None:
        """The last jail that was recorded."""
        try:
            return processes.Process(**json.loads((self.directory / "jail.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def kill(self) -> None:
        """Nothing starts in it from here on; what runs in it is dead on return."""
        with self.gate():
            (self.directory / "killed").touch()
            if found := self.jail():
                processes.kill(found)

    def abandoned(self) -> bool:
        """Whether the controller that made it is dead."""
        fd = _flock(self.directory / "alive", wait=False)
        if fd is None:
            return False
        os.close(fd)
        return True

    def jail_lives(self) -> bool:
        """Whether its last jail's init still runs."""
        found = self.jail()
        return found is not None and processes.lives(found)


class Boxes:
    """The registry under one root directory. Thread-safe: its state is the file system's."""

    def __init__(self, root: Path, *, uids: Sequence[int]) -> None:
        self._root = root
        self._uids = uids
        self.accounts = root / "etc"
        for directory in (root, root / "boxes"):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        (root / "uids").mkdir(mode=0o700, exist_ok=True)
        jail.write_accounts(self.accounts)

    @contextlib.contextmanager
    def uid(self) -> Iterator[int | None]:
        """An outer uid that no other sandbox of this host has; None when we are not root. Raises NoFreeUid."""
        if not self._uids:
            yield None
            return
        first = secrets.randbelow(len(self._uids))
        for number in (*self._uids[first:], *self._uids[:first]):
            fd = _flock(self._root / "uids" / str(number), wait=False)
            if fd is not None:
                try:
                    yield number
                finally:
                    os.close(fd)
                return
        raise NoFreeUid(f"all {len(self._uids)} outer uids of {self._root} are taken")

    @contextlib.contextmanager
    def create(self, owner: Owner, *, uid: int | None) -> Iterator[Box]:
        """A new box, gone at the end."""
        draft = self._root / "boxes" / f"{DRAFT}{secrets.token_hex(8)}"
        with self._making(shared=True):
            draft.mkdir(mode=0o711)
            alive = _flock(draft / "alive", wait=False)
        assert alive is not None
        box = Box(directory=draft.with_name(draft.name.removeprefix(DRAFT)), owner=owner)
        try:
            (draft / "owner.json").write_text(json.dumps(asdict(owner)))
            (draft / "rw").mkdir(mode=0o711)
            for name in ("workspace", "output", "tmp"):
                (draft / "rw" / name).mkdir(mode=0o700)
                if uid is not None:
                    os.chown(draft / "rw" / name, uid, uid)
            draft.rename(box.directory)
            yield box
        finally:
            for directory in (draft, box.directory):
                remove(directory)
            os.close(alive)

    def all(self) -> list[Box]:
        """Every box that has its name, dead or alive."""
        found = []
        for directory in (self._root / "boxes").iterdir():
            with contextlib.suppress(OSError, ValueError, TypeError):
                if not directory.name.startswith(DRAFT):
                    owner = Owner(**json.loads((directory / "owner.json").read_text()))
                    found.append(Box(directory=directory, owner=owner))
        return found

    def sweep(self, forget: Callable[[str], None]) -> int:
        """Removes what dead controllers left, killing first. `forget` is told each name. Returns how many."""
        nobody = Owner(store_id="", run_id="", task_key="", attempt=0, fence=0)
        with self._making(shared=False):
            boxes = [Box(directory=directory, owner=nobody) for directory in (self._root / "boxes").iterdir()]
            dead = [box for box in boxes if _orphaned(box)]
        count = 0
        for box in dead:
            with contextlib.suppress(FileNotFoundError):  # another sweeper was faster
                box.kill()
                forget(box.name)
                remove(box.directory)
                count += 1
        return count

    @contextlib.contextmanager
    def _making(self, *, shared: bool) -> Iterator[None]:
        fd = _flock(self._root / "making", wait=True, shared=shared)
        assert fd is not None
        try:
            yield
        finally:
            os.close(fd)


def _orphaned(box: Box) -> bool:
    try:
        return box.abandoned()
    except FileNotFoundError:
        return False  # its owner has just removed it


def remove(directory: Path) -> None:
    """Deletes a tree that a hostile task may have made: too deep for recursion, or without permissions."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        # coreutils walk any depth; chmod first, for directories that their owner (we, when not root) may not list.
        for argv in (["/usr/bin/chmod", "-R", "u+rwx"], ["/usr/bin/rm", "-rf", "--one-file-system"]):
            subprocess.run([*argv, "--", str(directory)], capture_output=True, check=False, env={})
