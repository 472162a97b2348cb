"""The few HTTP calls to OpenCode's daemon that are needed, with its failures as our errors. Only oc/ may import it.

The daemon answers 200 even when a turn failed: what a turn came to is in its body, and turn.py judges that.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from controller.core.errors import InvalidPlan, Permanent, Unavailable

USER = "opencode"
CALL_SECONDS = 30.0
ABORT_SECONDS = 5.0
PROBE_SECONDS = 4.0  # a busy daemon takes up to 3 s
# The daemon sends a heartbeat every 10 s, and a busy one is up to 3 s late.
SILENCE_SECONDS = 15.0


class OpenCodeClient:
    """One daemon, for one event loop."""

    def __init__(self, base_url: str, *, password: str, user: str = USER) -> None:
        self.base_url = base_url
        self._http = httpx.AsyncClient(
            base_url=base_url,
            auth=(user, password),
            timeout=httpx.Timeout(CALL_SECONDS, connect=5.0),
            trust_env=False,  # a proxy must never see the repository's text or the password
            limits=httpx.Limits(max_connections=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def version(self) -> str:
        """The daemon's version, such as 1.18.33. A new connection each time: one that met the daemon half started never answers."""
        answer = await self._call("GET", "/global/health", seconds=PROBE_SECONDS, headers={"Connection": "close"})
        return str(answer["version"])

    async def create_session(self, *, title: str, agent: str) -> str:
        """A new session's id. A title spares the daemon a model call that would make one up."""
        return str((await self._call("POST", "/session", json={"title": title, "agent": agent}))["id"])

    async def sessions(self) -> list[dict[str, Any]]:
        """All sessions: {id, title, time: {created, updated} in ms}."""
        return list(await self._call("GET", "/session"))

    async def prompt(
        self, session: str, *, message: str, agent: str, text: str, schema: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Send one message and wait for the turn's end: {info, parts}. Closing the connection would not stop the turn."""
        body = {
            "messageID": message,
            "agent": agent,
            "format": {"type": "json_schema", "schema": schema},
            "parts": [{"type": "text", "text": text}],
        }
        return dict(await self._call("POST", f"/session/{session}/message", json=body, seconds=seconds))

    async def remind(self, session: str, *, agent: str, text: str) -> None:
        """Add a message to the session's context without asking the model."""
        body = {"agent": agent, "noReply": True, "parts": [{"type": "text", "text": text}]}
        await self._call("POST", f"/session/{session}/message", json=body)

    async def tokens(self, session: str) -> tuple[int, int]:
        """Tokens in (cached ones too) and out (reasoning too) of the whole session so far."""
        return counted((await self._call("GET", f"/session/{session}")).get("tokens") or {})

    async def status(self) -> dict[str, dict[str, Any]]:
        """What busy sessions do, by id: {type: busy} or {type: retry, attempt, message, next}. Idle ones are absent."""
        return dict(await self._call("GET", "/session/status", seconds=PROBE_SECONDS))

    async def abort(self, session: str) -> None:
        """Stop the session's turn. Idle and unknown sessions are fine."""
        await self._call("POST", f"/session/{session}/abort", seconds=ABORT_SECONDS)

    async def revert(self, session: str, message: str) -> None:
        """Take a message and its answer out of the session's context."""
        await self._call("POST", f"/session/{session}/revert", json={"messageID": message}, seconds=ABORT_SECONDS)

    async def delete(self, session: str) -> None:
        """Forget a session. Unknown ones are fine."""
        await self._call("DELETE", f"/session/{session}", seconds=ABORT_SECONDS, missing_ok=True)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What happens in the daemon, {type, properties}, from now on. Raises Unavailable when it falls silent or goes away."""
        where = f"OpenCode at {self.base_url}: events"
        try:
            timeout = httpx.Timeout(SILENCE_SECONDS, connect=5.0)
            async with self._http.stream("GET", "/event", timeout=timeout) as response:
                if response.status_code != 200:
                    raise Unavailable(f"{where}: {response.status_code}")
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except httpx.HTTPError as e:
            raise Unavailable(f"{where}: {e or type(e).__name__}") from e
        except ValueError as e:
            raise Unavailable(f"{where}: not JSON: {e}") from e

    async def _call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        seconds: float = CALL_SECONDS,
        headers: Mapping[str, str] | None = None,
        missing_ok: bool = False,
    ) -> Any:
        """The answer's JSON. Raises Unavailable when asking again may help, Permanent when not."""
        where = f"OpenCode at {self.base_url}: {method} {path.split('/')[1]}"
        timeout = httpx.Timeout(seconds, connect=min(5.0, seconds))
        try:
            response = await self._http.request(method, path, json=json, timeout=timeout, headers=headers)
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
        except RecursionError as e:  # the model's: the daemon passes on what it says
            raise InvalidPlan(f"{where}: the answer is nested too deep to be read") from e
        except ValueError as e:
            if response.status_code == 200 and not response.content:
                return None
            raise Unavailable(f"{where}: the answer is not JSON: {_brief(response)}") from e


def counted(tokens: Mapping[str, Any]) -> tuple[int, int]:
    """The daemon's token counts as (in, out): cached ones are read, reasoning is written. One that is null (its NaN) is none."""
    cache = tokens.get("cache") or {}
    read = (tokens.get("input"), cache.get("read"), cache.get("write"))
    return int(sum(n or 0 for n in read)), int(sum(n or 0 for n in (tokens.get("output"), tokens.get("reasoning"))))


def _brief(response: httpx.Response) -> str:
    """The error's name and message where it has the daemon's shape, else the start of its text."""
    try:
        body = json.loads(response.content)
        if body["name"] == "ConfigJsonError":
            return "ConfigJsonError"  # its message is the whole configuration, the key included
        return f"{body['name']}: {body['data']['message']}"[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return response.text[:300]
