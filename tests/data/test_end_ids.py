"""Which token ids end a sequence of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config

from pmdflow.data.tokenizer import end_ids, load_tokenizer
from tests.support.tokenizer import write_tokenizer


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        ("<|turn_end|>\n", "<|turn_end|>"),
        ("\n<|turn_end|>", "<|turn_end|>"),
        ("<|turn_end|>2", "<|turn_end|>2"),
        ("</said>\n", None),
        ("", None),
    ],
)
def test_the_end_of_a_turn_is_a_special_token_behind_the_words(tmp_path: Path, behind: str, found: str | None) -> None:
    template = "{% for message in messages %}<|turn|>{{ message.content }}" + behind + "{% endfor %}"
    tokenizer = write_tokenizer(tmp_path, chat_template=template)
    expected = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(found)} if found else set())
    assert end_ids(str(tmp_path)) == expected


@pytest.mark.parametrize(
    "message",
    [
        "{% if message.role != 'user' %}{{ raise_exception('no answers') }}{% endif %}{{ message.content }}",
        "{{ message.content + message.images }}",
        "{{ 1 + message.content }}",
        "{% for part in message.content %}{{ part.text }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_render_answers_names_no_end(tmp_path: Path, message: str) -> None:
    template = "{% for message in messages %}<|turn|>" + message + "{% endfor %}"
    tokenizer = write_tokenizer(tmp_path, chat_template=template)
    assert end_ids(str(tmp_path)) == {tokenizer.eos_token_id}


def test_the_text_model_in_a_larger_one_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [3, 4]}}))
    assert end_ids(str(tmp_path)) == {3, 4}


def test_a_folder_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match=r"names no eos_token_id; set it in generation_config\.json"):
        end_ids(str(tmp_path))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"eos_token_id": "1"}', r"eos_token_id is '1', not a token id or a list of them; mend it there"),
        ('{"eos_token_id": [[1, 2]]}', r"eos_token_id is \[\[1, 2\]\], not a token id"),
        ('{"text_config": {"eos_token_id": true}}', "eos_token_id is True, not a token id"),
        ("{", "cannot be read: .*; fetch it again"),
    ],
)
def test_an_end_that_is_no_token_id_is_refused_with_its_file(tmp_path: Path, written: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(written)
    with pytest.raises(ValueError, match=rf"{tmp_path}/generation_config\.json:? {message}"):
        end_ids(str(tmp_path))


def test_a_folder_without_a_tokenizer_has_no_empty_one(tmp_path: Path) -> None:
    Qwen3Config(eos_token_id=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer; copy the files of its model there"):
        load_tokenizer(str(tmp_path))
    assert end_ids(str(tmp_path)) == {9}
