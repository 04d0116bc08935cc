"""The front: who may ask, what is refused, and the form of answers, by real clients over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pmdflow.agents import connection, gateway
from pmdflow.agents.answers import Choice, chat_answer
from pmdflow.agents.desk import Desk, Incoming, Outgoing
from pmdflow.agents.gateway import _Front
from pmdflow.agents.keys import Credential
from pmdflow.agents.requests import Posted
from pmdflow.agents.tools import Said
from pmdflow.config.agents import AgentsConfig

SECRET = b"secret"
KEY = Credential("rollout-0/1", 7, 1).key(SECRET)
FOREIGN = [
    "", "sk-1", KEY[:-8] + "AAAAAAA=", Credential("rollout-0/1", 8, 1).key(SECRET),
    Credential("rollout-0/1", 7, 1).key(b"another"), "é",
]  # fmt: skip


class Echo:
    """Stands for the rollout actors: answers a turn with what was asked."""

    def __init__(self) -> None:
        self.asked: list[Incoming] = []
        self.delivered: list[Incoming] = []

    def deliver(self, worker: str, incoming: Incoming) -> None:
        self.delivered.append(incoming)

    async def ask(self, worker: str, incoming: Incoming) -> Outgoing:
        self.asked.append(incoming)
        if isinstance(incoming.content, Posted):
            return Outgoing(id=incoming.id, status=200, body={"rewards": dict(incoming.content.rewards)})
        said = Said(text="", content=str((incoming.content.messages or [{"content": "?"}])[-1]["content"]))
        choice = Choice(
            said=said, tokens=[5, 6], texts=["a", "b"], logprobs=[-1.0, -2.0], versions=[3, 4], finish="stop"
        )
        return Outgoing(id=incoming.id, status=200, body=chat_answer("7-3-0", "run", [choice], prompt_tokens=3))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Echo, list[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    refused: list[str] = []
    front = _Front(AgentsConfig(command=["agent"]), "run", SECRET, port, refused.append)
    echo, stopping = Echo(), threading.Event()
    front._channels = echo  # type: ignore[assignment]
    thread = threading.Thread(target=lambda: asyncio.run(front.serve(stopping)))
    thread.start()
    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/episodes/7/v1", echo, refused
    stopping.set()
    thread.join(timeout=20)


def ask(url: str, key: str = KEY, **how: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}".encode()} | how.pop("headers", {})
    return httpx.post(f"{url}/chat/completions", headers=headers, timeout=20, **how)


def test_the_official_client_reads_answers_streams_models_and_errors(served: tuple[str, Echo, list[str]]) -> None:
    url, _, _ = served
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="run", messages=messages, logprobs=True)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.model_dump()["pmdflow"]["versions"] == [[[3, 1], [4, 1]]]
    stream = client.chat.completions.create(
        model="run", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "hello"
    assert pieces[-1].usage is not None
    assert [model.id for model in client.models.list()] == ["run"]
    with pytest.raises(openai.BadRequestError, match="logit_bias: not supported"):
        client.chat.completions.create(model="run", messages=messages, logit_bias={"5": 3})
    with pytest.raises(openai.AuthenticationError, match="not that of this episode"):
        openai.OpenAI(base_url=url, api_key="sk-1", max_retries=0).models.list()


@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_key_is_refused_and_told_without_itself(served: tuple[str, Echo, list[str]], key: str) -> None:
    url, echo, refused = served
    before = len(echo.asked)
    response = ask(url, headers={"authorization": f"Bearer {key}".strip().encode()}, json={})
    assert response.status_code == 401
    assert len(echo.asked) == before
    assert refused[-1].startswith("episode 7")
    assert not key or key not in refused[-1]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"3", 400, "valid dictionary"),
        (b'{"messages": 3}', 400, "messages"),
        (b"\xff", 400, "no JSON"),
    ],
)
def test_a_malformed_body_is_refused(served: tuple[str, Echo, list[str]], body: bytes, status: int, why: str) -> None:
    response = ask(served[0], content=body)
    assert response.status_code == status
    assert why in response.json()["error"]["message"]


def test_a_large_or_slow_body_is_refused(served: tuple[str, Echo, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(gateway, "BODY_TIMEOUT_S", 0.2)
    assert ask(served[0], content=b" " * 2000).status_code == 413

    def drip() -> Iterator[bytes]:
        for _ in range(20):
            yield b" "
            time.sleep(0.1)

    assert ask(served[0], content=drip()).status_code == 408


@pytest.mark.parametrize("sent", [b"", b"POST /episodes/7/v1/completions HTTP/1.1\r\nhost: x\r\n"])
def test_a_connection_without_a_request_is_closed(
    served: tuple[str, Echo, list[str]], sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    url = httpx.URL(served[0])
    assert url.port is not None
    with socket.create_connection((url.host, url.port), timeout=20) as client:
        client.sendall(sent)
        answer = b""
        while data := client.recv(4096):
            answer += data
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 0.2 s" in answer


def test_a_connection_that_waits_between_requests_is_kept(
    served: tuple[str, Echo, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.2)
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}) as client:
        for _ in range(3):
            assert client.get(f"{served[0]}/models").status_code == 200
            (kept,) = client._transport._pool.connections  # type: ignore[attr-defined]
            time.sleep(0.4)
        assert client._transport._pool.connections == [kept]  # type: ignore[attr-defined]


def test_an_answer_that_was_read_is_told(served: tuple[str, Echo, list[str]]) -> None:
    url, echo, _ = served
    ask(url, json={"messages": [{"role": "user", "content": "?"}]})
    deadline = time.monotonic() + 10
    while not echo.delivered or echo.delivered[-1].id != echo.asked[-1].id:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_retries_are_known_by_the_clients_own_header(served: tuple[str, Echo, list[str]]) -> None:
    url, echo, _ = served
    body = {"messages": [{"role": "user", "content": "?"}]}
    ask(url, json=body, headers={"x-stainless-retry-count": "1", "idempotency-key": "k"})
    ask(url, json=body, headers={"x-stainless-retry-count": "0"})
    first, second = (incoming.content for incoming in echo.asked[-2:])
    assert not isinstance(first, Posted)
    assert not isinstance(second, Posted)
    assert (first.attempt, first.idempotency_key, second.attempt) == (1, "k", 0)
    assert first.content == second.content


def test_rewards_are_posted(served: tuple[str, Echo, list[str]]) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{served[0]}/reward"
    assert httpx.post(url, json=0.5, headers=headers).json() == {"rewards": {"reward": 0.5}}
    assert httpx.post(url, json={"a": 1, "b": -2.5}, headers=headers).json() == {"rewards": {"a": 1.0, "b": -2.5}}
    for bad in ('{"a": NaN}', '{"a": "x"}', "[]", "{}", "null"):
        assert httpx.post(url, content=bad, headers=headers).status_code == 400


def test_a_call_of_a_gateway_that_was_killed_takes_no_answer_from_the_one_after_it() -> None:
    desk, taken = Desk(), list[Outgoing]()
    killed = threading.Thread(target=lambda: taken.extend(desk.take_answers(20.0, "killed")))
    killed.start()
    while not desk._gateways:
        time.sleep(0.01)
    assert desk.take_answers(0.0, "next") == []
    killed.join(timeout=10)
    desk.answer([Outgoing(id="next-1", status=200, body={})])
    assert desk.take_answers(0.0, "killed") == []
    assert [answer.id for answer in desk.take_answers(0.0, "next")] == ["next-1"]
    assert taken == []
