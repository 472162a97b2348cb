"""What NetworkPolicies are worth where they are enforced: kube-router on a real node, sandbox Pods, and a small world to reach.

IPv4 only: the node's Pods have no other address.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode
from controller.sbx.kubernetes_canary import OFF
from devcluster import node
from devcluster.install import apply_chart
from devcluster.node import NodeCluster
from tests.support import kube_router
from tests.support.kube_router import METADATA, PORT, PRIVATE, PUBLIC
from tests.support.sandbox_kit import SANDBOXES, STORE, Kit, eventually, node_kit

pytestmark = pytest.mark.slow
KUBELET, DNS, OPEN = 10250, 53, 8080
CANARY = f"{PRIVATE[0]}:{PORT}"  # the node has no way to the API server's address
CONNECT = """
import json, socket, sys
found = []
for host, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((host, port), timeout=2).close()
        found.append([host, port])
    except OSError:
        pass
print(json.dumps(found))
"""
Place = tuple[str, int]


class Yard:
    """A node, the world behind it, and two neighbours: one that answers as the cluster's DNS does, and one that is nobody."""

    def __init__(self, cluster: NodeCluster) -> None:
        self.cluster = cluster
        dns = self._neighbour("dns", "kube-system", {"k8s-app": "kube-dns"})
        nobody = self._neighbour("nobody", "default", {})
        record = json.loads((cluster.node.home / "keeper.json").read_text())
        self.names: dict[Place, str] = {
            (PUBLIC, PORT): "public",
            (METADATA, PORT): "metadata",
            **{(one, PORT): f"private {one}" for one in PRIVATE},
            (record["address"], KUBELET): "kubelet",
            (dns, DNS): "dns",
            (dns, PORT): "dns, another port",
            (nobody, PORT): "neighbour",
        }
        self.unenforced: list[str] = []
        self.refused = ""

    def _neighbour(self, name: str, namespace: str, labels: dict[str, str]) -> str:
        """A Pod that listens; its address."""
        container = {
            "name": "c",
            "image": self.cluster.image("python"),
            "command": ["python3", "-c", listen(DNS, PORT)],
        }
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
        meta = {"name": name, "namespace": namespace, "labels": labels}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
        look = ("get", "pod", name, "-n", namespace, "-o", "jsonpath={.status.podIP}")
        return str(eventually(lambda: self.cluster.kubectl(*look).stdout, seconds=60))

    def reached(self, kit: Kit, mode: Any) -> list[str]:
        """What a task with this egress can connect to."""
        out = kit.run(connect(list(self.names)), egress=Egress(mode=mode), timeout_ms=60_000)
        assert out.res.err_code is ErrCode.NONE, out.res.stderr
        return [self.names[host, port] for host, port in json.loads(out.res.stdout)]


def listen(*ports: int) -> str:
    return f"""
import selectors, socket
ready = selectors.DefaultSelector()
for port in {ports}:
    ready.register(socket.create_server(("", port), backlog=512), selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        key.fileobj.accept()[0].close()
"""


def connect(places: Sequence[Place]) -> str:
    return f"python3 -c '{CONNECT}' '{json.dumps(places)}'"


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """Enforced from the second test on; what was reached before that is kept."""
    if reason := node.missing() or kube_router.missing():
        pytest.skip(f"no enforced network: {reason}")
    cluster, folder = NodeCluster(tmp_path_factory.mktemp("walled")), tmp_path_factory.mktemp("world")
    try:
        with cluster, kube_router.world(cluster, folder):
            apply_chart(cluster.control_plane, sets=("sandbox.provider=kubernetes",))
            made = Yard(cluster)
            folder.joinpath("starts").touch()
            with node_kit(cluster, folder, canary=OFF) as kit:
                made.unenforced = made.reached(kit, "None")
            with node_kit(cluster, folder, canary=CANARY) as kit:
                made.refused = kit.run("true").res.stderr
            with kube_router.running(cluster):
                yield made
    finally:
        cluster.wipe()


@pytest.fixture
def kit(yard: Yard, root: Path) -> Iterator[Kit]:
    with node_kit(yard.cluster, root, canary=CANARY) as found:
        yield found


def test_without_enforcement_all_of_it_is_within_reach(yard: Yard) -> None:
    assert yard.unenforced == list(yard.names.values())


def test_without_enforcement_no_command_begins(yard: Yard) -> None:
    assert (
        f"the network of the Pod is not held: it still reaches {CANARY}, which its egress does not allow"
        in yard.refused
    )


def test_egress_none_reaches_nothing(kit: Kit, yard: Yard) -> None:
    assert yard.reached(kit, "None") == []


def test_egress_public_reaches_the_world_and_the_clusters_dns(kit: Kit, yard: Yard) -> None:
    assert yard.reached(kit, "Public") == ["public", "dns"]


@pytest.mark.parametrize("mode", ["None", "Public"])
def test_nobody_reaches_a_task(kit: Kit, yard: Yard, mode: Any) -> None:
    join = kit.begin(f"python3 -c '{listen(OPEN)}'", egress=Egress(mode=mode), timeout_ms=60_000)
    look = ("get", "pods", "-n", SANDBOXES, "-o", "jsonpath={.items[*].status.podIP} {.items[*].metadata.name}")
    address, name = eventually(lambda: _two(yard.cluster.kubectl(*look).stdout.split()), seconds=20)
    own = ("exec", "-n", SANDBOXES, name, "--", "python3", "-c", CONNECT, json.dumps([["127.0.0.1", OPEN]]))
    eventually(lambda: yard.cluster.kubectl(*own, check=False).stdout.strip() not in ("", "[]"), seconds=20)
    asks = ("exec", "-n", "default", "nobody", "--", "python3", "-c", CONNECT, json.dumps([[address, OPEN]]))
    assert json.loads(yard.cluster.kubectl(*asks).stdout) == []
    kit.provider.kill(kit.provider.owned(STORE)[0])
    join()


def _two(words: list[str]) -> list[str] | None:
    return words if len(words) == 2 else None


def test_the_walls_stand_before_a_command_begins(kit: Kit, yard: Yard) -> None:
    """A network plugin learns of a Pod when it has an address. Without a canary some of these reached everything."""
    reached: list[list[str]] = []

    def tasks() -> None:
        for _ in range(5):
            reached.append(yard.reached(kit, "None"))

    threads = [threading.Thread(target=tasks) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reached == [[]] * 30
