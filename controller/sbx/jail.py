"""The bubblewrap command line: what a jail sees and what it may not. Pure; `run.py` starts it.

Hardening that was tried (docs/reference of sandboxes): a user namespace with all capabilities dropped and no further
user namespaces, no network but an empty `lo`, single directories of the host read-only (never `/`), and a root,
/dev and /dev/shm that cannot be used as unlimited memory. Everything but the command travels in a memfd, so that neither the
values of the environment nor host paths show in any process list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UID = 1000
SHM_BYTES = 64 << 20
WORKSPACE = "/workspace"
OUTPUT = "/output"
BASE_PATH = ("/usr/local/bin", "/usr/bin", "/bin")

ISOLATION = (
    *("--unshare-user", "--unshare-all", "--disable-userns", "--uid", str(UID), "--gid", str(UID)),
    *("--cap-drop", "ALL", "--new-session", "--die-with-parent", "--hostname", "sandbox", "--clearenv"),
)
ETC = ("/etc/alternatives", "/etc/ssl", "/etc/ld.so.cache", "/etc/localtime")
ACCOUNTS = {
    "passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    "group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """What one jail sees: host directories of the task, the template's read-only binds, its environment and directory."""

    accounts: Path
    workspace: Path
    output: Path
    tmp: Path
    binds: Sequence[tuple[Path, str]]
    env: Mapping[str, str]
    workdir: str


def write_accounts(directory: Path) -> None:
    """Own passwd, group and hosts: the host's say who works on it. Readable by the jail's outer uid."""
    directory.mkdir(mode=0o755, exist_ok=True)
    for name, text in ACCOUNTS.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o644)


def arguments(view: View) -> bytes:
    """For `bwrap --args`: NUL-separated. Raises ValueError when a value holds a NUL, which would inject an option."""
    args = [*ISOLATION, *_system(), "--proc", "/proc", "--dev", "/dev"]
    args += ["--size", str(SHM_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"]
    for name in ACCOUNTS:
        args += ["--ro-bind", str(view.accounts / name), f"/etc/{name}"]
    for host, inside in view.binds:
        args += ["--ro-bind", str(host), inside]
    for host, inside in ((view.workspace, WORKSPACE), (view.output, OUTPUT), (view.tmp, "/tmp")):
        args += ["--bind", str(host), inside]
    for name, value in view.env.items():
        args += ["--setenv", name, value]
    # Last: bubblewrap still creates mount points above. Writable are only the three binds and /dev/shm.
    args += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", view.workdir]
    if any("\0" in arg for arg in args):
        raise ValueError("an environment value, a path or the working directory holds a NUL")
    return b"".join(arg.encode() + b"\0" for arg in args)


def environment(template: Mapping[str, str], path: Sequence[str], request: Mapping[str, str]) -> dict[str, str]:
    """The task's whole environment: the request may override all but where outputs go."""
    own = {"PATH": ":".join((*path, *BASE_PATH)), "HOME": "/tmp", "USER": "user", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
    return {**own, **template, **request, "SISU_OUTPUT_DIR": OUTPUT}


def _system() -> list[str]:
    """/usr, the links or directories beside it, and the few files of /etc that programs need to start."""
    args = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = f"/{name}"
        if os.path.islink(path):
            args += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            args += ["--ro-bind", path, path]
    for path in ETC:
        args += ["--ro-bind-try", path, path]
    return args
