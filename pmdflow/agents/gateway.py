"""The HTTP front of a run: stateless, at a fixed address; the rollout actor that holds the lease generates."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any
from uuid import uuid4

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pmdflow.agents.answers import chunks, error
from pmdflow.agents.channel import Channels, WorkerGone
from pmdflow.agents.connection import Connection
from pmdflow.agents.desk import Incoming, Outgoing
from pmdflow.agents.keys import Credential, read_key
from pmdflow.agents.requests import Delivered, RequestRefused, parse_reward, parse_turn
from pmdflow.config.agents import AgentsConfig
from pmdflow.errors import PmdflowError
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer

MAX_BODY_BYTES = 16 << 20
BODY_TIMEOUT_S = 30.0
"""A request has arrived within this time."""
MAX_CONNECTIONS = 4096
START_TIMEOUT_S = 30.0
"""The port of a gateway that was killed is free within this time."""
MAX_REFUSALS = 20
"""Refused keys that are told between two drains."""


class Gateway:
    """An actor that serves `/episodes/ID/v1`. It keeps nothing: killed, it is started again, and clients ask again."""

    def __init__(self, *, config: AgentsConfig, model: str, secret: bytes, port: int) -> None:
        """Serve nothing yet; `model` is the name in `/v1/models`, `secret` signs the keys."""
        self._spans = SpanBuffer("gateway")
        self._refusals: deque[str] = deque(maxlen=MAX_REFUSALS)
        self._stopping = threading.Event()
        self._front = _Front(config, model, secret, port, self._refusals.append)

    def run(self) -> None:
        """Serve until `stop`.

        Consumes: HTTP requests. Produces: their answers. Waits for: rollout actors, whose turns are durable.

        Raises:
            PmdflowError: the port is taken.
        """
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        asyncio.run(self._front.serve(self._stopping))

    def stop(self) -> None:
        """Let `run` return; open requests are broken off."""
        self._stopping.set()

    def drain(self) -> ActorReport:
        """What happened since the last call."""
        refused = [self._refusals.popleft() for _ in range(len(self._refusals))]
        events = [Event(kind="request_refused", message=why, attrs={"actor": "gateway"}) for why in refused]
        return ActorReport(spans=self._spans.drain(), events=[*events, *self._spans.losses()])


class _Front:
    """The application; Ray makes another kind of actor of a class with coroutines."""

    def __init__(
        self, config: AgentsConfig, model: str, secret: bytes, port: int, refuse: Callable[[str], None]
    ) -> None:
        self._config, self._model, self._secret, self._port, self._refuse = config, model, secret, port, refuse
        self._served, self._process = 0, uuid4().hex
        """The latter tells its requests from those of a gateway before it."""
        self._channels = Channels(self._process)

    async def serve(self, stopping: threading.Event) -> None:
        """Until `stopping` is set."""
        routes = [
            Route("/episodes/{id:int}/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/episodes/{id:int}/v1/completions", self._text, methods=["POST"]),
            Route("/episodes/{id:int}/v1/reward", self._reward, methods=["POST"]),
            Route("/episodes/{id:int}/v1/models", self._models, methods=["GET"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), host=self._config.host, port=self._port, log_config=None, access_log=False,
            limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=60, lifespan="off", http=Connection,
        )  # fmt: skip
        listener = await self._bound(config)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopped = asyncio.create_task(asyncio.to_thread(stopping.wait))
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopping.set()
        server.should_exit = server.force_exit = True
        await serving

    async def _bound(self, config: uvicorn.Config) -> socket.socket:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((config.host, config.port))
            except OSError as failure:
                listener.close()
                if time.monotonic() > deadline:
                    raise PmdflowError(
                        f"agents.port: the gateway cannot serve at {config.host}:{config.port}: {failure.strerror}",
                        hint="choose another agents.port, or 0 for a free one; agents.host must be this machine's",
                    ) from failure
                await asyncio.sleep(0.2)
            else:
                listener.set_inheritable(False)
                return listener

    async def _chat(self, request: Request) -> Response:
        return await self._turn(request, chat=True)

    async def _text(self, request: Request) -> Response:
        return await self._turn(request, chat=False)

    async def _turn(self, request: Request, *, chat: bool) -> Response:
        try:
            whose, body = await self._read(request)
            turn = parse_turn(
                body,
                chat=chat,
                attempt=_attempt(request.headers.get("x-stainless-retry-count", "")),
                idempotency_key=request.headers.get("idempotency-key"),
            )
            answer = await self._ask(whose, turn)
        except RequestRefused as refusal:
            return _refused(refusal)
        # Where its client still listens, the answer is read: a retry of the same that comes later is of another.
        told = None if await request.is_disconnected() else BackgroundTask(self._deliver, whose, answer.id)
        if answer.status == 200 and body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = _events(answer.body, usage=usage)
            return StreamingResponse(events, media_type="text/event-stream", background=told)
        return JSONResponse(answer.body, status_code=answer.status, background=told)

    async def _deliver(self, whose: Credential, id: str) -> None:
        incoming = Incoming(id=id, trajectory=whose.trajectory, epoch=whose.epoch, content=Delivered())
        self._channels.deliver(whose.worker, incoming)

    async def _reward(self, request: Request) -> Response:
        try:
            whose, body = await self._read(request)
            answer = await self._ask(whose, parse_reward(body))
        except RequestRefused as refusal:
            return _refused(refusal)
        return JSONResponse(answer.body, status_code=answer.status)

    async def _models(self, request: Request) -> Response:
        try:
            self._whose(request)
        except RequestRefused as refusal:
            return _refused(refusal)
        listed = {"id": self._model, "object": "model", "created": 0, "owned_by": "pmdflow"}
        return JSONResponse({"object": "list", "data": [listed]})

    async def _read(self, request: Request) -> tuple[Credential, Any]:
        """Who asks, and the JSON of the body.

        Raises:
            RequestRefused: a foreign key, or a body that is too large, too slow or no JSON.
        """
        whose = self._whose(request)
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told[:20]) > MAX_BODY_BYTES:
            raise RequestRefused(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = b""
                async for part in request.stream():
                    data += part
                    if len(data) > MAX_BODY_BYTES:
                        raise RequestRefused(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
        except TimeoutError:
            raise RequestRefused(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408) from None
        except ClientDisconnect:
            raise RequestRefused("the client went away", status=400) from None
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as failure:
            raise RequestRefused(f"the body is no JSON: {failure}") from None
        return whose, body

    def _whose(self, request: Request) -> Credential:
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        whose = read_key(key, self._secret)
        if whose is None or whose.trajectory != request.path_params["id"]:
            told = hashlib.sha256(key.encode()).hexdigest()[:8]
            why = "no key" if not key else f"a key (sha256 {told}...) that is not this episode's"
            self._refuse(f"episode {request.path_params['id']}: {why}")
            message = "the API key is not that of this episode's program, which has it in OPENAI_API_KEY"
            raise RequestRefused(message, status=401, kind="invalid_api_key")
        return whose

    async def _ask(self, whose: Credential, content: Any) -> Outgoing:
        """Have the rollout actor answer; one that is gone has ended the program with it."""
        self._served += 1
        id = f"{self._process}-{self._served}"
        incoming = Incoming(id=id, trajectory=whose.trajectory, epoch=whose.epoch, content=content)
        try:
            return await self._channels.ask(whose.worker, incoming)
        except WorkerGone:
            message = f"episode {whose.trajectory}: {whose.worker} is gone, and another program is started in its place"
            raise RequestRefused(message, status=410, kind="session_over") from None


def _attempt(counted: str) -> int | None:
    """What a client's header says of its attempts; None where it is no count."""
    return int(counted) if counted.isascii() and counted.isdigit() and len(counted) < 10 else None


def _refused(refusal: RequestRefused) -> Response:
    return JSONResponse(error(str(refusal), kind=refusal.kind), status_code=refusal.status)


async def _events(answer: Mapping[str, Any], *, usage: bool) -> AsyncIterator[str]:
    for chunk in chunks(answer, usage=usage):
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"
