"""Chat messages, tools and the model's own template; and by what a prompt is known again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.data.messages import Chat, Style, parse_chat, prompt_key
from pmdflow.data.tokenizer import load_tokenizer, make_tokenize
from tests.support.data import save_tokenizer

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
words = st.lists(st.text(alphabet="ab1é+", min_size=1, max_size=5), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=TEMPLATE)


def rendered(model: str, prompt: str | Chat, **style: Any) -> str:
    return str(load_tokenizer(model).decode(make_tokenize(model, style=Style(**style))(prompt)))


def test_system_suffix_and_template_arguments_reach_the_template(chat_model: str) -> None:
    assert rendered(chat_model, "1 + 1?") == "<user>1 + 1?<assistant>"
    style = {"system": "Be brief.", "suffix": " Box it.", "template_args": {"thinking": True}}
    assert rendered(chat_model, "1 + 1?", **style) == "<system>Be brief.<user>1 + 1? Box it.<assistant><think>"


def test_messages_keep_their_own_system_message_and_the_last_user_gets_the_suffix(chat_model: str) -> None:
    chat = parse_chat(
        [
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]},
        ]
    )
    expected = "<system>Own.<user>first<assistant>yes?<user>second!<assistant>"
    assert rendered(chat_model, chat, system="Other.", suffix="!") == expected
    assert chat.text == "second"


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_reach_the_template_without_the_nulls_of_parquet(chat_model: str, as_text: bool) -> None:
    messages = [
        {"role": "user", "content": "rain?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "city": None}]},
        {"role": "tool", "content": "no", "tool_calls": None},
    ]
    tools = [{**WEATHER, "strict": None}]
    chat = parse_chat(json.dumps(messages), json.dumps(tools)) if as_text else parse_chat(messages, tools)
    text = rendered(chat_model, chat)
    assert text.startswith(f"<tools>{json.dumps([WEATHER])}<user>rain?<assistant>")
    assert text.endswith('[{"name": "weather"}]<tool>no<assistant>')
    assert "null" not in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not a list with something"),
        ("[{", "not JSON"),
        ([{"role": "robot", "content": "x"}], "needs a role"),
        ([{"content": "x"}], "needs a role"),
        (["x"], "needs a role"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "images and other media are not supported"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], r"last message.*columns\.answer"),
    ],
)
def test_messages_that_cannot_be_answered_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_chat(messages)


@given(words=words, space=st.sampled_from([" ", "\n", "  \t"]), system=st.text(max_size=5))
def test_a_prompt_is_known_again_whatever_its_white_space_and_system_message(
    words: list[str], space: str, system: str
) -> None:
    text = " ".join(words)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f" {space.join(words)}\n"}]
    assert prompt_key(parse_chat(messages)) == prompt_key(text)
    assert prompt_key(text + " more") != prompt_key(text)
    more = [*messages, {"role": "assistant", "content": "?"}, {"role": "user", "content": "go on"}]
    assert prompt_key(parse_chat(more)) != prompt_key(text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}", "system first"),
        ("{{ messages[0].content.missing.deeper }}", "no attribute 'missing'"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
    ],
)
def test_a_template_that_fails_names_the_model_the_cause_and_the_remedy(
    tmp_path: Path, template: str, message: str
) -> None:
    model = save_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(
        ValueError, match=rf"(?s){tmp_path}.*chat template fails on '1 \+ 1\?'.*{message}.*data\.system"
    ):
        make_tokenize(model)("1 + 1?")


def test_a_model_without_a_template_takes_texts_only(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no chat template for data\.system"):
        make_tokenize(model, style=Style(system="Be brief."))
    with pytest.raises(ValueError, match="no chat template for the messages of 'hi'"):
        make_tokenize(model)(parse_chat([{"role": "user", "content": "hi"}]))
    assert rendered(model, "hi", suffix="!") == "hi!\n"


def test_long_prompts_are_told_by_their_tokens_and_short_ones_by_their_bytes(chat_model: str) -> None:
    tokenize = make_tokenize(chat_model, max_tokens=30, style=Style(suffix="!"))
    overhead = len("<user>!<assistant>")
    assert tokenize.excess("x" * (30 - overhead)) == 0
    assert tokenize.excess("x" * (31 - overhead)) == 31
    assert tokenize.excess(parse_chat([{"role": "user", "content": "x"}])) == 0
    assert tokenize.excess(parse_chat([{"role": "user", "content": "x"}], [WEATHER])) > 30
