"""What a sandbox is made from: `base` (the host's /usr) and locked toolchains that a manifest describes.

A reference names what approval covers: provider version, host release, and for a toolchain its lock and Python version.
Manifests are written by whoever builds a toolchain (devcluster/sandbox_python.py for `python`); this module only reads.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from controller.core.errors import InvalidIntent, Permanent

PROVIDER_VERSION = "1"  # raise it when jail.py or limits.py change what a task sees


class Manifest(BaseModel):
    """One toolchain. `identity` is what makes it what it is (lock hash, Python version); `binds` are host path → jail path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    identity: dict[str, str]
    binds: dict[str, str]
    path: tuple[str, ...]
    env: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Template:
    """One thing to make sandboxes from. `ref` is its immutable reference."""

    name: str
    ref: str
    binds: tuple[tuple[Path, str], ...] = ()
    path: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def base() -> Template:
    """The host's /usr and nothing else."""
    return Template(name="base", ref=_reference("base", {}))


def load(manifest: Path) -> Template:
    """Reads a toolchain's manifest. Raises Permanent naming the file when it is missing or malformed."""
    try:
        found = Manifest.model_validate_json(manifest.read_bytes())
    except (OSError, ValidationError) as e:
        raise Permanent(f"sandbox toolchain manifest {manifest}: {e}") from e
    binds = tuple((Path(host), inside) for host, inside in found.binds.items())
    ref = _reference(found.name, found.identity)
    return Template(name=found.name, ref=ref, binds=binds, path=found.path, env=found.env)


class Catalog:
    """The templates that a provider offers, by name and by reference."""

    def __init__(self, templates: Iterable[Template]) -> None:
        self._by_name = {template.name: template for template in templates}
        self._by_ref = {template.ref: template for template in self._by_name.values()}

    def resolve(self, name: str) -> str:
        """Raises InvalidIntent that names the known ones."""
        if name not in self._by_name:
            known = ", ".join(sorted(self._by_name))
            raise InvalidIntent("spec.sandbox.template", f"{name!r} is unknown here; there is: {known}")
        return self._by_name[name].ref

    def find(self, ref: str) -> Template | None:
        """The template with this reference, if it is still what it was."""
        return self._by_ref.get(ref)


def _reference(name: str, identity: Mapping[str, str]) -> str:
    facts = {"provider": PROVIDER_VERSION, "machine": platform.machine(), "host": _host_release(), **identity}
    return f"local:{name}@sha256:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"


def _host_release() -> str:
    try:
        return Path("/etc/os-release").read_text()
    except OSError:
        return ""
