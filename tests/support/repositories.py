"""Bare repositories made of raw objects: trees with any names and modes, which git itself would never have written."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import zlib
from pathlib import Path


def git(directory: Path, *args: str, stdin: bytes = b"") -> str:
    """One git command on a bare repository, by nobody and at a fixed date: equal content has equal commits."""
    who = {f"GIT_{role}_{key}": "t@example.invalid" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    dates = {f"GIT_{role}_DATE": "1700000000 +0000" for role in ("AUTHOR", "COMMITTER")}
    environ = {**who, **dates, "PATH": os.environ["PATH"], "HOME": "/dev/null", "GIT_DIR": str(directory)}
    done = subprocess.run(["git", *args], input=stdin, env=environ, capture_output=True, check=True)
    return done.stdout.decode().strip()


def blob(directory: Path, content: bytes) -> str:
    """A new object's id."""
    return git(directory, "hash-object", "-w", "--stdin", stdin=content)


def tree(directory: Path, entries: dict[str, tuple[str, str]]) -> str:
    """A tree of name → (mode, object id), with any names: nothing checks them."""
    rows = [
        f"{mode.lstrip('0')} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in sorted(entries.items())
    ]
    return git(directory, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=b"".join(rows))


def branch(directory: Path, name: str, entries: dict[str, tuple[str, str]]) -> str:
    """A branch of one commit with this tree."""
    commit = git(directory, "commit-tree", tree(directory, entries), "-m", name)
    git(directory, "update-ref", f"refs/heads/{name}", commit)
    return commit


def commit_files(directory: Path, files: dict[str, str], *, name: str = "main") -> str:
    """A branch of one commit with these plain files."""
    stream = [f"commit refs/heads/{name}\ncommitter T <t@example.invalid> 1700000000 +0000\ndata 0\ndeleteall\n"]
    stream += [f'M 100644 inline "{path}"\ndata {len(text.encode())}\n{text}\n' for path, text in files.items()]
    git(directory, "fast-import", "--quiet", "--force", stdin="".join(stream).encode())
    return git(directory, "rev-parse", f"refs/heads/{name}")


def unfolding_blobs(directory: Path, *, copies: int) -> tuple[str, str]:
    """A blob of 16 MiB of zeros, and one of so many times that: as a delta on the first it takes a hundred bytes in a pack."""
    base = bytes(16 * 1024 * 1024 - 1)
    named = blob(directory, base)
    copy = b"\xf0" + len(base).to_bytes(3, "little")
    delta = _number(len(base)) + _number(len(base) * copies) + copy * copies
    size = len(delta)
    head = bytes([7 << 4 | size & 15 | 0x80]) + _number(size >> 4)  # 7: a delta on the object that is named
    pack = b"PACK" + struct.pack(">II", 2, 1) + head + bytes.fromhex(named) + zlib.compress(delta)
    git(directory, "index-pack", "--fix-thin", "--stdin", stdin=pack + hashlib.sha1(pack).digest())
    whole = hashlib.sha1(b"blob %d\0" % (len(base) * copies))
    for _ in range(copies):
        whole.update(base)
    return named, whole.hexdigest()


def _number(n: int) -> bytes:
    """As packs write one: seven bits a byte, the lowest first."""
    found = bytearray()
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])
