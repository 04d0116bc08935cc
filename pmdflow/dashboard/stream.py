"""The stream that keeps an open page up to date."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

UPDATE_INTERVAL_S = 1.0
SHUTDOWN_GRACE_S = 1.0


def streamed(snapshot: Callable[[], dict[str, str]]) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose messages hold the parts of `snapshot` (JSON texts by name) that have changed."""

    async def events(request: Request) -> Response:
        closing = anyio.Event()
        return EventSourceResponse(
            _messages(request, snapshot, closing),
            headers={"Cache-Control": "no-store"},
            shutdown_event=closing,
            shutdown_grace_period=SHUTDOWN_GRACE_S,
        )

    return events


async def _messages(
    request: Request, snapshot: Callable[[], dict[str, str]], closing: anyio.Event
) -> AsyncIterator[dict[str, str]]:
    sent: dict[str, str] = {}
    while not closing.is_set() and not await request.is_disconnected():
        now = await run_in_threadpool(snapshot)
        changed = [f"{json.dumps(key)}:{value}" for key, value in now.items() if sent.get(key) != value]
        if changed:
            yield {"data": "{" + ",".join(changed) + "}"}
        sent = now
        with anyio.move_on_after(UPDATE_INTERVAL_S):
            await closing.wait()
