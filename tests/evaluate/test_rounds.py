"""What a round of held-out evaluation says when answers are missing."""

from __future__ import annotations

import numpy as np

from pmdflow.config.sources import EvalSetConfig
from pmdflow.evaluate.rounds import EvaluationSet, failures, summarize_round
from pmdflow.store.answers import EvalResult
from pmdflow.types import Prompt, Stop

PROMPT = Prompt(id="p", text="", tokens=np.array([1], np.int32))
HELD_OUT = EvaluationSet(name="", prompts=[PROMPT, PROMPT, PROMPT], settings=None)


def result(
    *, reward: float | None, length: int, versions: tuple[int | None, int | None], request: str = "eval-0"
) -> EvalResult:
    first, last = versions
    return EvalResult(
        request_id=request,
        prompt_id="p",
        reward=reward,
        length=length,
        stop=Stop.STOP,
        first_version=first,
        last_version=last,
    )


def test_an_empty_trajectory_has_no_version_and_a_failed_one_no_reward() -> None:
    empty = result(reward=0.0, length=0, versions=(None, None))
    failed = result(reward=None, length=4, versions=(3, 3))
    whole = result(reward=1.0, length=8, versions=(3, 3))
    assert summarize_round([empty, failed, whole], HELD_OUT, version=3) == {
        "eval/reward_mean": 0.5,
        "eval/prompts": 3,
        "eval/failed": 1,
        "eval/length_mean": 4.0,
        "eval/version": 3,
    }


def test_a_round_in_which_nothing_was_said_or_scored_has_none_instead_of_an_error() -> None:
    values = summarize_round([result(reward=None, length=0, versions=(None, None))], HELD_OUT, version=4)
    assert values["eval/reward_mean"] is None
    assert (values["eval/failed"], values["eval/version"]) == (1, 4)


def test_attempts_that_were_not_scored_are_said_and_neither_a_zero_nor_forgotten() -> None:
    answers = [result(reward=reward, length=2, versions=(5, 5)) for reward in (1.0, None, None, None)]
    values = summarize_round(answers, HELD_OUT, version=5)
    assert (values["eval/reward_mean"], values["eval/failed"]) == (1.0, 3)
    said = failures(answers, HELD_OUT, 5)
    assert said.startswith("held-out evaluation of iteration 5: 3 of 4 attempts were not scored") and "others" in said
    assert failures(answers[1:], HELD_OUT, 5).endswith("it has no reward")
    assert failures(answers[:1], HELD_OUT, 5) == ""


def test_a_named_set_has_the_mean_over_prompts_and_pass_at_k_under_its_own_keys() -> None:
    settings = EvalSetConfig(task="hard.jsonl", samples=2, k=[1, 2], pass_reward=0.5)
    hard = EvaluationSet(name="hard", prompts=[PROMPT, PROMPT], settings=settings)
    prefix = hard.request_prefix(5)
    answers = [(0, 1.0), (0, 0.0), (1, 0.0), (1, None)]
    results = [
        result(reward=reward, length=2, versions=(5, 5), request=f"{prefix}{number}") for number, reward in answers
    ]
    values = summarize_round(results, hard, version=5)
    assert values["eval/set"] == "hard"
    assert values["eval/hard/reward_mean"] == 0.25
    assert values["eval/hard/pass_at_1"] == 0.25
    assert values["eval/hard/pass_at_2"] == 1.0
    assert values["eval/hard/prompts"] == 2
    assert values["eval/hard/failed"] == 1
    assert "evaluation set hard of iteration 5: 1 of 4" in failures(results, hard, 5)


def test_no_round_finds_the_answers_of_another() -> None:
    names = ["", "a", "a-1", "a.b", "0"]
    sets = [EvaluationSet(name=name, prompts=[PROMPT], settings=None) for name in names]
    prefixes = [given.request_prefix(iteration) for given in sets for iteration in (0, 1, 10, 1000000)]
    for prefix in prefixes:
        assert [other for other in prefixes if f"{other}7".startswith(prefix)] == [prefix]
