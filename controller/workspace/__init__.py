"""Git repositories, read through git objects only. The only package that runs git (law 12)."""

from __future__ import annotations

from controller.workspace.limits import Limits
from controller.workspace.workspace import GitWorkspace

__all__ = ["GitWorkspace", "Limits"]
