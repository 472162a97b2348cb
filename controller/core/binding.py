"""Where a Secret's credentials may be sent: what its owner wrote on it, against an Intent's URL. Pure.

Who may write Intents need not be allowed to read Secrets, and could name a host of theirs. So the Secret itself says where it may go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

ANNOTATION = "sisukodo.dev/git"
FIELD = "spec.workspace.git.secretRef"
NOT_ENABLED = "private repositories are not enabled in this installation (privateRepositories.enabled in the chart, WORKSPACE_SECRETS)"
# Narrower than any URL parser, so that no two of them can read one of these differently.
_URL = re.compile(
    r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::([1-9][0-9]{0,4}))?((?:/[A-Za-z0-9._~%+,:@!$&*()=-]*)*)"
)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server, and a folder on it. `host` in small letters, `path` by segments."""

    scheme: str
    host: str
    port: int
    path: tuple[str, ...]

    def covers(self, other: Place) -> bool:
        """Whether `other` is this place, or below it."""
        server = (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)
        return server and other.path[: len(self.path)] == self.path


def place(url: str) -> Place:
    """Raises ValueError for every URL that a server might take for another path than the one that is compared here."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError("right would be https://host[:port]/path of plain characters, without user, query or ';'")
    scheme, host, port, path = found[1], found[2].lower(), int(found[3] or _PORTS[found[1]]), found[4]
    if port > 65535:
        raise ValueError(f"{port} is no port")
    segments = tuple(path.removesuffix("/").split("/")[1:])
    for segment in segments:
        _plain(segment)
    return Place(scheme=scheme, host=host, port=port, path=segments)


def _plain(segment: str) -> None:
    """An escape may stand for a letter, a digit or a blank: a dot, a slash or '%' is decoded by one server and not by the next."""
    for escape in re.findall(r"(?:%[0-9A-Fa-f]{2})+|%", segment):
        try:
            text = unquote(escape, errors="strict")
        except UnicodeDecodeError:  # overlong forms of a dot, among others
            text = escape
        if not all(character.isalnum() or character == " " for character in text):
            raise ValueError(f"{escape!r} in the path: only letters, digits and blanks may be written as %XX")
    if unquote(segment).strip(" .") == "":
        raise ValueError(f"{segment!r} in the path: no '//', '.' or '..'")


def refusal(annotation: str | None, url: str) -> str | None:
    """Why this Secret's credentials may not be sent to this URL, and what would be right; None: they may.

    What the annotation says is not told: who writes Intents need not be allowed to look at Secrets.
    """
    try:
        wanted = place(url)
    except ValueError as e:
        return f"credentials are not sent to this spec.workspace.git.url: {e}"
    right = f"its owner may set {ANNOTATION}={url}, or a part of that which ends before a '/'"
    if not annotation:
        return f"has no annotation {ANNOTATION}, which says where its credentials may be sent; {right}"
    try:
        allowed = place(annotation)
    except ValueError as e:
        return f"its annotation {ANNOTATION} is not a place: {e}; {right}"
    if not allowed.covers(wanted):
        return f"its annotation {ANNOTATION} does not cover this Intent's URL; {right}"
    return None
