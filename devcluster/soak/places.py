"""Where sandboxes are made in a soak. A provider is one class: its settings, its own failures, and what is left of it on its side.

To add one: a class with these eight names, and its entry in PLACES.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import psycopg

from controller.core.model import Owner
from controller.sbx import templates
from controller.sbx.boxes import DRAFT, Box, Boxes
from controller.sbx.e2b_api import owner_of
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_pod import PodSettings
from controller.sbx.limits import CgroupTree
from devcluster.e2b.api import Server, application
from devcluster.e2b.faults import Fault
from devcluster.e2b.host import Host
from devcluster.sandbox_python import toolchain
from devcluster.soak.rows import Window
from devcluster.stack import Stack
from devcluster.trial.api import now
from devcluster.trial.progress import say

Failures = Mapping[str, Callable[[], bool]]
MANY_BOXES = 40
POD_NAMESPACE = "sisu-kodo-sandboxes"
LATE_SECONDS = 15.0  # longer than a lease, and the next attempt's look for the box


class Place(Protocol):
    """One provider. All calls from the main thread."""

    windows: list[Window]  # when it failed on purpose
    sandbox: Mapping[str, str]  # what Intents ask for, beyond the defaults

    def settings(self) -> Mapping[str, str]:
        """A worker's."""

    def failures(self, kill: Callable[[], bool]) -> Failures:
        """What can be done to the provider itself, by name; False: not yet. Once each, in this order. `kill` kills a worker."""

    def look(self) -> None:
        """Called several times a second."""

    def alive(self) -> list[Owner]:
        """Sandboxes that live now: something runs in them, or may still be started."""

    def left(self) -> list[str]:
        """Whatever is there of any sandbox: to be empty in the end."""

    def close(self) -> None:
        """End what was started."""


