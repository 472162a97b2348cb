"""What a node is made of and what its Pods run, built from Debian packages once and kept in the cache.

`machine` is the node's own root directory. The images are one OCI archive; each is known by the digest of its manifest,
under a name of a registry that does not exist, so that whatever is not here already cannot be had. For `devcluster.node`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devcluster import build
from devcluster.cache import Report, cache_dir, locked, say
from devcluster.node.packages import Packages, in_tree, unpack

LAYOUT = "2"  # raise it when this package arranges trees or archives differently
PREFIX = "localhost/sisu-kodo"
PLATFORM = {"os": "linux", "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "unknown")}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COMMON = ("base-files", "base-passwd", "bash", "coreutils", "dash", "libc-bin", "util-linux")
MACHINE = (*COMMON, "mount", "iproute2", "nftables", "runc", "containerd", "containernetworking-plugins")
PYTHON = (
    *(*COMMON, "findutils", "grep", "sed", "tar", "gzip", "diffutils", "patch", "procps", "git"),
    *("python3", "python3-pytest"),
)
BASE = ("busybox-static",)
# Where namespace.sh mounts what belongs to one node; the rest of the machine is read-only.
MOUNTPOINTS = ("etc/node", "etc/cni/net.d", "opt/kubelet", "run", "var", "tmp", "proc", "sys", "dev")


@dataclass(frozen=True)
class Images:
    """Paths in the cache: the node's root directory, the archive, containerd's store of it (if there is one yet).

    And the images' digests by short name.
    """

    machine: Path
    archive: Path
    store: Path
    digests: Mapping[str, str]

    def reference(self, name: str) -> str:
        """As a Pod names it."""
        return f"{PREFIX}/{name}@{self.digests[name]}"


def ensure(*, report: Report = say) -> Images:
    """Everything, built first when the cache does not hold it. Needs root. Safe to call from two processes."""
    recipe = [LAYOUT, MACHINE, PYTHON, BASE, build.digest(build.PAUSE)]
    home = cache_dir() / "node" / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    if not home.exists():
        with locked(home.with_name(home.name + ".lock"), report=report):
            if not home.exists():
                _build(home, report)
    digests = json.loads((home / "images.json").read_text())
    return Images(machine=home / "machine", archive=home / "images.tar", store=home / "store", digests=digests)


def _build(home: Path, report: Report) -> None:
    report(f"building the node and its images from Debian packages: once, about a minute; kept in {home}")
    pause = build.ensure(build.PAUSE, report=report)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="build-") as name:
        scratch = Path(name)
        tree = scratch / "tree"
        tree.mkdir(mode=0o755)
        packages = Packages(scratch / "apt")
        unpack(packages.fetch(MACHINE), tree / "machine")
        for point in MOUNTPOINTS:
            (tree / "machine" / point).mkdir(parents=True, exist_ok=True)
        (tree / "machine" / "etc" / "resolv.conf").touch()
        (tree / "machine" / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
        shutil.copy(pause, tree / "machine" / "usr" / "bin" / "pause")

        unpack(packages.fetch(PYTHON), scratch / "python")
        # The scripts of the packages would have done it; a read-only root cannot later.
        compileall = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/usr/lib/python3")
        in_tree(scratch / "python", "/usr/bin/python3", *compileall)
        in_tree(scratch / "python", "/usr/bin/python3", *compileall[:-1], "/usr/lib/python3.11")
        unpack(packages.fetch(BASE), scratch / "base")
        in_tree(scratch / "base", "/bin/busybox", "--install", "-s", "/bin")
        (scratch / "pause").mkdir()
        shutil.copy(pause, scratch / "pause" / "pause")

        with tarfile.open(tree / "images.tar", "w") as tar:
            archive = Archive(tar)
            digests = {
                "pause": archive.add("pause", scratch / "pause", {"Entrypoint": ["/pause"]}),
                "base": archive.add("base", scratch / "base", {"Cmd": ["/bin/sh"], "Env": [PATH]}),
                "python": archive.add("python", scratch / "python", {"Cmd": ["/bin/bash"], "Env": [PATH]}),
            }
            archive.close()
        (tree / "images.json").write_text(json.dumps(digests))
        tree.rename(home)
    report(f"the node and its images built in {time.monotonic() - started:.0f} s")


class Archive:
    """An OCI archive that is being written: one layer per image, uncompressed."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._manifests: list[dict[str, object]] = []

    def add(self, name: str, tree: Path, config: Mapping[str, object]) -> str:
        """Adds a directory as an image; returns the digest of its manifest."""
        with tempfile.TemporaryFile(dir=tree.parent) as layer:
            with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for path in sorted(tree.iterdir()):
                    tar.add(path, path.name, filter=_plain)
            size = layer.tell()
            layer.seek(0)
            diff = "sha256:" + hashlib.file_digest(layer, "sha256").hexdigest()
            layer.seek(0)
            self._tar.addfile(_entry(diff, size), layer)
        image = {**PLATFORM, "config": config, "rootfs": {"type": "layers", "diff_ids": [diff]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self._blob("application/vnd.oci.image.config.v1+json", image),
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff, "size": size}],
        }
        described = self._blob("application/vnd.oci.image.manifest.v1+json", manifest)
        reference = f"{PREFIX}/{name}@{described['digest']}"
        self._manifests.append({**described, "annotations": {"io.containerd.image.name": reference}})
        return str(described["digest"])

    def close(self) -> None:
        """Writes the index: nothing can be added any more."""
        self._file("index.json", json.dumps({"schemaVersion": 2, "manifests": self._manifests}).encode())
        self._file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')

    def _blob(self, kind: str, content: Mapping[str, object]) -> dict[str, object]:
        data = json.dumps(content, sort_keys=True).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self._file(_entry(digest, 0).name, data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def _file(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        with tempfile.SpooledTemporaryFile() as file:
            file.write(data)
            file.seek(0)
            self._tar.addfile(entry, file)


def _entry(digest: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo("blobs/" + digest.replace(":", "/"))
    entry.size = size
    return entry


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same for the same packages, whenever it is built; and nothing that gives its caller another user's rights."""
    entry.uname = entry.gname = ""
    entry.mode &= 0o1777
    entry.mtime = 0
    return entry
