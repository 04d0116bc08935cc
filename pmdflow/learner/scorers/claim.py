"""Scorers that run at the claim, in every rank of the learner, over the trajectories that it trains."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pmdflow.config.schema import Config
from pmdflow.learner.batch import ReadTokens
from pmdflow.learner.scorers.make import make_scorer
from pmdflow.learner.scorers.protocol import Bool, Column, Outcome, TokenBatch, TokenScorer, checked
from pmdflow.types import Claim, ClaimTokens, Float64, Int64, Mask

State = dict[str, bytes]
"""Of each scorer that keeps one, as torch.save writes it."""


class ClaimScorers:
    """Those of `learner.scorers` with `when: claim`; every rank has the same, and makes the same calls."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Make them.

        Raises:
            ValueError: one cannot be made, or two give one column.
        """
        with torch.random.fork_rng():  # the same on every rank, and nothing else draws otherwise for it
            torch.manual_seed(config.run.seed)
            self._made: dict[str, TokenScorer] = {
                name: make_scorer(config, name, device=device) for name in config.learner.scorers_when("claim")
            }
        givers: dict[str, str] = {}
        for name, scorer in self._made.items():
            for spec in scorer.columns:
                if (other := givers.setdefault(spec.name, name)) != name:
                    raise ValueError(
                        f"learner.scorers.{name} and learner.scorers.{other} both give the column {spec.name!r}: leave "
                        "one of them out, or give its column another name"
                    )

    def __bool__(self) -> bool:
        return bool(self._made)

    @property
    def columns(self) -> frozenset[str]:
        """Names of all that they give."""
        return frozenset(spec.name for scorer in self._made.values() for spec in scorer.columns)

    def run(self, batch: TokenBatch, outcome: Outcome) -> tuple[dict[str, Column], dict[str, float]]:
        """The columns of a claim's tokens, each [P, ...], and what those that learned tell of it on this rank.

        Raises:
            ValueError: a column is not what its scorer declares.
        """
        columns: dict[str, Column] = {}
        metrics: dict[str, float] = {}
        for name, scorer in self._made.items():
            learner: Any = scorer if hasattr(scorer, "learn") else None

            def learn(name: str = name, learner: Any = learner) -> None:
                told = learner.learn(batch, outcome)
                metrics.update({f"learner/scorer_{name}_{key}": float(value) for key, value in told.items()})

            first = learner is not None and getattr(learner, "learns_first", False)
            if first:
                learn()
            columns |= checked(scorer, name, scorer.score(batch), int(batch.generated.sum()))
            if learner is not None and not first:
                learn()
        return columns, metrics

    def state(self) -> State:
        """What the next claim begins with."""
        found = {}
        for name, scorer in self._made.items():
            if hasattr(scorer, "state"):
                file = io.BytesIO()
                torch.save(scorer.state(), file)
                found[name] = file.getvalue()
        return found

    def load(self, state: Mapping[str, bytes]) -> None:
        """Go on from a state."""
        for name, own in state.items():
            scorer: Any = self._made.get(name)
            if scorer is not None:
                scorer.load(torch.load(io.BytesIO(own), weights_only=False))


class Kept:
    """Reads tokens as it is told, and keeps what it has read last."""

    def __init__(self, read: ReadTokens) -> None:
        self._read = read
        self.rows: Int64 = np.zeros(0, np.int64)
        self._tokens: ClaimTokens | None = None

    def __call__(self, rows: Int64) -> ClaimTokens:
        """The tokens of the trajectories at `rows`."""
        self.rows, self._tokens = rows, self._read(rows)
        return self._tokens

    def batch(self, claim: Claim) -> TokenBatch:
        """The same, to be scored."""
        assert self._tokens is not None
        own = claim.batch(self.rows, self._tokens)
        return TokenBatch(
            tokens=own.tokens,
            cu_seqlens=own.cu_seqlens,
            generated=(own.mask & Mask.GENERATED) != 0,
            temperatures=own.temperatures,
        )

    def outcome(self, claim: Claim, *, rewards: Float64, correct: Bool, add: Callable[..., None]) -> Outcome:
        """What became of them, from arrays of the whole claim [N]."""
        rows = self.rows
        return Outcome(rewards=rewards[rows], correct=correct[rows], shares=claim.episode_shares()[rows], add=add)
