"""The parts of a development node that need neither root nor a network: names and addresses, image archives, what is built."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from devcluster import build
from devcluster.node import missing
from devcluster.node.host import NUMBERS, POOL, Ground
from devcluster.node.images import Archive


@pytest.mark.parametrize("number", [0, 1, NUMBERS - 1])
def test_names_and_addresses_of_a_number(number: int) -> None:
    ground = Ground(number, Path("/"))
    assert ground.network.subnet_of(POOL)
    assert max(len(ground.name), len(ground.peer)) <= 15, "the kernel allows 15 characters"
    assert len({ground.host_address, ground.node_address}) == 2
    assert int(ground.name.rpartition("-")[2], 16) == number


def test_networks_of_two_numbers_are_apart() -> None:
    assert not Ground(7, Path("/")).network.overlaps(Ground(8, Path("/")).network)


def archive(folder: Path, when: int) -> tuple[str, Path]:
    """An archive of one image with one setuid file, last changed at `when`."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    (tree / "su").write_text("#!/bin/sh\n")
    (tree / "su").chmod(0o4755)
    for path in (tree / "su", tree):
        os.utime(path, (when, when))
    with tarfile.open(folder / "images.tar", "w") as tar:
        made = Archive(tar)
        digest = made.add("small", tree, {"Cmd": ["/su"]})
        made.close()
    return digest, folder / "images.tar"


def test_an_image_is_known_by_what_it_holds(tmp_path: Path) -> None:
    first, path = archive(tmp_path / "one", 1_000_000_000)
    second, _ = archive(tmp_path / "two", 2_000_000_000)
    assert first == second
    with tarfile.open(path) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        (described,) = json.load(index)["manifests"]
        assert described["digest"] == first
        assert described["annotations"]["io.containerd.image.name"] == f"localhost/sisu-kodo/small@{first}"
        layers = [member for member in tar.getmembers() if member.name.startswith("blobs/") and member.size > 9000]
        layer = tar.extractfile(layers[0])
        with tarfile.open(fileobj=layer) as files:
            assert files.getmember("su").mode == 0o755, "nobody becomes another user by it"


def test_the_kubelet_makes_nobody_else_build_longer() -> None:
    assert {path.parent.name for path in build.KCP.sources} == {"kcp"}
    assert {path.name for path in build.KUBELET.sources} == {"go.mod", "go.sum", "main.go"}
    assert build.KUBELET.folder / "kubelet" / "main.go" in build.KUBELET.sources
    assert build.digest(build.KUBELET) != build.digest(build.KCP)


@pytest.mark.skipif(os.geteuid() == 0, reason="root is not missing")
def test_without_root_the_reason_is_said() -> None:
    assert "root" in str(missing())
