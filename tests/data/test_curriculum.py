"""Draws by success: their chances, their cost in blocks, and that seed, cursor and recorded rates decide them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.schema import Config
from pmdflow.data.curriculum import BLOCK, ROW_BITS, SCALE, Pool
from pmdflow.data.mixture import MixedPrompts
from pmdflow.data.prompts import make_prompts
from pmdflow.run.scheduler import prompt_probabilities
from pmdflow.store.answers import Successes
from tests.support.data import make_config, save_tokenizer, write_jsonl

rates = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("model"))


def told(prompts: MixedPrompts, number: int, found: dict[tuple[int, int], float]) -> MixedPrompts:
    assert prompts.curriculum is not None
    keys = np.array([source << ROW_BITS | row for source, row in found], np.uint64)
    prompts.curriculum.learn(Successes(number=number, keys=keys, rates=np.array(list(found.values()))))
    return prompts


def files(model: str, folder: Path, *, rows: tuple[int, ...] = (8, 12), **curriculum: Any) -> Config:
    task = [
        {
            "task": write_jsonl(folder / f"part{part}.jsonl", [{"prompt": f"p{part}x{i}"} for i in range(count)]),
            "weight": 1,
        }
        for part, count in enumerate(rows)
    ]
    return make_config(model, task, held_out=4, curriculum=curriculum)


class TestProbabilities:
    def test_they_are_in_proportion_to_failure(self) -> None:
        np.testing.assert_allclose(prompt_probabilities([0.0, 0.5, 0.75, 1.0]), [4 / 7, 2 / 7, 1 / 7, 0], atol=1e-6)

    def test_what_is_not_eligible_is_never_drawn(self) -> None:
        np.testing.assert_allclose(
            prompt_probabilities([0.0, 0.0, 0.5], eligible=[False, True, True]), [0, 2 / 3, 1 / 3]
        )

    def test_solved_ones_are_as_likely(self) -> None:
        assert prompt_probabilities([1.0, 1.0, 1.0], eligible=[True, False, True]).tolist() == [0.5, 0.0, 0.5]
        assert prompt_probabilities([0.3, 1.0], eligible=[False, False]).tolist() == [1.0, 0.0]

    @given(rates=rates, data=st.data())
    def test_they_are_probabilities(self, rates: list[float], data: st.DataObject) -> None:
        eligible = data.draw(st.lists(st.booleans(), min_size=len(rates), max_size=len(rates)))
        chances = prompt_probabilities(rates, eligible=eligible)
        assert chances.sum() == pytest.approx(1.0)
        assert (chances >= 0).all()
        if any(eligible):
            assert not chances[~np.array(eligible)].any()


class TestPool:
    @given(
        size=st.sampled_from([1, 7, BLOCK, BLOCK + 1, 3 * BLOCK]),
        updates=st.lists(st.lists(st.tuples(st.integers(0, 3 * BLOCK - 1), st.floats(0, 1)), max_size=8), max_size=5),
        priority=st.booleans(),
        hard_below=st.one_of(st.none(), st.floats(0.01, 1.0)),
        numbers=st.lists(st.integers(0, 2**64 - 1), max_size=8),
    )
    def test_a_draw_is_that_of_the_sum_over_all_weights(
        self, size: int, updates: Any, priority: bool, hard_below: float | None, numbers: list[int]
    ) -> None:
        pool, expected = Pool(size), np.zeros(size)
        pool.choose(priority=priority, hard_below=hard_below)
        for update in updates:
            moved = {row: rate for row, rate in update if row < size}
            pool.update(np.array(list(moved), np.int64), np.array(list(moved.values()), np.float64))
            for row, rate in moved.items():
                expected[row] = rate
        weights = np.rint((1 - expected) * SCALE).astype(np.int64) if priority else np.full(size, SCALE)
        weights[np.zeros(size, bool) if hard_below is None else expected >= hard_below] = 0
        ends = weights.cumsum()
        for number in [0, 2**64 - 1, *numbers]:
            row = pool.draw(number)
            if ends[-1]:
                assert row == int(ends.searchsorted(number * int(ends[-1]) >> 64, "right"))
                assert weights[row] > 0
            else:
                assert row == number * size >> 64
        assert pool.share == pytest.approx(weights.sum() / (SCALE * size))


class TestDraws:
    def test_solved_prompts_are_left_alone_and_the_share_of_a_source_falls_with_them(
        self, model: str, tmp_path: Path
    ) -> None:
        config = files(model, tmp_path)
        solved = {(0, row): 1.0 for row in range(3)} | {(1, row): 1.0 for row in range(10)}
        prompts = told(make_prompts(config), 7, solved)
        drawn = [prompts.prompt(cursor) for cursor in range(3000)]
        keys = [(prompt.drawn.key >> ROW_BITS, prompt.drawn.key & 0xFF) for prompt in drawn if prompt.drawn]
        assert len(keys) == len(drawn)
        assert not set(keys) & set(solved)
        assert {prompt.drawn.number for prompt in drawn if prompt.drawn} == {7}
        # Two of the first source's train on 6 rows: 3 of them are left, all of the second's 10 are solved.
        assert {source for source, _ in keys} == {0}
        counts = Counter(row for _, row in keys)
        assert max(counts.values()) < 1.3 * min(counts.values())

    def test_the_key_is_that_of_the_prompt(self, model: str, tmp_path: Path) -> None:
        prompts = make_prompts(files(model, tmp_path))
        texts: dict[int, set[str]] = {}
        for cursor in range(500):
            prompt = prompts.prompt(cursor)
            assert prompt.drawn is not None
            texts.setdefault(prompt.drawn.key, set()).add(prompt.text)
        assert all(len(found) == 1 for found in texts.values())
        assert len(texts) == 16  # all that is not held out

    def test_recorded_rates_make_every_draw_again(self, model: str, tmp_path: Path) -> None:
        config = files(model, tmp_path)
        history = [{(0, i % 6): i / 10, (1, 3 * i % 10): 1 - i / 10} for i in range(8)]
        prompts, admitted = make_prompts(config), []
        for number, moved in enumerate(history, 1):
            told(prompts, number, moved)
            admitted += [(cursor, prompts.prompt(cursor)) for cursor in range(4 * number, 4 * number + 4)]
        for cursor, prompt in admitted:
            assert prompt.drawn is not None
            rates: dict[tuple[int, int], float] = {}
            for moved in history[: prompt.drawn.number]:
                rates |= moved
            again = told(make_prompts(config), prompt.drawn.number, rates).prompt(cursor)
            assert (again.id, again.drawn) == (prompt.id, prompt.drawn)

    def test_before_the_switch_each_comes_once_an_epoch_and_after_it_only_hard_ones(
        self, model: str, tmp_path: Path
    ) -> None:
        config = files(model, tmp_path, rows=(12,), priority="uniform", switch_at=5, hard_below=0.5)
        prompts = told(make_prompts(config), 3, {(0, row): 0.6 for row in range(5)})
        epoch = [prompts.prompt(cursor).text for cursor in range(8)]
        assert len(set(epoch)) == 8
        plain = make_prompts(config.model_copy(update={"data": config.data.model_copy(update={"curriculum": None})}))
        assert epoch == [plain.prompt(cursor).text for cursor in range(8)]
        told(prompts, 4, {})
        rows = {prompt.drawn.key for prompt in map(prompts.prompt, range(300)) if prompt.drawn}
        assert rows == {5, 6, 7}

    def test_hard_sources_alone_are_left_after_the_switch(self, model: str, tmp_path: Path) -> None:
        config = files(model, tmp_path, switch_at=2, hard_sources=["part1"])
        prompts = make_prompts(config)
        ids = {prompts.prompt(cursor).id.partition("-")[0] for cursor in range(100)}
        assert ids == {"part0", "part1"}
        told(prompts, 1, {})
        assert {prompts.prompt(cursor).id.partition("-")[0] for cursor in range(100)} == {"part1"}

    def test_endless_sources_share_a_rate_and_repeat_no_prompt(self, model: str) -> None:
        task = [
            {"task": "reasoning_gym/basic_arithmetic", "name": "short", "args": {"max_terms": 2}},
            {"task": "reasoning_gym/basic_arithmetic", "name": "long", "args": {"min_terms": 5, "max_terms": 6}},
        ]
        prompts = told(make_prompts(make_config(model, task, curriculum={})), 1, {(0, 0): 0.75})
        drawn = [prompts.prompt(cursor) for cursor in range(400)]
        assert len({prompt.id for prompt in drawn}) == len(drawn)
        share = sum(prompt.id.startswith("short-") for prompt in drawn) / len(drawn)
        assert 0.12 < share < 0.28  # a fifth


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({"hard_below": 0.5}, "switch_at is null"),
        ({"switch_at": 3}, "nothing says what is hard"),
        ({"priority": "uniform"}, "it changes nothing"),
        ({"switch_at": 3, "hard_sources": ["other"]}, "names \\['other'\\]"),
    ],
)
def test_what_contradicts_itself_is_refused(
    model: str, tmp_path: Path, curriculum: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        files(model, tmp_path, **curriculum)


def test_one_endless_source_has_nothing_to_choose_from(model: str) -> None:
    with pytest.raises(ValueError, match="share one rate"):
        make_config(model, "reasoning_gym/basic_arithmetic", curriculum={})