class Mock:
    """In the worker's memory: dies with it."""

    sandbox: Mapping[str, str] = {}

    def __init__(self, _: Stack) -> None:
        self.windows: list[Window] = []

    def settings(self) -> Mapping[str, str]:
        return {"SBX_MODE": "mock"}

    def failures(self, kill: Callable[[], bool]) -> Failures:
        return {}

    def look(self) -> None:
        """Nothing to see."""

    def alive(self) -> list[Owner]:
        return []

    def left(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing was started."""


class Local:
    """Bubblewrap on this host, one root for all workers. Left are directories, cgroups, and processes that have them mounted."""

    sandbox: Mapping[str, str] = {}

    def __init__(self, stack: Stack) -> None:
        self.windows: list[Window] = []
        self._root = stack.sandboxes() / "soak"
        self._boxes = Boxes(self._root, uids=())
        self._cgroups = CgroupTree.find()
        self._names: set[str] = set()

    def settings(self) -> Mapping[str, str]:
        return {"SBX_MODE": "live", "SBX_PROVIDER": "local", "SBX_ROOT": str(self._root)}

    def failures(self, kill: Callable[[], bool]) -> Failures:
        return {}

    def look(self) -> None:
        """Names of boxes, which are their cgroups' as well: other products' cgroups may stand beside ours."""
        self._names |= {one.name.removeprefix(DRAFT) for one in (self._root / "boxes").iterdir()}

    def alive(self) -> list[Owner]:
        return [one.owner for one in self._boxes.all() if _may_run(one)]

    def left(self) -> list[str]:
        groups = [str(root / name) for root in self._cgroups.roots for name in self._names if (root / name).exists()]
        return [*_on_host(self._root), *groups]

    def close(self) -> None:
        """After a run that was broken off, some cgroups of killed workers are there: nobody came who swept."""
        self.look()
        for name in self._names:
            self._cgroups.named(name).remove()


class E2B:
    """The repository's own E2B-compatible server, in this process; the product's provider and the unmodified SDK talk to it."""

    KEY = "e2b_soak"
    sandbox: Mapping[str, str] = {}

    def __init__(self, stack: Stack) -> None:
        self.windows: list[Window] = []
        self._root, self._generation = stack.sandboxes() / "soak-e2b", 0
        self._root.mkdir(mode=0o711)
        self._parent = f"sisu-kodo-e2b-soak-{os.getpid()}"
        self._server = self._serve(port=0)
        self._plan: list[tuple[Window, list[Fault]]] = []

    def settings(self) -> Mapping[str, str]:
        return {
            "SBX_MODE": "live",
            "SBX_PROVIDER": "e2b",
            "E2B_API_KEY": self.KEY,
            "E2B_API_URL": self._server.url,
            "E2B_SANDBOX_URL": self._server.url,
            "SBX_E2B_TEMPLATES": "python=tmplpython",
        }

    def failures(self, kill: Callable[[], bool]) -> Failures:
        late = [Fault(operation="create", held=LATE_SECONDS, times=4)]
        busy = [Fault(operation="create", status=429, times=3), Fault(operation="create", status=503, times=3)]
        broken = [
            Fault(operation="create", status=500, body="oops"),
            Fault(operation="create", status=500, body="made, but who knows", done=True),
            Fault(operation="list", status=500, body="oops"),
        ]

        def orphan() -> bool:
            """Whoever takes its task over looks for the box before there is one."""
            if not late[0].happened and all(faults is not late for _, faults in self._plan):
                self._fail("E2B made boxes late", late)
            return late[0].happened >= 2 and kill()

        return {
            "E2B answers 429 and 503": lambda: self._fail("E2B answered 429 and 503", busy),
            "E2B answers 500 without JSON": lambda: self._fail("E2B answered 500 without JSON", broken),
            "E2B is restarted": self._restart,
            "E2B makes boxes late, and a worker is killed": orphan,  # last: no restart takes the orphan from the reaper
        }

    def look(self) -> None:
        """A window ends with the last of its failures."""
        for n, (window, faults) in enumerate(self._plan):
            if window.ended == math.inf and all(one.happened >= one.times for one in faults):
                self._plan[n] = (replace(window, ended=now()), faults)
        self.windows = [window for window, _ in self._plan]

    def alive(self) -> list[Owner]:
        owners = (owner_of(one.metadata) for one in list(self._server.host.sandboxes.values()))
        return [owner for owner in owners if owner is not None]

    def left(self) -> list[str]:
        listed = [f"{one.id}: {dict(one.metadata)}" for one in list(self._server.host.sandboxes.values())]
        trees = CgroupTree.find(parent=self._parent)
        return [*listed, *_on_host(self._root, depth="*/boxes/*"), *(f"cgroup {name}" for name in trees.leftovers())]

    def close(self) -> None:
        self._server.__exit__()
        for directory in CgroupTree.find(parent=self._parent).roots:
            with contextlib.suppress(OSError):  # told as left before
                directory.rmdir()

    def _serve(self, *, port: int) -> Server:
        self._generation += 1
        host = Host(
            self._root / str(self._generation),
            templates={"tmplpython": templates.load(toolchain())},
            limit=MANY_BOXES,
            cgroups=self._parent,
        )
        return Server(application(host, key=self.KEY), port=port).__enter__()

    def _fail(self, what: str, faults: list[Fault]) -> bool:
        say(f"  from now on: {what}")
        self._server.faults.plan.extend(faults)
        self._plan.append((Window(what=what, began=now(), ended=math.inf), faults))
        return True

    def _restart(self) -> bool:
        """The port is taken over at once, but every box and every connection of the old server is lost."""
        say("  E2B is restarted: all its boxes are gone")
        old, began = self._server, now()
        old.deaf()
        self._server = self._serve(port=int(old.url.rpartition(":")[2]))
        old.__exit__()
        self._plan.append((Window(what="E2B was restarted", began=began, ended=now()), []))
        return True


class Pods:
    """A Pod per task on the stack's own node, which has the machine's processors: so each task asks for little of one."""

    sandbox: Mapping[str, str] = {"cpu": "50m", "memory": "128Mi"}

    def __init__(self, stack: Stack) -> None:
        self.windows: list[Window] = []
        self._stack = stack
        with psycopg.connect(stack.database) as c:
            self._store_id = str(c.execute("SELECT id FROM app.store").fetchall()[0][0])
        self._provider = KubernetesProvider(
            stack.kubeconfig("admin"), templates={}, pods=PodSettings(namespace=POD_NAMESPACE)
        )

    def settings(self) -> Mapping[str, str]:
        return self._stack.pods()

    def failures(self, kill: Callable[[], bool]) -> Failures:
        return {}

    def look(self) -> None:
        """Nothing to see."""

    def alive(self) -> list[Owner]:
        return list(self._provider.owned(self._store_id))

    def left(self) -> list[str]:
        return self._stack.kubectl("get", "pods", "-n", POD_NAMESPACE, "-o", "name").stdout.split()

    def close(self) -> None:
        self._provider.close()


PLACES: Mapping[str, Callable[[Stack], Place]] = {"local": Local, "e2b": E2B, "kubernetes": Pods}
STACKS: Mapping[str, Mapping[str, Any]] = {"kubernetes": {"node": True}}


def _may_run(box: Box) -> bool:
    """Something runs in it, or could still be started. A box that was killed under a stopped worker only waits to be removed."""
    try:
        return box.jail_lives() or not (box.killed() or box.abandoned())
    except FileNotFoundError:
        return False


def _on_host(root: Path, *, depth: str = "boxes/*") -> list[str]:
    """Directories of boxes under this root, and processes that have one of them mounted."""
    found = [str(one) for one in root.glob(depth)]
    mark = f"{root.parent.name}/{root.name}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or it is nobody's business
            if mark in (process / "mountinfo").read_text():
                found.append(f"{process}: {(process / 'cmdline').read_bytes()!r}")
    return found
