"""Prompt sources: a cursor is a pure function, held-out prompts stay out, malformed files are located."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from pmdflow.data.prompts import make_prompts
from pmdflow.data.tokenizer import make_tokenize
from pmdflow.errors import PromptTooLong
from tests.support.data import CHAT_TEMPLATE, make_config, same, save_tokenizer, write_jsonl

TINY = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
"""One digit plus or minus one digit: 200 texts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("model"))


def test_tokens_are_the_text_and_a_newline_without_a_chat_template(model: str) -> None:
    tokens = make_tokenize(model)("1 + 2 =")
    assert tokens.dtype == np.int32
    assert tokens.shape == (len("1 + 2 =\n"),)


def test_a_prompt_above_the_limit_is_refused_with_the_remedy(model: str) -> None:
    tokenize = make_tokenize(model, max_tokens=8)
    assert len(tokenize("1 + 2 =")) == 8
    with pytest.raises(PromptTooLong, match=r"max_prompt_tokens is 8, but the prompt '1 \+ 22 =' has 9"):
        tokenize("1 + 22 =")


def test_chat_template_is_applied_with_the_generation_prompt(tmp_path: Path) -> None:
    from pmdflow.data.tokenizer import load_tokenizer

    folder = save_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE)
    assert load_tokenizer(folder).decode(make_tokenize(folder)("hi")) == "<user>hi<assistant>"


def test_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path.*nowhere"):
        make_prompts(make_config(str(tmp_path / "nowhere"), "reasoning_gym/gcd"))
    with pytest.raises(ValueError, match="tokenizer"):
        make_prompts(make_config(str(tmp_path), "reasoning_gym/gcd"))


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path) -> None:
    """`stdin` is a terminal to nobody here; a question would wait for it and fail with EOFError."""
    model = save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match="its tokenizer brings code of its own, which is never run"):
        make_tokenize(model)


def test_importing_data_is_light() -> None:
    heavy = ["torch", "ray", "transformers", "reasoning_gym"]
    code = f"import sys, pmdflow.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("reasoning_gym/chain_sum", {"min_terms": 2, "max_terms": 4}),
        ("reasoning_gym/acre", {"size": 50}),  # draws all its entries when it is made
        (
            "reasoning_gym/composite",
            {"datasets": [{"name": "gcd", "weight": 2}, {"name": "lcm", "config": {"max_numbers": 3}}]},
        ),
    ],
)
def test_a_cursor_means_the_same_prompt_in_every_instance(model: str, task: str, args: dict[str, Any]) -> None:
    first, second = (make_prompts(make_config(model, task, args=args)) for _ in range(2))
    cursors = [0, 1, 2, 700, 1023, 1024, 5000]
    forward = [first.prompt(cursor) for cursor in cursors]
    backward = [second.prompt(cursor) for cursor in reversed(cursors)][::-1]
    assert all(map(same, forward, backward))
    assert len({prompt.id for prompt in forward}) == len(cursors)
    assert len({prompt.text for prompt in forward}) > len(cursors) // 2
    assert all(map(same, first.held_out(8), second.held_out(8)))
    assert [prompt.id for prompt in first.held_out(3)] == [prompt.id for prompt in first.held_out(8)[:3]]


def test_ids_are_readable_and_seeds_differ(model: str) -> None:
    zero, one = (make_prompts(make_config(model, "reasoning_gym/chain_sum", seed=seed)) for seed in (0, 1))
    assert zero.prompt(123).id == "chain_sum-123"
    assert zero.held_out(1)[0].id.startswith("chain_sum-heldout-")
    texts = {zero.prompt(cursor).text for cursor in range(50)}
    assert len(texts & {one.prompt(cursor).text for cursor in range(50)}) < 10


def test_training_never_yields_a_held_out_text(model: str) -> None:
    """100 of 200 texts are held out, so that about every second candidate is skipped."""
    source = make_prompts(make_config(model, "reasoning_gym/chain_sum", held_out=100, args=TINY))
    held_out = {prompt.text for prompt in source.held_out(100)}
    assert len(held_out) == 100
    trained = [source.prompt(cursor) for cursor in range(400)]
    assert held_out.isdisjoint(prompt.text for prompt in trained)
    assert any(prompt.id != f"chain_sum-{cursor}" for cursor, prompt in enumerate(trained))
    assert len({prompt.id for prompt in trained}) == 400


