"""Serves a folder of bare repositories over smart HTTP on loopback, for reading only: `git http-backend` behind a small server.

A library for tests and the demo, and `python -m devcluster.gitserver FOLDER`. Any object may be fetched by its id.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

import typer

from devcluster.errors import DevclusterError

MAX_REQUEST = 8 * 1024 * 1024
TIMEOUT_SECONDS = 60
_NAME = r"/(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*\.git)"
_ROUTES = {"GET": re.compile(_NAME + r"/info/refs$"), "POST": re.compile(_NAME + r"/git-upload-pack$")}
CONFIG = {
    "uploadpack.allowAnySHA1InWant": "true",
    "http.receivepack": "false",
    "safe.directory": "*",
}


class GitServer:
    """`with GitServer(folder) as server: clone server.url("demo.git")`.

    With `token` it wants that as the password of `user`, or of any. `token` may be changed while it serves. `heard` is what
    clients sent as Authorization, in order.
    """

    def __init__(self, root: Path, *, port: int = 0, user: str | None = None, token: str | None = None) -> None:
        if shutil.which("git") is None:
            raise DevclusterError("git is not on PATH: install it")
        self.user, self.token = user, token
        self.heard: list[str] = []
        handler = type("Handler", (_Handler,), {"root": root, "owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="gitserver", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def url(self, repository: str) -> str:
        """A repository's URL: its folder's name ends in .git."""
        return f"http://127.0.0.1:{self.port}/{repository}"

    def start(self) -> None:
        """Serve in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> GitServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    root: ClassVar[Path]
    owner: ClassVar[GitServer]
    protocol_version = "HTTP/1.0"  # one request per connection: the end of the answer is the end of the connection

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the client says what went wrong."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        route = _ROUTES[self.command].match(parts.path)
        if not self._authorized():
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
        elif self.command == "GET" and parts.query != "service=git-upload-pack":
            self.send_error(403, "reading by smart HTTP only")
        elif route is None or not (self.root / route["repo"] / "HEAD").is_file():
            self.send_error(404)
        else:
            self._backend(parts.path, parts.query)

    def _authorized(self) -> bool:
        sent = self.headers.get("Authorization")
        if sent is not None:
            self.owner.heard.append(sent)
        if self.owner.token is None:
            return True
        scheme, _, value = (sent or "").partition(" ")
        try:
            user, _, password = base64.b64decode(value).decode().partition(":")
        except ValueError:
            return False
        return scheme == "Basic" and self.owner.user in (None, user) and password == self.owner.token

    def _backend(self, path: str, query: str) -> None:
        body = self._body()
        if body is None:
            self.send_error(413)
            return
        environ = _cgi(
            self.command, path=path, query=query, headers=dict(self.headers.items()), root=self.root, size=len(body)
        )
        try:
            done = subprocess.run(
                ["git", "http-backend"],
                input=body,
                env=environ,
                capture_output=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            self.send_error(504)
            return
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(answer)

    def _body(self) -> bytes | None:
        """The request's body, None when it is too big."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(size) if size <= MAX_REQUEST else None
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            if len(body) + size > MAX_REQUEST:
                return None
            body += self.rfile.read(size)
            self.rfile.readline()
        return body


def _cgi(method: str, *, path: str, query: str, headers: Mapping[str, str], root: Path, size: int) -> dict[str, str]:
    """The environment of RFC 3875 that git http-backend reads, with our configuration and nobody else's."""
    lower = {name.lower(): value for name, value in headers.items()}
    environ = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_PROJECT_ROOT": str(root.absolute()),
        "GIT_HTTP_EXPORT_ALL": "1",
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_TYPE": lower.get("content-type", ""),
        "CONTENT_LENGTH": str(size),
        "HTTP_CONTENT_ENCODING": lower.get("content-encoding", ""),
        "GIT_PROTOCOL": lower.get("git-protocol", ""),
        "REMOTE_ADDR": "127.0.0.1",
        "GIT_CONFIG_COUNT": str(len(CONFIG)),
    }
    for n, (key, value) in enumerate(CONFIG.items()):
        environ |= {f"GIT_CONFIG_KEY_{n}": key, f"GIT_CONFIG_VALUE_{n}": value}
    return environ


def main(root: Path, port: Annotated[int, typer.Option(help="0 takes a free one")] = 0) -> None:
    """Serve the bare repositories (NAME.git) in ROOT on loopback until interrupted."""
    server = GitServer(root, port=port)
    server.start()
    typer.echo(f"serving {root} on {server.url('')}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    typer.run(main)
