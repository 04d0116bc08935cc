"""Requests that no client should send: each is refused by name, and the actor that serves all others lives."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pmdflow.agents.requests import RequestRefused, parse_reward, parse_turn
from pmdflow.agents.tools import ToolFormat, read
from tests.support.agent_world import ASK, World

DEEP = "[" * 5000
HALF = "\ud800"
CALL = {"type": "function", "id": "c", "function": {"name": "add", "arguments": "{}"}}


def calling(arguments: Any) -> dict[str, Any]:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    return {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, ASK]}


@pytest.mark.parametrize("prompt", [[0, 1 << 40], [0, 383_000], [5], [0, 5, 1 << 31]])
def test_a_token_that_the_model_has_not_is_refused(world: World, prompt: list[int]) -> None:
    life = world.life()
    start = world.store.trajectory(life.id)["prompt"].tolist() if prompt[0] == 0 else []
    refused = life.wait(life.send({"prompt": [*start, *prompt[bool(start) :]]}, chat=False))
    assert refused.status == 400, refused
    life.ask(ASK)


@pytest.mark.parametrize("body", [calling(DEEP), calling(json.dumps({"a": HALF})), calling('{"a": ')])
def test_arguments_of_calls_that_no_tokenizer_takes_are_refused(world: World, body: dict[str, Any]) -> None:
    life = world.life()
    assert life.wait(life.send(body)).status in (200, 400)
    life.ask(ASK)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": "x", "name": nested(700)}]},
        {"messages": [ASK], "temperature": HALF},
        {"messages": [ASK], "best_of": "x"},
        {"messages": [ASK], "stop": [""]},
    ],
)
def test_a_body_that_is_no_text_is_refused_before_it_goes_anywhere(body: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused):
        parse_turn(body, chat=True)


@pytest.mark.parametrize("body", [10**400, {HALF: 1.0}, {"a": 10**400}, {"a": [1]}, float("nan"), {}])
def test_a_reward_that_the_store_cannot_hold_is_refused(body: Any) -> None:
    with pytest.raises(RequestRefused):
        parse_reward(body)


@pytest.mark.parametrize("style", ["hermes", "llama", "kimi", "json"])
def test_what_a_model_writes_is_no_call_where_it_cannot_be_sent(style: ToolFormat) -> None:
    for text in ('{"a":' * 5000, '{"name": "\\ud800", "arguments": {}}'):
        marked = {"hermes": f"<tool_call>{text}}}</tool_call>", "json": text, "llama": text}.get(
            style, f"<|tool_call_begin|>x<|tool_call_argument_begin|>{text}<|tool_call_end|>"
        )
        said = read(marked, style, id="0")
        json.dumps(said.message, ensure_ascii=False).encode()
        if style != "kimi":
            assert said.calls == ()


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_that_is_much_too_long_is_refused_before_it_is_tokenized(
    world: World, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = world.life()
    text = "1 + 2 " * 100_000
    session: Any = life.holder[life.id].session
    read: list[int] = []
    tokenizer = type(session.wording.tokenizer)
    call = tokenizer.__call__
    monkeypatch.setattr(
        tokenizer, "__call__", lambda self, text, **how: (read.append(len(text)), call(self, text, **how))[1]
    )
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    refused = life.wait(life.send(body, chat=chat))
    assert refused.body["error"]["code"] == "context_length_exceeded"
    assert max(read, default=0) < 1000


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hermes", "<tool_call>{ " * 20_000),
        ("kimi", "<|tool_call_begin|>x<|tool_call_argument_begin|>" * 5_000),
        ("kimi", "<|tool_call_begin|>" + " " * 40_000 + "<|tool_call_argument_begin|>" + " " * 40_000),
    ],
)
def test_a_model_that_loops_in_its_markers_keeps_nobody_waiting(style: ToolFormat, text: str) -> None:
    start = time.monotonic()
    assert read(text, style, id="0").calls == ()
    assert time.monotonic() - start < 2.0


def test_calls_among_broken_ones_are_read() -> None:
    one = '<tool_call>{"name": "a", "arguments": {"x": "<tool_call>"}}</tool_call>'
    for text, content, count in (
        (f"<tool_call>no {one[:11]}{one[11:]}", "<tool_call>no", 1),
        (f"x{one}y{one[:-12]}", "xy", 2),
        (f"{one}<tool_call>{{", "<tool_call>{", 1),
    ):
        said = read(text, "hermes", id="0")
        assert (said.content, len(said.calls)) == (content, count)
