"""The caps on everything that git reads or writes for us, with their defaults. Values only.

A repository is untrusted: each cap turns a hostile or merely huge one into an error that names the cap.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes, counts and seconds."""

    fetch_bytes: int = 256 * MIB  # what one fetch may add to a clone, as packed by the server
    fetch_seconds: float = 120.0
    memory_bytes: int = 768 * MIB  # of each git process: a pack of some KiB can unfold to gigabytes
    lock_seconds: float = 150.0  # how long to wait for another fetch of the same clone
    archive_bytes: int = 64 * MIB  # the snapshot as a tar archive
    files: int = 20_000  # entries of one commit's tree
    tree_bytes: int = 8 * MIB  # the tree's listing
    command_seconds: float = 30.0
    search_seconds: float = 5.0
    search_memory_bytes: int = 1024 * MIB  # a regular expression can ask for any amount of it
    edit_bytes: int = MIB  # one edited file, before and after
    patch_bytes: int = MIB
