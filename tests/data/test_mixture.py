"""Mixtures: a draw is a function of seed and cursor, no source repeats or skips, nothing held out is trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.messages import Style, prompt_key
from pmdflow.data.mixture import BLOCK, Schedule, shares
from pmdflow.data.prompts import make_prompts
from pmdflow.data.tokenizer import make_tokenize
from tests.support.data import CHAT_TEMPLATE, make_config, same, save_tokenizer, write_jsonl, write_parquet
from tests.support.paths import ROOT

weights = st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=6)
SUMS = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
"""200 texts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE)


@given(weights=weights, seed=st.integers(0, 5), start=st.integers(0, 3 * BLOCK))
def test_each_source_counts_its_draws_without_a_gap_whatever_cursor_is_asked_first(
    weights: list[float], seed: int, start: int
) -> None:
    schedule, other = Schedule(weights, seed=seed), Schedule(weights, seed=seed)
    draws = [schedule.draw(cursor) for cursor in range(2 * BLOCK)]
    for source in range(len(weights)):
        ranks = [rank for drawn, rank in draws if drawn == source]
        assert ranks == list(range(len(ranks)))
        assert len(ranks) >= 2  # none starves
        exact = 2 * BLOCK * weights[source] / sum(weights)
        assert abs(len(ranks) - exact) <= 2 * len(weights)
    assert [other.draw(cursor) for cursor in reversed(range(start, start + 5))] == [
        schedule.draw(cursor) for cursor in reversed(range(start, start + 5))
    ]


@given(weights=weights, total=st.integers(6, 500), least=st.integers(0, 1))
def test_shares_sum_and_are_near(weights: list[float], total: int, least: int) -> None:
    counts = shares(weights, total, least=least)
    assert sum(counts) == total
    assert min(counts) >= least
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(abs(count - share) <= len(weights) for count, share in zip(counts, exact, strict=True))


def mixture(model: str, folder: Path, **options: Any) -> Config:
    """A text file, a chat file and reasoning-gym, which share prompts."""
    texts = [{"prompt": f"what is {i}?", "answer": i} for i in range(40)]
    chats = [{"messages": [{"role": "user", "content": f"what  is {i}?"}], "answer": i} for i in range(30, 60)]
    task = [
        {"task": write_jsonl(folder / "texts.jsonl", texts), "weight": 2},
        {"task": write_parquet(folder / "chats.parquet", chats), "system": "Own."},
        {"task": "reasoning_gym/chain_sum", "args": SUMS, "name": "sums"},
    ]
    return make_config(model, task, held_out=16, **options)


def test_sources_are_told_apart_weighted_and_repeat_only_when_they_are_through(model: str, tmp_path: Path) -> None:
    config = mixture(model, tmp_path, system="All.")
    prompts, again = make_prompts(config), make_prompts(config)
    drawn = [prompts.prompt(cursor) for cursor in range(BLOCK)]
    assert Counter(prompt.metadata["prompt_source"] for prompt in drawn) == {"texts": 512, "chats": 256, "sums": 256}
    assert all(same(again.prompt(cursor), drawn[cursor]) for cursor in (1023, 0, 512, 77))
    assert {prompt.id.partition("-")[0] for prompt in drawn} == {"texts", "chats", "sums"}
    for name in ("texts", "chats"):
        ids = [prompt.id for prompt in drawn if prompt.metadata["prompt_source"] == name]
        size = len(set(ids))
        epochs = [ids[start : start + size] for start in range(0, len(ids) - size, size)]
        assert all(set(epoch) == set(ids) for epoch in epochs)
    lengths = {prompt.metadata["prompt_source"]: len(prompt.tokens) - len(prompt.text) for prompt in drawn}
    assert lengths["texts"] == len("<system>All.<user><assistant>")  # the mixture's
    assert lengths["chats"] == len("<system>Own.<user><assistant>")


def test_what_one_source_holds_out_is_trained_on_from_none(model: str, tmp_path: Path) -> None:
    prompts = make_prompts(mixture(model, tmp_path))
    held_out = prompts.held_out(16)
    assert Counter(prompt.metadata["prompt_source"] for prompt in held_out) == {"texts": 8, "chats": 4, "sums": 4}
    assert Counter(prompt.metadata["prompt_source"] for prompt in prompts.held_out(8)) == {
        "texts": 4,
        "chats": 2,
        "sums": 2,
    }
    keys = {prompt_key(prompt.text) for prompt in held_out}
    drawn = [prompts.prompt(cursor) for cursor in range(BLOCK)]
    assert keys.isdisjoint(prompt_key(prompt.text) for prompt in drawn)
    # texts 32 to 39 are held out of the texts, and so of the chats, which hold out 56 to 59 of their own
    chats = {
        int(prompt.text.split()[-1].rstrip("?")) for prompt in drawn if prompt.metadata["prompt_source"] == "chats"
    }
    assert chats == {*range(30, 32), *range(40, 56)}


