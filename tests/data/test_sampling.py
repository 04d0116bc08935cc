"""Stop strings, stop ids, least and most tokens, and what a prompt may override."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pmdflow.data import TablePrompts
from pmdflow.data.sampling import SamplingControl, check_overrides, control_for, sampling_temperature
from pmdflow.data.stop_text import StopText
from pmdflow.data.table import open_rows
from pmdflow.data.tokenizer import make_tokenize
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.engines.transformers.sampling import sample
from tests.support.paths import TINY

MODEL = str(TINY)
DEFAULTS = SamplingControl(temperature=1.0, max_tokens=64, stop=("answer",), stop_token_ids=(7,))
tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
texts = st.text(alphabet="ab: 1é\u20ac\n", max_size=40)


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def first_whole(tokens: list[int], stop: list[str], *, after: int = 0) -> int | None:
    """Index of the token with which the text first gets a stop string that was not there before token `after`."""
    before = 0
    for index in range(len(tokens)):
        text = tokenizer.decode(tokens[: index + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            continue
        ends = [i + len(s) for s in stop for i in range(len(text)) if text.startswith(s, i) and i + len(s) > before]
        before = len(text)
        if ends and index >= after:
            return index
    return None


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(model_path=MODEL, dtype="float32", num_slots=8, threads=1, seed=0, device="cpu")


@given(text=texts, stop=st.lists(st.text(alphabet="ab: é1", min_size=1, max_size=5), min_size=1, max_size=3))
def test_a_stop_string_ends_at_the_token_that_completes_it(text: str, stop: list[str]) -> None:
    tokens = ids_of(text)
    found = StopText(tokenizer, stop).find(tokens)
    assert found == first_whole(tokens, stop)
    if found is not None:
        assert any(s in tokenizer.decode(tokens[: found + 1]) for s in stop)


@given(text=texts, stop=st.text(alphabet="ab: é1", min_size=1, max_size=6), data=st.data())
def test_it_is_found_across_a_continuation(text: str, stop: str, data: st.DataObject) -> None:
    tokens = ids_of(text)
    cut = data.draw(st.integers(0, len(tokens)))
    whole = StopText(tokenizer, (stop,))
    found = whole.find(tokens[:cut])
    if found is None:
        expected = whole.find(tokens[cut:])
        assert StopText(tokenizer, (stop,), history=tokens[:cut]).find(tokens[cut:]) == expected


@given(text=texts, ignored=st.integers(0, 20))
def test_the_first_tokens_complete_nothing(text: str, ignored: int) -> None:
    tokens = ids_of(text)
    found = StopText(tokenizer, ("a", "1"), ignored=ignored).find(tokens)
    assert found == first_whole(tokens, ["a", "1"], after=ignored)


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_token_ids"):
        StopText(object(), ("a",))  # type: ignore[arg-type]


def test_overrides_of_a_prompt() -> None:
    control = control_for({"sampling": {"temperature": 0.5, "max_tokens": 9, "stop": ["\n"]}}, DEFAULTS)
    assert control == SamplingControl(temperature=0.5, max_tokens=9, stop=("\n",), stop_token_ids=(7,))
    assert control_for({"answer": "4"}, DEFAULTS) == DEFAULTS
    assert control_for({"sampling": {"max_tokens": 999}}, DEFAULTS).max_tokens == 64
    assert control_for({"sampling": {"stop": []}}, DEFAULTS).stop == ()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temprature": 1.0}, "sampling.temprature is 1.0.*takes temperature, max_tokens"),
        ({"temperature": -1}, r"sampling.temperature is -1"),
        ({"max_tokens": "9"}, "sampling.max_tokens is '9'"),
        ({"stop": [""]}, r"sampling.stop.0 is ''"),
        ([], r"sampling is \[\]"),
    ],
)
def test_impossible_overrides_are_located(sampling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_overrides({"sampling": sampling}, training=False)


@pytest.mark.parametrize("sampling", [{"min_tokens": 3}, {"top_p": 0.9}, {"temperature": 0}])
def test_training_refuses_what_changes_the_support(sampling: dict[str, Any], tmp_path: Path) -> None:
    row = json.dumps({"prompt": "1 + 1", "sampling": sampling})
    path = tmp_path / "task.jsonl"
    path.write_text(f'{{"prompt": "2 + 2"}}\n{row}\n')
    make = {"rows": open_rows([path]), "name": "task", "tokenize": make_tokenize(MODEL)}
    with pytest.raises(ValueError, match=rf"task.jsonl:2: sampling.{next(iter(sampling))} .*evaluation only"):
        TablePrompts(**make, num_held_out=0)
    assert TablePrompts(**make, num_held_out=1).held_out(1)[0].metadata["sampling"] == sampling


def test_excluded_tokens_are_not_drawn_and_log_probs_stay_whole() -> None:
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1)).expand(20_000, -1)
    rows = torch.arange(0, 20_000, 2)
    excluded = torch.stack([rows, torch.full_like(rows, 2)])
    greedy = torch.zeros(20_000, dtype=torch.bool)
    greedy[:2] = True
    logits = logits.clone()
    logits[:2, 2] = 9.0
    tokens, logprobs = sample(
        logits, temperatures=torch.ones(20_000), greedy=greedy, top_p=None, excluded=excluded,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert tokens[0] != 2 and tokens[1] == 2
    assert (tokens[::2] != 2).all() and (tokens[1::2] == 2).any()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def run(engine: TransformersEngine, **more: Any) -> list[int]:
    tokens: list[int] = []
    settings = {"limit": 999, "remaining": 40, "temperature": 1.0} | more
    engine.add(Request(id=1, tokens=np.asarray(ids_of("State the final answer\n"), np.int32), **settings))
    while outputs := engine.step():
        tokens += outputs[0].tokens
        assert all(math.isfinite(logprob) for logprob in outputs[0].logprobs)
    return tokens


def test_a_stop_id_ends_and_a_minimum_delays(engine: TransformersEngine) -> None:
    plain = run(engine, temperature=0.0)
    end = Counter(plain).most_common()[-1][0]
    stopped = run(engine, temperature=0.0, stop_token_ids=(end,))
    assert stopped == plain[: plain.index(end) + 1]
    lengths = [len(run(engine, min_tokens=30)) for _ in range(8)]
    assert min(lengths) > 30 and tokenizer.eos_token_id not in run(engine, min_tokens=40)
    assert len(plain) < 30


def test_a_minimum_holds_for_its_own_sequence_only(engine: TransformersEngine) -> None:
    prompt = np.asarray(ids_of("State the final answer\n"), np.int32)
    for id in range(8):
        minimum = 25 if id % 2 else 0
        engine.add(Request(id=id, tokens=prompt, limit=99, remaining=60, temperature=1.0, min_tokens=minimum))
    lengths: Counter[int] = Counter()
    while outputs := engine.step():
        lengths.update(output.id for output in outputs)
    assert all(lengths[id] > 25 for id in (1, 3, 5, 7))
    assert min(lengths[id] for id in (0, 2, 4, 6)) <= 25


def test_a_stop_id_outside_the_vocabulary_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids \[99999\]"):
        run(engine, stop_token_ids=(99999,))


def test_temperature_schedule() -> None:
    temperatures = [sampling_temperature(v, initial=1.2, final=0.8, iterations=4) for v in (0, 1, 4, 9)]
    np.testing.assert_allclose(temperatures, [1.2, 1.1, 0.8, 0.8])
    assert sampling_temperature(7, initial=1.2, final=None, iterations=None) == 1.2
