"""What reward functions are given: the same for what was stored and for what was evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.reward.function import INPUTS
from pmdflow.reward.item import ScoreItem, decode_inputs
from tests.support.reward import items, save_tokenizer

TEXT = "<think>hm</think> é <|tool_call_begin|>f<|tool_call_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    specials = ("<think>", "</think>", "<|tool_call_begin|>", "<|tool_call_end|>")
    return save_tokenizer(tmp_path_factory.mktemp("model"), *specials)


def test_special_tokens_are_kept_where_a_function_asks_for_them(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    metadata = {"answer": 1, "messages": [{"role": "user", "content": "hi"}]}
    item = ScoreItem.of_tokens(
        tokens, tokenizer=tokenizer, inputs=frozenset(INPUTS), prompt="hi", stop="length", metadata=metadata
    )
    assert decode_inputs(item.encode()) == {
        "completion": "hm é f", "raw_completion": TEXT + "<eos>", "token_ids": tokens, "stop": "length", "prompt": "hi",
        "messages": metadata["messages"], "metadata": metadata, "rewards": {},
    }  # fmt: skip
    assert {*decode_inputs(item.encode()), "timeout_s"} == set(INPUTS)


def test_what_nobody_asks_for_is_not_decoded(folder: str) -> None:
    item = ScoreItem.of_tokens(
        [2, 3], tokenizer=load_tokenizer(folder), inputs={"completion"}, prompt="", stop="stop", metadata={}
    )
    assert (item.raw_completion, item.token_ids, item.messages) == ("", (), None)


@given(st.text(st.characters(exclude_categories=())), st.dictionaries(st.text(), st.integers(-(2**63), 2**64 - 1)))
def test_any_text_arrives_as_it_was(completion: str, metadata: dict[str, int]) -> None:
    (item,) = items(completion, **{f"key{name}": value for name, value in metadata.items()})
    inputs = decode_inputs(item.encode())
    assert inputs["completion"] == completion
    assert inputs["metadata"] == item.metadata


def test_metadata_of_other_types_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path"):
        items("x", path=tmp_path)[0].encode()
