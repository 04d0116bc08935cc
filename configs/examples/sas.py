"""SAS: of a right answer the steps that the policy was least sure of get no credit, of a wrong one the surest.

Token masks. The ratio is the paper's: the released code computes count + 1 x ratio by precedence of operators, and so
masks all steps of right answers and none of wrong ones. The pull of policy mirror descent still reaches masked tokens.

Source: arXiv:2604.24003.
"""

from __future__ import annotations

import math

import numpy as np

from pmdflow.learner.advantage import grpo
from pmdflow.learner.algorithms import Algorithm, Credit
from pmdflow.learner.losses import pmd_tokens


def steps_of(tokens, separators, end):
    """The step of each token of an answer: one ends with a separator; -1 from `end` on, where thinking is over."""
    ends = np.isin(tokens, separators)
    steps = np.cumsum(ends) - ends
    over = np.flatnonzero(tokens == end)
    return np.where(np.arange(len(tokens)) >= (over[0] if len(over) else len(tokens)), -1, steps)


def masked(steps, logprobs, correct, share=0.3):
    """Which tokens are in a step that gets no credit."""
    numbers = np.unique(steps[steps >= 0])
    sure = np.array([logprobs[steps == number].mean() for number in numbers])
    order = numbers[np.argsort(sure, kind="stable")]
    count = len(numbers)
    chosen = order[: math.ceil(share * count)] if correct else order[math.ceil((1 - share) * count) :]
    return np.isin(steps, chosen)


def credit(view, learner, state):
    """GRPO's credit at the tokens of the steps that keep it."""
    separators = [int(token) for token in str(learner.settings["separators"]).split(",")]
    values, dropped = grpo(view.rewards, view.groups)[view.episodes], 0
    tokens, reference = view.tokens, view.reference
    for index in range(view.num_episodes):
        own = slice(view.cu_seqlens[index], view.cu_seqlens[index + 1])
        steps = steps_of(tokens[own], separators, int(learner.settings["end"]))
        without = masked(steps, reference[own], view.correct[index], float(learner.settings["share"]))
        values[own][without] = 0.0
        dropped += without.mean() if len(without) else 0.0
    return Credit(values=values, per="token", metrics={"masked_share": dropped / max(view.num_episodes, 1)})


SAS = Algorithm(
    credit=credit,
    loss=pmd_tokens,
    needs=frozenset({"tokens", "reference"}),
    settings={"separators": "10", "end": -1.0, "share": 0.3},  # ids of tokens that hold a blank line, and of </think>
)
