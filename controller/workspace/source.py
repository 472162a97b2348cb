"""Where a repository may come from: checks of its URL, ref and credentials before git sees any of them. Pure.

Only https, or http to loopback where a development setting says so; nothing that git could take for an option or a command.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from controller.core.errors import WorkspaceRefused
from controller.core.model import GitSource

URL = "spec.workspace.git.url"
REF = "spec.workspace.git.ref"
MAX_URL, MAX_REF = 2048, 255
COMMIT = re.compile(r"[0-9a-f]{40}")
# What git check-ref-format refuses, and a leading dash.
_BAD_REF = re.compile(r"^[-/.]|[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|/\.|\.lock(/|$)|[/.]$|^@$")


def check(source: GitSource, *, allow_loopback_http: bool) -> None:
    """Raises WorkspaceRefused naming the field, what is wrong and what would be right."""
    if len(source.url) > MAX_URL or re.search(r"[^\x21-\x7e]", source.url):
        raise WorkspaceRefused(f"{URL}: must be at most {MAX_URL} printable ASCII characters without spaces")
    try:
        parts = urlsplit(source.url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as e:
        raise WorkspaceRefused(f"{URL}: is not a URL ({e}); right would be https://host/path.git") from e
    if "@" in parts.netloc:
        raise WorkspaceRefused(f"{URL}: must not hold credentials; put them into a Secret and name it in secretRef")
    if not host or host.startswith("-") or parts.path.strip("/") == "" or parts.query or parts.fragment:
        raise WorkspaceRefused(f"{URL}: right would be https://host/path.git, without query or fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host) and allow_loopback_http):
        raise WorkspaceRefused(f"{URL}: scheme {parts.scheme!r} is not allowed here; use https")
    if len(source.ref) > MAX_REF or not source.ref or _BAD_REF.search(source.ref):
        raise WorkspaceRefused(f"{REF}: {source.ref[:MAX_REF]!r} is not a branch, tag or full commit id")


def is_loopback(host: str) -> bool:
    """This machine, by name or number."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def clone_key(source: GitSource) -> str:
    """The clone's folder: who may not read the repository does not get at another's clone of it."""
    return hashlib.sha256(f"{source.url}\0{source.token or ''}".encode()).hexdigest()[:40]


def config_of(source: GitSource) -> Mapping[str, str]:
    """git settings for talking to this source: its transport, and its token as a header.

    The token is `user:password`, or a bare token, which every known forge takes with any user name.
    """
    config: dict[str, str] = {}
    if urlsplit(source.url).scheme == "http":
        config |= {"protocol.http.allow": "always", "http.proxy": ""}
    if source.token:
        # For this repository alone, wherever git may be led.
        config[f"http.{source.url}.extraHeader"] = f"Authorization: Basic {_basic(source.token)}"
    return config


def _basic(token: str) -> str:
    pair = token if ":" in token else f"x-access-token:{token}"
    return base64.b64encode(pair.encode()).decode()


def quotable(said: str, source: GitSource) -> str:
    """What git said, as far as people may see it: a server can send back what it was sent, and git shows its text."""
    if not source.token:
        return said
    ours = "\n".join(line for line in said.splitlines() if not line.startswith("remote:"))
    joined = "".join(ours.split())
    password = source.token.partition(":")[2] or source.token
    forms = ("".join(password.split()), _basic(source.token).rstrip("="))
    if any(form and form in joined for form in forms):
        return "the server sends back the credentials that it was sent; its answer is not shown"
    return ours
