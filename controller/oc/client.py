"""The few HTTP calls to OpenCode's daemon that are needed, with its failures as our errors. Only oc/ may import it.

The daemon answers 200 even when a turn failed: what a turn came to is in its body, and live.py judges that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from controller.core.errors import Permanent, Unavailable

USER = "opencode"
CALL_SECONDS = 30.0
ABORT_SECONDS = 5.0


class OpenCodeClient:
    """One daemon. Thread-safe."""

    def __init__(self, base_url: str, *, password: str, user: str = USER) -> None:
        self.base_url = base_url
        self._http = httpx.Client(
            base_url=base_url,
            auth=(user, password),
            timeout=httpx.Timeout(CALL_SECONDS, connect=5.0),
            trust_env=False,  # a proxy must never see the repository's text or the password
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def version(self) -> str:
        """The daemon's version, such as 1.18.33."""
        return str(self._call("GET", "/global/health")["version"])

    def create_session(self, *, title: str, agent: str) -> str:
        """A new session's id. A title spares the daemon a model call that would make one up."""
        return str(self._call("POST", "/session", json={"title": title, "agent": agent})["id"])

    def prompt(
        self, session: str, *, agent: str, text: str, schema: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Send one message and wait for the turn's end: {info, parts}. Closing the connection would not stop the turn."""
        body = {
            "agent": agent,
            "format": {"type": "json_schema", "schema": schema},
            "parts": [{"type": "text", "text": text}],
        }
        answer = self._call("POST", f"/session/{session}/message", json=body, seconds=seconds)
        return dict(answer)

    def remind(self, session: str, *, agent: str, text: str) -> None:
        """Add a message to the session's context without asking the model."""
        body = {"agent": agent, "noReply": True, "parts": [{"type": "text", "text": text}]}
        self._call("POST", f"/session/{session}/message", json=body)

    def tokens(self, session: str) -> tuple[int, int]:
        """Tokens in (cached ones too) and out (reasoning too) of the whole session so far."""
        counts = self._call("GET", f"/session/{session}").get("tokens") or {}
        cache = counts.get("cache") or {}
        return (
            int(counts.get("input", 0) + cache.get("read", 0) + cache.get("write", 0)),
            int(counts.get("output", 0) + counts.get("reasoning", 0)),
        )

    def abort(self, session: str) -> None:
        """Stop the session's turn. Idle and unknown sessions are fine."""
        self._call("POST", f"/session/{session}/abort", seconds=ABORT_SECONDS)

    def delete(self, session: str) -> None:
        """Forget a session. Unknown ones are fine."""
        self._call("DELETE", f"/session/{session}", missing_ok=True)

    def _call(
        self, method: str, path: str, *, json: Any = None, seconds: float = CALL_SECONDS, missing_ok: bool = False
    ) -> Any:
        """The answer's JSON. Raises Unavailable when asking again may help, Permanent when not."""
        where = f"OpenCode at {self.base_url}: {method} {path.split('/')[1]}"
        try:
            response = self._http.request(
                method, path, json=json, timeout=httpx.Timeout(seconds, connect=min(5.0, seconds))
            )
        except httpx.TimeoutException as e:
            raise Unavailable(f"{where}: no answer within {seconds:g} s") from e
        except httpx.HTTPError as e:
            raise Unavailable(f"{where}: {e or type(e).__name__}") from e
        if response.status_code == 401:
            raise Permanent(f"{where}: 401, the password is not the daemon's (OPENCODE_SERVER_PASSWORD)")
        if response.status_code == 404 and missing_ok:
            return None
        if response.status_code in (404, 409) or response.status_code >= 500:
            raise Unavailable(f"{where}: {response.status_code} {_brief(response)}")
        if response.status_code >= 400:
            raise Permanent(f"{where}: {response.status_code} {_brief(response)}")
        try:
            return response.json()
        except ValueError as e:
            if response.status_code == 200 and not response.content:
                return None
            raise Unavailable(f"{where}: the answer is not JSON: {_brief(response)}") from e


def _brief(response: httpx.Response) -> str:
    """The error's name and message where it has the daemon's shape, else the start of its text."""
    try:
        body = json.loads(response.content)
        return f"{body['name']}: {body['data']['message']}"[:300]
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
