"""Who may read the pages: this machine by its own names, other machines with the run's token."""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import stat
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pmdflow.errors import LaunchError

TOKEN_FILE = "dashboard.token"  # noqa: S105 - a name
"""In the run directory; readable by its owner alone."""

_LOCAL_NAMES = frozenset({"127.0.0.1", "::1", "localhost"})
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - nothing is bound here
_TOKEN_BYTES = 32
_ASK = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pmdflow: token needed</title><link rel="icon" href="data:,">
<style>:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 34em;
margin: 12vh auto; padding: 0 20px } input, button { font: inherit; padding: 4px 10px }</style></head>
<body><h1>401: {what}</h1>
<p>These pages are served to other machines, so they ask for the token of their run. Open the link that
<code>pmdflow</code> printed when it started them; or enter what the file <code>{file}</code> of the run directory
holds.</p>
<form action="/"><label>Token <input name="token" type="password" autocomplete="off" required></label>
<button>Open</button></form></body></html>
"""


def is_local(host: str) -> bool:
    """Whether only this machine can reach what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_of(run: Path) -> str:
    """The token of a run's pages, made when there is none; kept in `dashboard.token`, so that links last.

    Raises:
        LaunchError: the file cannot be written or read, or others can read it.
    """
    file = run / TOKEN_FILE
    try:
        if not file.exists():
            _make_token(file)
        token, mode = file.read_text().strip(), stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise LaunchError(
            f"{file}: {error.strerror}, and pages for other machines need a token",
            hint="make it writable, or serve this machine alone: host 127.0.0.1",
        ) from error
    if mode & 0o077 or len(token) < _TOKEN_BYTES:
        fault = f"can be read by others (mode {mode:04o})" if mode & 0o077 else f"holds {len(token)} characters"
        raise LaunchError(f"{file} {fault}: that is no secret", hint="delete it, and a new one is made")
    return token


def url_of(host: str, port: int) -> str:
    """What a browser opens; for every address of this machine, its name."""
    if host in _EVERY_ADDRESS:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def shown_link(run: Path, url: str, token: str | None, stream: IO[str]) -> str:
    """The link as it is printed: whole on a terminal; in a file, which others may read, it names the token's place."""
    if token is None:
        return url
    return f"{url}/?token={token}" if stream.isatty() else f"{url} (token: {run / TOKEN_FILE})"


class LocalNames:
    """Refuses requests under foreign names: another site's page must not read a run through one that resolves here."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        """Let requests to `host` and the names of this machine through to `app`."""
        self._app = app
        self._names = _LOCAL_NAMES | {host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        app: ASGIApp = self._app
        if scope["type"] == "http" and _name(Request(scope).headers.get("host", "")) not in self._names:
            app = PlainTextResponse("400: these pages are served under the names of this machine alone", 400)
        await app(scope, receive, send)


class RequireToken:
    """Asks for a token: in the link at the first visit, then in a cookie; programs send it as a bearer's."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        """Let nothing through to `app` without `token`."""
        self._app = app
        self._token = token
        # Browsers share cookies between the ports of a host: the pages of two runs need two names.
        self._cookie = f"pmdflow-{sha256(token.encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        app = self._app if scope["type"] == "lifespan" else self._answer(Request(scope)) or self._app
        await app(scope, receive, send)

    def _answer(self, request: Request) -> Response | None:
        """A redirect that sets the cookie, a refusal, or None for a visitor who is known."""
        given = request.query_params.get("token")
        if given is not None and self._fits(given):
            # A path of two slashes would be another host.
            target = "/" + request.url.remove_query_params("token").path.lstrip("/")
            query = request.url.remove_query_params("token").query
            answer = RedirectResponse(f"{target}?{query}" if query else target, 303)
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
            answer.headers["Cache-Control"] = "no-store"
            return answer
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        known = self._fits(request.cookies.get(self._cookie, "")) or (kind.lower() == "bearer" and self._fits(sent))
        if known and given is None:
            return None
        what = "a token is needed" if given is None else "this token is wrong"
        headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store"}
        return HTMLResponse(_ASK.replace("{what}", what).replace("{file}", TOKEN_FILE), 401, headers)

    def _fits(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _make_token(file: Path) -> None:
    """Write a token aside and link it: nobody reads half of it, and of two processes one wins."""
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")  # mode 0600
    try:
        with open(descriptor, "w") as written:
            written.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
        os.link(aside, file)
    except FileExistsError:
        pass
    finally:
        os.unlink(aside)


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
