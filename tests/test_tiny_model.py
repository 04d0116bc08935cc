"""The tiny model of the quick start: its folder, its tokenizer and the demonstrations that taught it."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from tests.support.paths import CONFIGS

FOLDER = CONFIGS / "tiny-arithmetic"
MAX_BYTES = 4 * 1024 * 1024
MAX_TOKENS = 448
"""`data.max_tokens` of the quick start."""


def load_recipe() -> ModuleType:
    """The script that makes the model, as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_arithmetic", CONFIGS / "make_tiny_arithmetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()
tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    """The committed model."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def final_answer(completion: str) -> str:
    """What stands after the last `answer:`."""
    return completion.rpartition("answer:")[2].strip()


def make_demonstrations(*, hasty_share: float, num: int) -> list[Any]:
    """The first `num` demonstrations of a fixed seed."""
    return list(itertools.islice(recipe.demonstrations(hasty_share=hasty_share, rng=random.Random(3)), num))


def test_folder_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_model_is_a_qwen3_of_under_a_million_parameters(model: Any) -> None:
    assert isinstance(model, Qwen3ForCausalLM)
    assert 700_000 <= model.num_parameters() <= 1_000_000
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= MAX_TOKENS + 128


def test_end_and_padding_are_distinct_and_agree_with_the_model(model: Any) -> None:
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@settings(max_examples=200)
@given(st.text(max_size=60).filter(lambda text: "<eos>" not in text and "<pad>" not in text))
def test_tokenizer_gives_any_text_back(text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@given(st.integers(min_value=-(10**9), max_value=10**9))
def test_each_digit_is_a_token(number: int) -> None:
    tokens = tokenizer.tokenize(f"7 + {number} = 12")
    assert max(sum(character.isdigit() for character in token) for token in tokens) == 1


def test_the_task_is_deterministic_and_heavy_tailed() -> None:
    task, again = recipe.make_task(seed=7), recipe.make_task(seed=7)
    entries = [task[index] for index in range(300)]
    assert [entry["question"] for entry in entries] == [again[index]["question"] for index in range(300)]
    terms = sorted(entry["metadata"]["num_terms"] for entry in entries)
    assert terms[150] <= 6 and terms[285] >= 20


def test_careful_demonstrations_are_right_and_fit() -> None:
    task = recipe.make_task(seed=0)
    for demonstration in make_demonstrations(hasty_share=0.0, num=200):
        assert demonstration.prompt == demonstration.entry["question"] + "\n"
        assert task.score_answer(final_answer(demonstration.completion), demonstration.entry) == 1.0
        ids = tokenizer(demonstration.completion, add_special_tokens=False)["input_ids"]
        assert len(ids) + 1 <= MAX_TOKENS - 48


def test_each_careful_step_is_a_true_equation() -> None:
    for demonstration in make_demonstrations(hasty_share=0.0, num=50):
        *steps, _ = demonstration.completion.split("\n")
        assert len(steps) == demonstration.entry["metadata"]["num_terms"] - 1
        for step in steps:
            left, operator, right, _, result = step.rpartition(": ")[2].split()
            assert int(left) + (1 if operator == "+" else -1) * int(right) == int(result)


def test_hasty_demonstrations_are_short_and_often_wrong() -> None:
    task = recipe.make_task(seed=0)
    guesses = make_demonstrations(hasty_share=1.0, num=600)
    right = [task.score_answer(final_answer(guess.completion), guess.entry) == 1.0 for guess in guesses]
    assert all(guess.completion.startswith("answer: ") and "\n" not in guess.completion for guess in guesses)
    assert 0.1 <= sum(right) / len(right) <= 0.4


def test_the_model_answers_a_question_with_an_extractable_number(model: Any) -> None:
    entry = recipe.make_task(seed=5)[0]
    inputs = tokenizer([entry["question"] + "\n"] * 8, add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_TOKENS)
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [final_answer(completion) for completion in completions]
    assert sum(answer.lstrip("-").isdigit() for answer in answers) >= 7
