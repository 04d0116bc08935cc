"""A Hub on loopback that answers what the real huggingface_hub client asks, with its faults made on purpose.

What is asked was recorded from huggingface_hub 2.4.0 itself: `snapshot_download` and `resolve_revision` against a
server that answers 404 to everything, then against this one.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 1 << 16


@dataclass(slots=True)
class Repository:
    """Files by revision; a commit never changes."""

    kind: str
    """`models` or `datasets`."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked."""

    method: str
    path: str
    range: str | None
    token: str | None


class Hub:
    """The server; its `environment` makes a process ask it and nobody else.

    Example:
        with Hub(tmp_path / "cache") as hub:
            commit = hub.push("org/tiny", Path("configs/tiny-arithmetic"))
            subprocess.run([...], env=os.environ | hub.environment)
    """

    def __init__(self, home: Path) -> None:
        """`home` becomes the client's HF_HOME."""
        self.requests: list[Request] = []
        self.cut_after: dict[str, list[int]] = {}
        """Bytes of a file's body after which the connection is dropped, once each, by the file's name."""
        self.hold: dict[str, int] = {}
        """Bytes of a file's body after which nothing more is sent while the client waits."""
        self.held = threading.Event()
        """Set once a client waits."""
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone, as a network is."""
        self._server.shutdown()
        self._server.server_close()

    def push(
        self, name: str, files: Path | dict[str, bytes], *, kind: str = "models", ref: str = "main", gated: bool = False
    ) -> str:
        """Commit a folder's or a mapping's files on a branch; answers the commit."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        text = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())})
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository = self._repositories.setdefault((kind, name), Repository(kind))
        repository.commits[commit] = dict(files)
        repository.refs[ref] = commit
        repository.gated = gated
        return commit

    def asked(self, text: str) -> list[Request]:
        """The requests whose path holds `text`."""
        return [request for request in self.requests if text in request.path]

    def find(self, kind: str, name: str) -> Repository | None:
        """A repository by kind and id."""
        return self._repositories.get((kind, name))


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), token))
        if match := _API.fullmatch(url.path):
            self._api(match[1], match[2], match[3] or "revision", unquote(match[4] or "main"))
        elif match := _FILE.fullmatch(url.path):
            kind = "datasets" if match[1] else "models"
            self._file(kind, match[2], unquote(match[3]), unquote(match[4]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "no such page")

    do_HEAD = do_GET  # noqa: N815 (http.server calls it so)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def _api(self, kind: str, name: str, what: str, revision: str) -> None:
        found = self._commit(kind, name, revision)
        if found is None:
            return
        repository, commit = found
        if what == "revision":
            self._json({"_id": "0" * 24, "id": name, "sha": commit, "private": False, "gated": repository.gated})
            return
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(repository.commits[commit].items())
            ]
        )

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._commit(kind, name, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated:
            self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo", f"Access to {name} is restricted")
            return
        data = repository.commits[commit].get(path)
        if data is None:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "no such file")
            return
        start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            self._send(path, data[start:])

    def _send(self, path: str, data: bytes) -> None:
        """The body, or its beginning when it is to be held or cut."""
        cuts = self.hub.cut_after.get(path)
        if path in self.hub.hold:
            self.wfile.write(data[: self.hub.hold[path]])
            self.hub.held.set()
            self.connection.recv(1)  # until the client is gone
            self.close_connection = True
            return
        if not cuts:
            self.wfile.write(data)
            return
        self.wfile.write(data[: cuts.pop(0)])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def _commit(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.find(kind, name)
        if repository is None:
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
            return None
        commit = repository.find(revision)
        if commit is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
