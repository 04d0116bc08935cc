"""Histories grow by token ids: nothing that was sent or generated is tokenized again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pmdflow.agents.history import History
from pmdflow.agents.requests import RequestRefused, TurnRequest, parse_turn
from pmdflow.agents.tools import Said, read
from pmdflow.data.messages import Style
from pmdflow.data.tokenizer import load_tokenizer
from tests.support.chat_model import FORGETFUL, TEMPLATE, chat_model
from tests.support.paths import TINY

ASK = [{"role": "user", "content": "1 + 2"}]


def history_of(tmp_path: Path, template: str | None = TEMPLATE) -> History:
    folder = TINY if template is None else chat_model(tmp_path / "model", template)
    return History(load_tokenizer(str(folder)), Style())


def asked(messages: list[Any], **others: Any) -> TurnRequest:
    return parse_turn({"messages": messages, **others}, chat=True)


def text_of(history: History, tokens: tuple[int, ...]) -> str:
    return str(history.tokenizer.decode(list(tokens)))


def test_what_follows_an_answer_is_all_that_is_tokenized(tmp_path: Path) -> None:
    history = history_of(tmp_path)
    first = history.target(asked(ASK))
    assert text_of(history, first.tokens) == "<pad>u:1 + 2\na:"
    three = history.tokenizer.convert_tokens_to_ids("3")
    generated = (three, three, 1)  # no tokenizer would be asked for these two digits again
    history.answered(asked(ASK), first, Said(text="33", content="33"), generated)
    second = history.target(asked([*ASK, {"role": "assistant", "content": "33"}, {"role": "user", "content": "sure?"}]))
    assert second.tokens[: len(first.tokens) + 3] == (*first.tokens, *generated)
    assert text_of(history, second.tokens) == "<pad>u:1 + 2\na:33<eos>\nu:sure?\na:"
    assert second.broken == ""


def test_a_turn_that_was_cut_gets_its_end_from_the_template(tmp_path: Path) -> None:
    history = history_of(tmp_path)
    first = history.target(asked(ASK))
    history.answered(asked(ASK), first, Said(text="3", content="3"), (history.tokenizer.convert_tokens_to_ids("3"),))
    second = history.target(asked([*ASK, {"role": "assistant", "content": "3"}, {"role": "user", "content": "?"}]))
    assert text_of(history, second.tokens) == "<pad>u:1 + 2\na:3<eos>\nu:?\na:"


@pytest.mark.parametrize(
    "returned",
    [
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "3", "refusal": None, "annotations": [], "audio": None},
    ],
)
def test_what_clients_add_to_an_answer_does_not_matter(tmp_path: Path, returned: dict[str, Any]) -> None:
    history = history_of(tmp_path)
    first = history.target(asked(ASK))
    history.answered(asked(ASK), first, Said(text="3", content="3"), (21, 1))
    second = history.target(asked([*ASK, returned, {"role": "user", "content": "?"}]))
    assert second.tokens[: len(first.tokens) + 2] == (*first.tokens, 21, 1)


def test_a_history_that_the_program_rewrote_is_made_anew(tmp_path: Path) -> None:
    history = history_of(tmp_path)
    first = history.target(asked(ASK))
    history.answered(asked(ASK), first, Said(text="3", content="3"), (20, 1))
    other = history.target(asked([*ASK, {"role": "assistant", "content": "4"}, {"role": "user", "content": "?"}]))
    assert text_of(history, other.tokens) == "<pad>u:1 + 2\na:4<eos>\nu:?\na:"
    assert other.broken == ""


def test_a_template_that_says_earlier_turns_anew_is_found_with_the_difference(tmp_path: Path) -> None:
    history = history_of(tmp_path, FORGETFUL)
    first = history.target(asked(ASK))
    history.answered(asked(ASK), first, Said(text="3", content="3"), (20, 1))
    again = history.target(asked([*ASK, {"role": "assistant", "content": "3"}, {"role": "user", "content": "?"}]))
    assert "the chat template says the earlier turns anew: after 7 characters" in again.broken
    assert "'<pad>u:1 + 2" in again.broken
    assert text_of(history, again.tokens) == "<pad>u:\na:3<eos>\nu:?\na:"


def test_texts_grow_too(tmp_path: Path) -> None:
    history = history_of(tmp_path, None)
    first = parse_turn({"prompt": "1 + 2 ="}, chat=False)
    target = history.target(first)
    history.answered(first, target, Said(text=" 3", content=" 3"), (222, 20))
    assert history.target(parse_turn({"prompt": "1 + 2 = 3\n"}, chat=False)).tokens == (*target.tokens, 222, 20, 200)
    assert history.target(parse_turn({"prompt": [5, 6]}, chat=False)).tokens == (5, 6)


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    with pytest.raises(RequestRefused, match="no chat template: ask /v1/completions"):
        history_of(tmp_path, None).target(asked(ASK))


HERMES = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>'


@pytest.mark.parametrize(
    ("style", "text", "content"),
    [
        ("hermes", f"so {HERMES}", "so"),
        ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2]}}', ""),
        ("llama", '{"name": "add", "parameters": {"a": 1, "b": [2]}}', ""),
        ("json", ' {"name": "add", "arguments": {"a": 1, "b": [2]}} ', ""),
        (
            "kimi",
            "so<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"  # noqa: ISC004
            '{"a": 1, "b": [2]}<|tool_call_end|><|tool_calls_section_end|>',
            "so",
        ),
    ],
)
def test_calls_are_read_in_the_form_of_the_model(style: Any, text: str, content: str) -> None:
    said = read(text, style, id="7-3-0")
    assert said.content == content
    (call,) = said.message["tool_calls"]
    assert call["id"] == "call-7-3-0-0"
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1, "b": [2]})


@pytest.mark.parametrize("style", ["hermes", "llama", "kimi", "json"])
@pytest.mark.parametrize("text", ["", "no call", "<tool_call>{", '<tool_call>{"name": 3}</tool_call>', "{}", '{"a": 1'])
def test_what_is_no_whole_call_stays_text(style: Any, text: str) -> None:
    said = read(text, style, id="0")
    assert (said.content, said.calls) == (text, ())


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (None, "valid dictionary"),
        ({"messages": []}, "not a list with something in it"),
        ({"messages": [{"role": "king", "content": "?"}]}, "needs a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images"),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens"),
        ({"messages": ASK, "n": 1000}, "n: "),
        ({"messages": ASK, "stop": [""]}, "empty text"),
        ({"messages": ASK, "logit_bias": {"1": 2}}, "logit_bias: not supported"),
        ({"messages": ASK, "response_format": {"type": "json_object"}}, "response_format json_object"),
        ({"messages": ASK, "response_format": 3}, "response_format"),
        ({"messages": ASK, "tools": [3]}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, *ASK]}, "tool_calls.0.function"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}, *ASK]}, "tool_calls"),
        ({"messages": ASK, "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_requests_say_what_is_wrong(body: Any, why: str) -> None:
    with pytest.raises(RequestRefused, match=why):
        parse_turn(body, chat=True)
