"""A model for tests and recordings: an OpenAI-compatible server that answers by a script instead of thinking.

A scenario is chosen by the goal in a session's first message and the answer by how many messages were sent. It streams, as
models do. See scenarios.py for what a script can say.
"""

from __future__ import annotations

import contextlib
import json
import select
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from opencode.scenarios import Answer, Scenario, pick

MODEL = "scripted"


class ScriptedModel:
    """`with ScriptedModel(scenarios) as model:` and point the daemon at model.environ(). `requests` are the model calls."""

    def __init__(self, scenarios: Sequence[Scenario], *, port: int = 0) -> None:
        self._seen: list[dict[str, Any]] = []
        self._ended = threading.Event()
        shared = {"lock": threading.Lock(), "calls": Counter(), "ended": self._ended}
        handler = type("Handler", (_Handler,), {"scenarios": tuple(scenarios), "seen": self._seen, **shared})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="scripted-model", daemon=True)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of all model calls so far."""
        return list(self._seen)

    def environ(self) -> dict[str, str]:
        """What opencode.json reads from the environment."""
        url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return {"OC_MODEL": MODEL, "OC_MODEL_BASE_URL": url, "OC_MODEL_API_KEY": "none"}

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    scenarios: ClassVar[tuple[Scenario, ...]]
    seen: ClassVar[list[dict[str, Any]]]
    calls: ClassVar[Counter[tuple[str, int]]]
    lock: ClassVar[threading.Lock]
    ended: ClassVar[threading.Event]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `requests` tells more."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        users = [_text(message) for message in request["messages"] if message["role"] == "user"]
        with self.lock:
            answer = pick(self.scenarios, users, self.calls)
        if answer is None:
            self._error(400, f"no scenario has this goal and {len(users)} messages: add one to opencode/scenarios", {})
            return
        self.ended.wait(answer.silent)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has given up
            if answer.status is not None:
                self._error(answer.status, answer.text or "as the scenario says", answer.headers)
            else:
                self._answer(request, answer)

    def _error(self, status: int, message: str, headers: Mapping[str, str]) -> None:
        body = json.dumps({"error": {"message": message, "type": "scripted", "code": status}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, request: Mapping[str, Any], answer: Answer) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if answer.stop == 0:
            self._hang(comments=answer.comments)
            return
        said, tool = _said(answer)
        if tool is None:
            self._chunk({"role": "assistant", "content": ""})
        else:
            call = {
                "index": 0,
                "id": f"call_{len(self.seen)}",
                "type": "function",
                "function": {"name": tool, "arguments": ""},
            }
            self._chunk({"role": "assistant", "tool_calls": [call]})
        for at in range(0, len(said[: answer.stop]), answer.piece):
            self.ended.wait(answer.pause)
            piece = said[: answer.stop][at : at + answer.piece]
            self._chunk(
                {"content": piece} if tool is None else {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
            )
        if answer.stop is not None:
            self._hang(comments=answer.comments)
            return
        self._end(answer.finish or ("stop" if tool is None else "tool_calls"), request, said)

    def _hang(self, *, comments: bool) -> None:
        """Silence until whoever asked gives up; comments keep a connection alive and say nothing."""
        while not self.ended.wait(0.5):
            if comments:
                self.wfile.write(b": alive\n\n")
            elif select.select([self.connection], [], [], 0)[0]:
                return

    def _chunk(self, delta: Mapping[str, Any], **more: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": more.pop("finish", None)}
        body = {
            "id": "scripted",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": MODEL,
            "choices": [choice],
            **more,
        }
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()

    def _end(self, finish: str, request: Mapping[str, Any], said: str) -> None:
        """Usage as a tokenizer might count it: four characters a token. The system message is left out: it holds the day."""
        read = sum(len(_text(message)) for message in request["messages"] if message["role"] != "system") // 4
        written = len(said) // 4 + 1
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        self._chunk({}, finish=finish, usage=usage)
        self.wfile.write(b"data: [DONE]\n\n")


def _said(answer: Answer) -> tuple[str, str | None]:
    """The words, and the tool that they are the arguments of."""
    if answer.text is not None:
        return answer.text, None
    if answer.tool is not None:
        return json.dumps(answer.tool["arguments"]), str(answer.tool["name"])
    raw = answer.raw if answer.raw is not None else json.dumps(answer.structured, ensure_ascii=False)
    return raw, "StructuredOutput"


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or [] if isinstance(part, dict))
