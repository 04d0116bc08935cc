"""Scorers made from the configuration, and what one says of a stored trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pmdflow.config.imports import load_named
from pmdflow.config.schema import Config
from pmdflow.learner.scorers.protocol import Column, Setup, TokenBatch, TokenScorer, checked
from pmdflow.store.annotations import Unannotated


def make_scorer(config: Config, name: str, *, device: Any) -> TokenScorer:
    """The scorer of that name in `learner.scorers`.

    Raises:
        ValueError: it cannot be made, or has no columns.
    """
    given = config.learner.scorers[name]
    try:
        scorer: TokenScorer = load_named(given.use)(
            Setup(
                model=given.model,
                settings=given.settings,
                student=config.model.path,
                device=device,
                dtype=config.model.compute,
                tokens_per_batch=config.learner.tokens_per_microbatch,
            )
        )
        columns = [spec.name for spec in scorer.columns]
    except Exception as error:  # code of the user
        raise ValueError(f"learner.scorers.{name}: {given.use} cannot be made: {error}") from error
    if not columns:
        raise ValueError(f"learner.scorers.{name}: {given.use} has no columns; name what its `score` gives")
    if given.when == "complete" and hasattr(scorer, "learn"):
        raise ValueError(
            f"learner.scorers.{name}: {given.use} learns, and what it said of a trajectory would be that of weights "
            "long gone; set `when: claim`"
        )
    return scorer


def score_trajectories(scorer: TokenScorer, name: str, items: Sequence[Unannotated]) -> list[dict[str, Column]]:
    """What a scorer says of every token after the prompt of episodes, each in the branch that generated it.

    Raises:
        ValueError: a column is not what the scorer declares.
    """
    owners = [(item, history, own) for item in items for history, own in item.branches()]
    tokens: list[Column] = []
    generated: list[Column] = []
    temperatures: list[Column] = []
    ends = [0]
    for item, history, own in owners:
        chosen = np.zeros(len(item.tokens), bool)
        chosen[own] = True
        tokens += item.prompt, item.tokens[history]
        generated += np.zeros(len(item.prompt), bool), chosen[history]
        temperatures += np.ones(len(item.prompt), np.float32), item.temperatures[history]
        ends.append(ends[-1] + len(item.prompt) + len(history))
    batch = TokenBatch(
        tokens=np.concatenate(tokens),
        cu_seqlens=np.array(ends, np.int64),
        generated=np.concatenate(generated),
        temperatures=np.concatenate(temperatures),
        metadata=[item.metadata for item, *_ in owners],
    )
    total = int(batch.generated.sum())
    given = scorer.score(batch) if total else {spec.name: spec.filled(0) for spec in scorer.columns}
    found, start, columns = checked(scorer, name, given, total), 0, []
    for item in items:
        places = np.concatenate([own for _, own in item.branches()])
        columns.append({spec.name: spec.filled(len(item.tokens)) for spec in scorer.columns})
        for column, values in found.items():
            columns[-1][column][places] = values[start : start + len(places)]
        start += len(places)
    return columns
