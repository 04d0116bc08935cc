"""A Hub on loopback that takes the uploads of the real huggingface_hub client.

What it answers was found by running huggingface_hub 2.4.0 (`create_repo`, `upload_folder`, HF_HUB_DISABLE_XET=1)
against a server that wrote down what was asked: who the token is, whether the repository exists, its creation, the list
of its files, a check of the model card's metadata, how each file is to be uploaded, one LFS batch, a PUT and a check
for each large file, one commit, which may also delete files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TOKEN = "hf_" + "t" * 34


class HubUploads:
    """The server. `environment` makes a process ask it, with a token that may write.

    Example:
        with HubUploads(tmp_path / "home") as hub:
            subprocess.run([...], env=os.environ | hub.environment)
            hub.repositories["me/model"]["README.md"]
    """

    def __init__(self, home: Path) -> None:
        """`home` becomes the client's HF_HOME."""
        self.repositories: dict[str, dict[str, bytes]] = {}
        """Files by path, by repository."""
        self.private: set[str] = set()
        self.asked: list[str] = []
        """Method and path of every request."""
        self.broken: HTTPStatus | None = None
        """What every PUT is answered with."""
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[HTTPStatus, Any]:
        """Status and JSON for a request of a client whose token is right."""
        if path == "/api/whoami-v2":
            return HTTPStatus.OK, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return HTTPStatus.OK, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            return self._put(path.rpartition("/")[2], body)
        if path == "/verify":
            asked = json.loads(body)
            return HTTPStatus.OK if len(self.blobs[asked["oid"]]) == asked["size"] else HTTPStatus.NOT_FOUND, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return HTTPStatus.OK, {
                "transfer": "basic",
                "objects": [self._action(o) for o in json.loads(body)["objects"]],
            }
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|tree)/main)?", path.partition("?")[0])
        if match is None or match[1] not in self.repositories:
            return HTTPStatus.NOT_FOUND, {"error": "Repository not found"}
        if match[2] == "preupload":
            return HTTPStatus.OK, {"files": [_how(file["path"]) for file in json.loads(body)["files"]]}
        if match[2] == "tree":
            files = self.repositories[match[1]].items()
            return HTTPStatus.OK, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files
            ]
        if match[2] == "commit":
            return self._commit(match[1], body)
        return HTTPStatus.OK, {"_id": "0" * 24, "id": match[1], "sha": "0" * 40}

    def _create(self, asked: dict[str, Any]) -> tuple[HTTPStatus, Any]:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        if name in self.repositories:
            return HTTPStatus.CONFLICT, {
                "error": "You already created this model repo",
                "url": f"{self.address}/{name}",
            }
        self.repositories[name] = {}
        if asked.get("visibility") == "private":
            self.private.add(name)
        return HTTPStatus.OK, {"url": f"{self.address}/{name}", "name": name, "id": name}

    def _put(self, oid: str, body: bytes) -> tuple[HTTPStatus, Any]:
        if self.broken is not None:
            return self.broken, {"error": "try later"}
        if hashlib.sha256(body).hexdigest() != oid:
            return HTTPStatus.BAD_REQUEST, {"error": "another content"}
        self.blobs[oid] = body
        return HTTPStatus.OK, {}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = {
            "upload": {"href": f"{self.address}/lfs/{asked['oid']}"},
            "verify": {"href": f"{self.address}/verify"},
        }
        return {"oid": asked["oid"], "size": asked["size"], "actions": actions}

    def _commit(self, name: str, body: bytes) -> tuple[HTTPStatus, Any]:
        files = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        return HTTPStatus.OK, {"commitUrl": f"{self.address}/{name}/commit/{oid}", "commitOid": oid, "success": True}


def _how(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubUploads
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")
        status, value = self.hub.answer(self.command, self.path, body) if known else (HTTPStatus.UNAUTHORIZED, {})
        content = json.dumps(value).encode()
        self.send_response(status)
        if status == HTTPStatus.NOT_FOUND:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET  # noqa: N815 (http.server calls them so)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""