def test_evaluation_sets_have_their_own_sampling_and_are_never_trained_on(model: str, tmp_path: Path) -> None:
    held: list[dict[str, Any]] = [{"q": f"what is {i}?"} for i in range(3)]
    held[1]["sampling"] = {"temperature": 0.5}
    sums = {"task": "reasoning_gym/chain_sum", "args": SUMS, "prompts": 20, "samples": 4, "k": [1, 4]}
    few = {
        "task": write_jsonl(tmp_path / "few.jsonl", held),
        "columns": {"prompt": "q"},
        "prompts": 2,
        "sampling": {"temperature": 0.0, "max_tokens": 8},
        "reward": [{"function": "pmdflow.reward.reasoning_gym:score", "weight": 2.0}],
    }
    config = mixture(model, tmp_path, sets={"few": few, "sums": sums})
    prompts = make_prompts(config)
    assert [prompt.metadata for prompt in prompts.evaluation_set("few")] == [
        {"prompt_source": "eval/few", "sampling": {"temperature": 0.0, "max_tokens": 8}},
        {"prompt_source": "eval/few", "sampling": {"temperature": 0.5, "max_tokens": 8}},
    ]
    assert len(prompts.evaluation_set("sums")) == 20
    asked = {prompt_key(f"what is {i}?") for i in range(3)}
    asked |= {prompt_key(prompt.text) for prompt in prompts.evaluation_set("sums")}
    assert asked.isdisjoint(prompt_key(prompts.prompt(cursor).text) for cursor in range(BLOCK))
    assert {name: functions[0].weight for name, functions in config.own_rewards.items()} == {"eval/few": 2.0}
    assert {name for name, _ in prompts.summary} == {"texts", "chats", "sums", "eval/few", "eval/sums"}
    few["sampling"] = {"temprature": 1.0}
    with pytest.raises(ValueError, match=r"eval\.sets\.few: sampling\.temprature"):
        make_prompts(mixture(model, tmp_path, sets={"few": few}))


def test_evaluation_sets_are_worded_as_the_data_unless_they_say_otherwise(model: str, tmp_path: Path) -> None:
    task = write_jsonl(tmp_path / "few.jsonl", [{"prompt": "what?"}] * 2)
    sets = {"same": {"task": task}, "bare": {"task": task, "suffix": "", "system": "t"}}
    config = make_config(model, "reasoning_gym/gcd", sets=sets, system="s", suffix=" Think.")
    prompts = make_prompts(config)
    said = {name: bytes(prompts.evaluation_set(name)[0].tokens) for name in sets}
    tokenize = make_tokenize(model, style=Style(system="s", suffix=" Think."))
    assert said == {
        "same": bytes(tokenize("what?")),
        "bare": bytes(make_tokenize(model, style=Style(system="t"))("what?")),
    }


def test_a_long_generated_prompt_is_skipped_counted_and_named(model: str) -> None:
    said: list[str] = []
    args = {"min_terms": 2, "max_terms": 9, "min_digits": 1, "max_digits": 1}
    config = make_config(model, "reasoning_gym/chain_sum", held_out=0, args=args, max_prompt_tokens=102)
    prompts = make_prompts(config, on_skip=said.append)
    drawn = [prompts.prompt(cursor) for cursor in range(40)]
    assert all(len(prompt.tokens) <= 102 for prompt in drawn)
    assert len({prompt.id for prompt in drawn}) == 40
    assert said
    assert all("is skipped: data.max_prompt_tokens is 102" in message for message in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"a": 1}}, r"data\.args is set while data\.task is a mixture"),
        ({"columns": {"prompt": "q"}}, r"data\.columns is set while data\.task is a mixture"),
        ({"task": [{"task": "a/x.jsonl"}, {"task": "b/x.jsonl"}]}, "2 sources called x.*its own name"),
        ({"task": [{"task": "x.jsonl", "args": {"a": 1}}]}, r"data\.task\[0\]\.args .*only reasoning_gym"),
        ({"task": "x.parquet", "config": "main"}, r"data\.config is 'main': only Hub"),
        ({"task": "x.parquet", "split": "test"}, r"data\.split is 'test': only Hub"),
        ({"task": "reasoning_gym/gcd", "columns": {"answer": "a"}}, r"data\.columns .*no columns"),
        ({"sets": {"a": {"task": "reasoning_gym/gcd"}}}, r"eval\.sets\.a\.prompts is null.*never ends"),
        ({"sets": {"a": {"task": "x.jsonl", "samples": 2, "k": [4]}}}, r"pass@k needs k attempts"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    task = changes.pop("task", [{"task": "x.jsonl"}])
    with pytest.raises(ValueError, match=message):
        make_config("model", task, **changes)


@pytest.mark.parametrize("setting", ["agents.command=[agent]", "rollout.stop=[x]"])
def test_a_tokenizer_that_finds_no_stop_texts_is_refused_at_the_start(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmdflow.data.prompts.load_tokenizer", lambda path: object())
    config = load(ROOT / "configs" / "quickstart.yaml", [setting]).config
    with pytest.raises(ValueError, match=r"Rust backend \(tokenizer.json\), not object"):
        make_prompts(config)
