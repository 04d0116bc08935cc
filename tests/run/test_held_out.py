"""What a round of held-out evaluation says when answers are missing."""

from __future__ import annotations

from pmdflow.run.held_out import summarize_round
from pmdflow.store.answers import EvalResult
from pmdflow.types import Stop


def result(*, reward: float | None, length: int, versions: tuple[int | None, int | None]) -> EvalResult:
    first, last = versions
    return EvalResult(
        request_id="eval-0",
        prompt_id="p",
        reward=reward,
        length=length,
        stop=Stop.STOP,
        first_version=first,
        last_version=last,
    )


def test_an_empty_trajectory_has_no_version_and_a_failed_one_no_reward() -> None:
    empty = result(reward=0.0, length=0, versions=(None, None))
    failed = result(reward=None, length=4, versions=(1, 2))
    whole = result(reward=1.0, length=8, versions=(3, 3))
    assert summarize_round([empty, failed, whole]) == {
        "eval/reward_mean": 0.5,
        "eval/prompts": 3,
        "eval/length_mean": 4.0,
        "eval/first_version": 1,
        "eval/last_version": 3,
    }


def test_a_round_in_which_nothing_was_said_or_scored_has_none_instead_of_an_error() -> None:
    values = summarize_round([result(reward=None, length=0, versions=(None, None))])
    assert values["eval/reward_mean"] is values["eval/first_version"] is values["eval/last_version"] is None
