"""Everything that the product runs on, plus the product: control plane, a node if wanted, PostgreSQL, chart, people, controller.

Tests, the demo and the bench use it as children that end with them; `make up` detaches it. One state directory holds it all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from devcluster import ocdaemon
from devcluster.cache import open_to_all
from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.install import apply_chart, apply_people
from devcluster.node import Node
from devcluster.postgres import Postgres
from devcluster.processes import Child, spawn, tail
from devcluster.sandbox_python import toolchain

ROOT = Path(__file__).resolve().parent.parent
POLICY = "sisu-kodo-policy"
ENFORCED_SECONDS = 30.0


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory that unprivileged sandboxes and PostgreSQL's user can pass, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="sisu-kodo-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class Controller:
    """One `python -m controller run`. `admin` is the base URL of its health and metrics, known once it has written `port_file`."""

    child: Child
    log: Path
    admin: str = ""
    port_file: Path | None = None

    def ready(self) -> bool:
        """/readyz says 200."""
        if not self.admin and self.port_file is not None and self.port_file.exists():
            port = self.port_file.read_text().strip()
            self.admin = f"http://127.0.0.1:{port}" if port else ""
        return self.get("/readyz")[0] == 200

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of one admin request; status 0 when nothing answers."""
        if not self.admin:
            return 0, "it has not told its port"
        try:
            with urllib.request.urlopen(self.admin + path, timeout=3) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()
        except OSError as e:
            return 0, str(e)

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power would."""
        self.child.stop()

    def stop(self) -> float:
        """SIGTERM; how many seconds it took."""
        began = time.monotonic()
        self.child.stop((signal.SIGTERM, 10.0))
        return time.monotonic() - began


@dataclass
class Stack:
    """`with Stack(state) as stack:`. `policy` replaces the chart's namespace policy, `database_url` our own PostgreSQL.

    With `node`, `machine` is a real node that runs Pods; that needs root.
    """

    state: Path
    detach: bool = False
    fsync: bool = True
    policy: Mapping[str, object] | None = None
    sets: tuple[str, ...] = ()
    database_url: str = ""
    node: bool = False
    cluster: ControlPlane = field(init=False)
    machine: Node = field(init=False)
    postgres: Postgres | None = field(init=False, default=None)
    database: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        self.cluster = ControlPlane(self.state, detach=self.detach, node=self.node)
        self.machine = Node(self.cluster, detach=self.detach)
        if self.node:
            self.sets = ("sandbox.provider=kubernetes", *self.sets)

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        if not self.detach:
            self.wipe()

    def start(self) -> None:
        """Bring up everything but the controller."""
        if not self.cluster.running:
            self.cluster.start()
        if self.node:
            self.machine.start()
        self.database = self.database_url
        if not self.database:
            self.postgres = Postgres(self.state, fsync=self.fsync, detach=self.detach)
            if not self.postgres.running:
                self.postgres.start()
            self.database = self.postgres.dsn
        self.install()

    def install(self) -> None:
        """Chart, people, schema and policy; returns once admission is in force."""
        apply_chart(self.cluster, sets=self.sets)
        apply_people(self.cluster)
        self.migrate(self.database)
        self.write_policy()
        self.wait_enforced()

    def pods(self) -> dict[str, str]:
        """A worker's settings that make its sandboxes Pods on the node; the chart has given it the rights."""
        return {
            "SBX_MODE": "live",
            "SBX_PROVIDER": "kubernetes",
            "SBX_TOOLCHAINS": "",
            "SBX_KUBERNETES_TEMPLATES": f"python={self.machine.images.reference('python')}",
        }

    def sandboxes(self) -> Path:
        """Where local sandboxes keep their files: in `state`, or, when that is closed to their users, behind a link from it."""
        place = self.state / "sandboxes"
        if not place.exists() and os.geteuid() == 0 and not open_to_all(self.state):
            place.symlink_to(tempfile.mkdtemp(prefix="sisu-kodo-sandboxes-", dir="/var/tmp"))
            place.resolve().chmod(0o711)
        return place.resolve()

    def wipe(self) -> None:
        """Remove everything that a stopped stack has left in its directory."""
        self.machine.wipe()
        self.cluster.wipe()
        if self.postgres is not None:
            self.postgres.wipe()
        shutil.rmtree((self.state / "sandboxes").resolve(), ignore_errors=True)
        shutil.rmtree(self.state / "git", ignore_errors=True)
        shutil.rmtree(self.state / ocdaemon.HOME, ignore_errors=True)
        ours = ("sandboxes", "controller.json", "controller.log", "controller.port", "policy.yaml", "env")
        for name in (*ours, *ocdaemon.LEFTOVERS):
            (self.state / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """End it all; nothing is left running."""
        try:
            self.machine.stop()
        finally:
            self.cluster.stop()
            if self.postgres is not None:
                self.postgres.stop()

    def kubectl(
        self, *args: str, user: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as admin, alice, bob, carol or controller."""
        return self.cluster.kubectl(*args, identity=user, stdin=stdin, check=check)

    def kubeconfig(self, name: str) -> Path:
        """Path of somebody's kubeconfig."""
        return self.cluster.kubeconfig(name)

    def migrate(self, database: str) -> None:
        """`python -m controller migrate`."""
        done = subprocess.run(
            [sys.executable, "-m", "controller", "migrate", "--database-url", database],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise DevclusterError(f"migrate failed: {done.stderr.strip()}")

    def write_policy(self) -> Path:
        """The namespace policy as the chart's ConfigMap has it, where the controller's pod would have it mounted."""
        path = self.state / "policy.yaml"
        if self.policy is not None:
            path.write_text(yaml.safe_dump(dict(self.policy)))
            return path
        got = self.kubectl("get", "configmap", POLICY, "-n", "sisu-kodo-system", "-o", "json")
        path.write_text(json.loads(got.stdout)["data"]["policy.yaml"])
        return path

    def wait_enforced(self) -> None:
        """Until admission works: policies, and the API server's own map of our kinds, take some seconds after they are applied.

        A forged Intent must be denied (validating policy), and one without requestedBy admitted (mutating policy).
        """
        intent = {
            "apiVersion": "sisukodo.dev/v1alpha1",
            "kind": "Intent",
            "metadata": {"name": "probe", "namespace": "default"},
        }
        honest = {**intent, "spec": {"goal": "probe"}}
        forged = {**intent, "spec": {"goal": "probe", "requestedBy": "nobody@corp"}}
        deadline = time.monotonic() + ENFORCED_SECONDS
        while True:
            denied = self._dry_run(forged)
            admitted = self._dry_run(honest)
            if "requestedBy" in denied and admitted == "":
                return
            if time.monotonic() > deadline:
                raise DevclusterError(
                    f"admission is not in force: forged: {denied or 'admitted'}; honest: {admitted or 'admitted'}"
                )
            time.sleep(0.2)

    def _dry_run(self, body: Mapping[str, object]) -> str:
        answer = self.kubectl(
            "create", "--dry-run=server", "-f", "-", user="carol", stdin=json.dumps(body), check=False
        )
        return "" if answer.returncode == 0 else answer.stderr.strip()

    def environment(self, **settings: str) -> dict[str, str]:
        """The controller's settings on this stack; keyword arguments replace any of them."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.state),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RANDOM_SEED": "42",
            "OC_MODE": "replay",
            "OC_FIXTURES": str(ROOT / "opencode" / "fixtures"),
            "SBX_MODE": "mock",
            "SBX_PROVIDER": "local",
            "SBX_ROOT": settings.get("SBX_ROOT") or str(self.sandboxes()),
            "WORKSPACE_ROOT": str(self.state / "git"),
            "WORKSPACE_ALLOW_LOOPBACK_HTTP": "true",
            "POLICY_FILE": str(self.state / "policy.yaml"),
            "KUBECONFIG": str(self.kubeconfig("controller")),
            "DATABASE_URL": self.database,
            "ADMIN_HOST": "127.0.0.1",
            "ADMIN_PORT": "0",
            **settings,
        }

    def controller(
        self, *, name: str = "controller", role: str = "all", program: Sequence[str] = (), **settings: str
    ) -> Controller:
        """Start the product as its own process and wait until it is ready.

        `program` replaces `-m controller run --role ROLE`: a test's own composition of the same parts.
        """
        started = self.begin(name=name, role=role, program=program, **settings)
        deadline = time.monotonic() + 30
        while not started.ready():
            if not started.child.alive() or time.monotonic() > deadline:
                said = started.get("/readyz")
                raise DevclusterError(
                    f"{name} is not ready: {said}; the end of {started.log}:\n{tail(started.log, 30)}"
                )
            time.sleep(0.05)
        return started

    def begin(
        self, *, name: str = "controller", role: str = "all", program: Sequence[str] = (), **settings: str
    ) -> Controller:
        """The same without waiting. From the main thread: the process ends with the thread that starts it."""
        log = self.state / f"{name}.log"
        port_file = self.state / f"{name}.port"
        port_file.unlink(missing_ok=True)
        if settings.get("SBX_MODE") == "live" and "SBX_TOOLCHAINS" not in settings:
            settings["SBX_TOOLCHAINS"] = str(toolchain())
        child = spawn(
            name,
            [sys.executable, *(program or ("-m", "controller", "run", "--role", role))],
            log=log,
            detach=self.detach,
            cwd=ROOT,
            death=signal.SIGTERM,
            env=self.environment(**{"ADMIN_PORT_FILE": str(port_file), "POD_NAME": name, **settings}),
        )
        return Controller(child=child, log=log, port_file=port_file)
