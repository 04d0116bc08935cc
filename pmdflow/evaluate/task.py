"""The attempts of an evaluation: n at every prompt, scored while others are still generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pmdflow.errors import WaitTimeout
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.rubric import Scored
from pmdflow.reward.runner import RewardRunner
from pmdflow.rollout.attempts import generate_attempts
from pmdflow.rollout.engine import RolloutEngine
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE_TIMEOUT_S = 600.0
"""An attempt that is not scored for this long after the last one is given up."""


@dataclass(slots=True)
class Sample:
    """One attempt at a prompt."""

    completion: str
    tokens: int
    """Generated ones."""
    observed: int
    """Tokens that the environment made."""
    stop: str
    problems: Sequence[str] = ()
    """What the environment failed at."""
    reward: float | None = None
    """None when scoring failed for good."""
    outcome: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    """Why it could not be scored."""


def generate_and_score(
    *,
    engine: RolloutEngine,
    taker: LeaseTaker,
    tokenizer: PreTrainedTokenizerBase,
    runner: RewardRunner,
    prompts: Sequence[Prompt],
    samples: int,
    max_tokens: int,
    max_scorings: int,
) -> list[list[Sample]]:
    """Generate and score `samples` attempts at every prompt; rewards are made beside generation.

    As in training, an answer whose scoring fails is scored again, `max_scorings` times in all.

    Raises:
        WaitTimeout: nothing was generated, or an attempt not scored, for too long.
    """
    done: list[list[Sample]] = [[] for _ in prompts]
    scores: list[tuple[Sample, ScoreItem, Future[Scored]]] = []
    for attempt in generate_attempts(engine, taker, prompts, samples=samples, max_tokens=max_tokens):
        held, observed, prompt = attempt.held, attempt.held.num_observed, prompts[attempt.prompt]
        item = ScoreItem.of_tokens(
            held.context,
            tokenizer=tokenizer,
            inputs=runner.inputs,
            prompt=prompt.text,
            stop=str(held.stop),
            metadata=prompt.metadata,
            rewards=attempt.rewards,
        )
        sample = Sample(
            completion=item.completion,
            tokens=len(held.context) - observed,
            observed=observed,
            stop=str(held.stop),
            problems=attempt.problems,
        )
        done[attempt.prompt].append(sample)
        scores.append((sample, item, runner.submit(item)))
    for again in range(max_scorings - 1, -1, -1):
        failed = [(sample, item) for sample, item, future in scores if not _score(sample, future)]
        scores = [(sample, item, runner.submit(item)) for sample, item in failed if again]
    return done


def _score(sample: Sample, future: Future[Scored]) -> bool:
    """Take an outcome; False if the scoring failed."""
    try:
        scored = future.result(timeout=SCORE_TIMEOUT_S)
    except TimeoutError as error:
        raise WaitTimeout(f"an attempt was not scored within {SCORE_TIMEOUT_S:g} s") from error
    sample.outcome, sample.message, sample.components = scored.outcome, scored.message, dict(scored.components)
    sample.reward = None if scored.outcome == "infra_failure" else scored.reward
    return sample.reward is not None
