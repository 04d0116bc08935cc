"""What a token scorer is: a model, or a function, that says something of every generated token. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pmdflow.types import Float32, Float64, Int32, Int64

Bool = npt.NDArray[np.bool_]
Column = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """A column of tokens that a scorer or an engine gives.

    Example:
        >>> ColumnSpec(name="value", dtype="float32").filled(2).tolist()
        [0.0, 0.0]
    """

    name: str
    dtype: str
    """NumPy's name of it."""
    shape: tuple[int, ...] = ()
    """Of one token's value."""
    fill: float = 0.0
    """What a token that it says nothing of has: an observed one."""

    def filled(self, tokens: int) -> Column:
        """Of so many tokens [`tokens`, ...]."""
        return np.full((tokens, *self.shape), self.fill, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """B sequences, packed, each its prompt and what came after it; P of the T tokens are to be scored.

    Example:
        >>> batch = TokenBatch.of([[1, 2]], [[3, 4]])
        >>> batch.tokens.tolist(), batch.generated.tolist()
        ([1, 2, 3, 4], [False, False, True, True])
    """

    tokens: Int32
    """[T]"""
    cu_seqlens: Int64
    """Where each sequence begins, and the end [B + 1]."""
    generated: Bool
    """Which tokens are to be scored [T]: those that the policy generated there."""
    temperatures: Float32
    """At which each token was drawn [T]; 1 where it was not."""
    metadata: Sequence[Mapping[str, Any]] = ()
    """Of each prompt [B]; empty at the claim."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], **others: Any) -> TokenBatch:
        """Made-up sequences, drawn at temperature 1: for tests of a scorer."""
        pairs = list(zip(prompts, answers, strict=True))
        tokens = np.array([token for pair in pairs for part in pair for token in part], np.int32)
        generated = np.concatenate([np.zeros(0, bool), *(np.repeat([False, True], list(map(len, p))) for p in pairs)])
        given: dict[str, Any] = {"temperatures": np.ones(len(tokens), np.float32)}
        ends = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in pairs)]).astype(np.int64)
        return cls(tokens=tokens, cu_seqlens=ends, generated=generated, **{**given, **others})

    @property
    def counts(self) -> Int64:
        """Scored tokens of each sequence [B]."""
        running = np.concatenate([[0], np.cumsum(self.generated)])
        return np.asarray(np.diff(running[self.cu_seqlens]), np.int64)

    @property
    def sequences(self) -> Int64:
        """The sequence of each scored token [P], by its index."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def part(self, rows: slice) -> TokenBatch:
        """Some of the sequences that lie behind one another."""
        ends = self.cu_seqlens[rows.start : rows.stop + 1]
        own = slice(ends[0], ends[-1])
        return replace(
            self,
            tokens=self.tokens[own],
            cu_seqlens=ends - ends[0],
            generated=self.generated[own],
            temperatures=self.temperatures[own],
            metadata=self.metadata[rows],
        )

    def with_contexts(self, contexts: Sequence[npt.ArrayLike]) -> TokenBatch:
        """The same, each sequence behind a privileged context that the policy did not see.

        Args:
            contexts: Token ids of each sequence's [B].
        """
        given = [np.asarray(context, np.int32).reshape(-1) for context in contexts]
        if len(given) != len(self.counts):
            raise ValueError(f"{len(given)} contexts for {len(self.counts)} sequences; give one for each")
        lengths = np.array([len(context) for context in given], np.int64)
        starts = np.repeat(self.cu_seqlens[:-1], lengths)
        ids = np.concatenate([np.zeros(0, np.int32), *given])
        return replace(
            self,
            tokens=np.insert(self.tokens, starts, ids),
            cu_seqlens=self.cu_seqlens + np.concatenate([[0], np.cumsum(lengths)]),
            generated=np.insert(self.generated, starts, values=False),
            temperatures=np.insert(self.temperatures, starts, np.float32(1)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the sequences of a batch, for a scorer that learns."""

    rewards: Float64
    """Of the task [B]."""
    correct: Bool
    """[B]"""
    shares: Float64
    """What each sequence counts for [B]: 1 / branches of its episode."""
    add: Callable[[Sequence[Any]], None]
    """Adds tensors up over the learner's ranks, in place: gradients, and the count that a mean divides by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a scorer is made with."""

    model: str | None
    """`model` of its settings in the configuration."""
    settings: Mapping[str, Any]
    """Its `settings`."""
    student: str
    """Folder of the policy's initial weights."""
    device: Any
    """torch's."""
    dtype: str
    """Of computation: float32 or bfloat16."""
    tokens_per_batch: int
    """Most tokens of one forward pass."""


class TokenScorer(Protocol):
    """Says something of tokens. One that trains has `learn`, `state` and `load`, too, and runs at the claim.

    learns_first: bool                                      # whether it learns from a claim before it scores it
    def learn(self, batch, outcome) -> Mapping[str, float]  # metrics, recorded as learner/scorer_NAME_KEY
    def state(self) -> Any                                  # for the checkpoint; torch.save writes it
    def load(self, state) -> None
    """

    columns: tuple[ColumnSpec, ...]
    """What `score` gives."""

    def score(self, batch: TokenBatch) -> Mapping[str, Column]:
        """Each column by name [P, ...]."""


def checked(scorer: TokenScorer, name: str, found: Mapping[str, Column], tokens: int) -> dict[str, Column]:
    """The columns of a scorer as it declares them.

    Raises:
        ValueError: one is missing or of another shape; names the scorer and the column.
    """
    kept = {}
    for spec in scorer.columns:
        if spec.name not in found:
            given = ", ".join(found) or "none"
            raise ValueError(f"the scorer {name} declares the column {spec.name!r} and gives {given}: return it")
        values = np.asarray(found[spec.name])
        if values.shape != (tokens, *spec.shape):
            raise ValueError(
                f"the scorer {name} gives column {spec.name!r} of shape {values.shape}; it declares "
                f"{(tokens, *spec.shape)}, a value for each of {tokens} generated tokens"
            )
        kept[spec.name] = values.astype(spec.dtype)
    return kept