def test_too_few_different_prompts_is_an_error_with_a_remedy(model: str) -> None:
    with pytest.raises(ValueError, match=r"eval\.prompts is 300.*lower eval\.prompts"):
        make_prompts(make_config(model, "reasoning_gym/chain_sum", held_out=300, args=TINY))


def test_metadata_survives_msgpack_and_names_the_source_data_set(model: str) -> None:
    specs = [{"name": "gcd"}, {"name": "lcm", "weight": 1.0, "config": {"max_numbers": 3}}]
    source = make_prompts(make_config(model, "reasoning_gym/composite", args={"datasets": specs}))
    prompts = [source.prompt(cursor) for cursor in range(20)]
    assert {prompt.metadata["dataset"] for prompt in prompts} == {"gcd", "lcm"}
    for prompt in prompts:
        assert msgpack.unpackb(msgpack.packb(dict(prompt.metadata))) == prompt.metadata
        assert prompt.metadata["question"] == prompt.text
        assert prompt.metadata["args"] == ({"max_numbers": 3} if prompt.metadata["dataset"] == "lcm" else {})


@pytest.mark.parametrize(
    ("task", "args", "message"),
    [
        ("reasoning_gym/chain_sums", {}, "did you mean chain_sum"),
        ("reasoning_gym/chain_sum", {"min_term": 2}, "min_term"),
        ("reasoning_gym/chain_sum", {"min_terms": 9, "max_terms": 2}, "max_terms must be"),
        ("reasoning_gym/chain_sum", {"seed": 3}, r"run\.seed"),
        ("reasoning_gym/composite", {}, "at least one"),
        ("reasoning_gym/composite", {"datasets": [{"nam": "gcd"}]}, r"datasets\[0\]"),
        ("reasoning_gym/composite", {"datasets": [{"name": "gdc"}]}, "did you mean gcd"),
        ("reasoning_gym/composite", {"datasets": [{"name": "gcd", "config": {"seed": 1}}]}, "seed"),
    ],
)
def test_bad_tasks_are_refused(model: str, task: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_prompts(make_config(model, task, args=args))


def test_jsonl_epochs_are_permutations_without_the_held_out_lines(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 18}", "answer": i} for i in range(20)]  # lines 1 and 2 repeat the held-out texts
    task = write_jsonl(tmp_path / "problems.jsonl", rows)
    source = make_prompts(make_config(model, task, held_out=2))
    assert [prompt.id for prompt in source.held_out(2)] == ["problems-19", "problems-20"]
    epochs = [[source.prompt(16 * epoch + i) for i in range(16)] for epoch in range(3)]
    expected = {f"problems-{number}" for number in range(3, 19)}
    assert all({prompt.id for prompt in epoch} == expected for epoch in epochs)
    assert [p.id for p in epochs[0]] != [p.id for p in epochs[1]]
    again = make_prompts(make_config(model, task, held_out=2))
    assert all(same(again.prompt(cursor), source.prompt(cursor)) for cursor in (47, 0, 31, 16))
    prompt = source.prompt(5)
    assert prompt.metadata == {"answer": int(prompt.id.removeprefix("problems-")) - 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a list, not an object"),
        ('{"answer": 1}', "prompt is None"),
        ('{"prompt": 7}', "prompt is 7"),
        ('{"prompt": " "}', "not a text"),
        ('{"prompt": "x", "n": 99999999999999999999999}', "cannot be stored"),
    ],
)
def test_a_malformed_line_is_located(model: str, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"problems\.jsonl:3: .*{message}"):
        make_prompts(make_config(model, str(path), held_out=0))


def test_jsonl_without_training_prompts_or_with_arguments_is_refused(model: str, tmp_path: Path) -> None:
    task = write_jsonl(tmp_path / "few.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(ValueError, match=r"none is left.*lower eval\.prompts"):
        make_prompts(make_config(model, task, held_out=2))
    with pytest.raises(ValueError, match=r"data\.args"):
        make_prompts(make_config(model, task, held_out=0, args={"max_terms": 3}))
    with pytest.raises(ValueError, match="cannot read"):
        make_prompts(make_config(model, str(tmp_path / "none.jsonl"), held_out=0))
    assert make_prompts(make_config(model, task, held_out=1)).prompt(5).text == "a"
