"""A chat-completions server on loopback that fails, is slow and limits rates, as its requests tell it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


@dataclass
class JudgeServer:
    """What the server saw. The model name is its order: `KIND` or `KIND:TIMES`, the kind of the first TIMES answers.

    Kinds: a status code; `drop` (the connection ends), `garbage` (no score), `slow` (never answers), `meet` (answers
    when 20 requests are waiting), `echo` (401 that repeats the key), `repeat` (what was asked). Otherwise the score is
    the number that the task asks for.
    """

    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by content."""
    keys: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(20))
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    state: ClassVar[JudgeServer]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content, (kind, _, times) = body["messages"][0]["content"], body["model"].partition(":")
        with self.state.lock:
            self.state.seen[content] += 1
            count = self.state.seen[content]
            self.state.keys.add(self.headers.get("Authorization", ""))
            self.state.bodies.append({**body, "path": self.path})
        if times and count > int(times):
            kind = "ok"
        if kind == "slow":
            self.state.closing.wait(60)
        if kind == "meet":
            self.state.barrier.wait(timeout=30)
        if kind == "drop":
            self.close_connection = True
        elif kind.isdigit():
            self._send(int(kind), {"error": {"message": "come again"}}, {"Retry-After": "0.05"})
        elif kind == "echo":
            self._send(401, {"error": {"message": f"bad key: {self.headers['Authorization']}"}})
        else:
            fixed = {"garbage": "what a task", "repeat": content}
            said = fixed.get(kind) or f"As asked.\n**Score: {content.split()[-1]}**"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            self._send(200, completion)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


@contextlib.contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """Serve until the end of the block."""
    state = JudgeServer()
    handler = type("Handler", (_Handler,), {"state": state})
    with _Server(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield state
        state.closing.set()
        server.shutdown()
        thread.join(timeout=10)
