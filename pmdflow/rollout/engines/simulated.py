"""Random tokens instead of a model: for load tests of everything around the engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pmdflow.rollout.checks import check_extends, check_joins
from pmdflow.rollout.engine import OnNewWeights, Output, Request

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _Sequence:
    length: int
    """Prompt and prefix."""
    limit: int
    remaining: int
    tokens: list[int]
    """What it will generate; the last one is the end of sequence."""
    logprobs: list[float]
    done: int = 0


class SimulatedEngine:
    """A `RolloutEngine` whose lengths are lognormal, as those of chains of thought, and whose tokens are random.

    It ignores temperature, `top_p`, `min_tokens` and stop ids.

    What a sequence generates depends on the seed, its id and the number of tokens that it joins with, not on the
    others in the batch. A sequence that joins again with a prefix draws a new length.

    Example:
        >>> engine = SimulatedEngine(num_slots=8, seed=0)
        >>> engine.add(Request(id=0, tokens=np.array([5, 6], np.int32), limit=9, remaining=9, temperature=1.0))
        >>> [output.id for output in engine.step()]
        [0]
    """

    EOS: ClassVar[int] = 0

    def __init__(
        self,
        *,
        num_slots: int,
        seed: int = 0,
        vocab_size: int = 256,
        median_tokens: float = 128.0,
        sigma: float = 0.8,
        step_latency_s: float = 0.0,
    ) -> None:
        """Make an empty engine.

        Args:
            num_slots: Sequences held at a time.
            seed: Of lengths, tokens and log-probs.
            vocab_size: Tokens are in [0, vocab_size); 0 is the end of sequence.
            median_tokens: Median of the lengths.
            sigma: Standard deviation of the logarithm of the lengths.
            step_latency_s: Time that a step takes.
        """
        self._seed = seed
        self._vocab_size = vocab_size
        self._log_median = float(np.log(median_tokens))
        self._sigma = sigma
        self._step_latency_s = step_latency_s
        self._sequences: dict[int, _Sequence] = {}
        self.version = 0
        self.num_slots = num_slots
        self.prefill_tokens = self.drafted_tokens = self.accepted_tokens = 0
        self.overrun_tokens = self.preemptions = 0

    def add(self, request: Request) -> None:
        """Join at the next step.

        Raises:
            ValueError: No free slot, or the id is held already.
        """
        check_joins(request, self._sequences, self.num_slots)
        rng = np.random.default_rng([self._seed, request.id, len(request.tokens)])
        drawn = max(1, round(rng.lognormal(self._log_median, self._sigma)))
        length = min(drawn, request.remaining)
        tokens = rng.integers(self.EOS + 1, self._vocab_size, length).tolist()
        if drawn == length:
            tokens[-1] = self.EOS
        self._sequences[request.id] = _Sequence(
            length=len(request.tokens),
            limit=request.limit,
            remaining=request.remaining,
            tokens=tokens,
            logprobs=(-rng.exponential(size=length)).tolist(),
        )
        self.prefill_tokens += len(request.tokens)

    def extend(self, id: int, limit: int) -> None:
        """Let sequence `id` generate `limit` tokens from where it stands; 0 pauses it.

        Raises:
            ValueError: The sequence is not held, or the limit is negative.
        """
        check_extends(id, limit, self._sequences)
        self._sequences[id].limit = limit

    def abort(self, id: int) -> None:
        """Forget sequence `id`; unknown ids are ignored."""
        self._sequences.pop(id, None)

    def active(self) -> int:
        """Sequences that have a limit left."""
        return sum(sequence.limit > 0 for sequence in self._sequences.values())

    def step(self) -> list[Output]:
        """Give one token for each sequence that has a limit left; [] if none has."""
        outputs = [self._next(id, sequence) for id, sequence in list(self._sequences.items()) if sequence.limit > 0]
        if outputs and self._step_latency_s:
            time.sleep(self._step_latency_s)
        return outputs

    def stage(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Nothing to prepare."""
        return weights

    def pause(self) -> list[Output]:
        """It generates only in `step`."""
        return []

    def resume(self) -> None:
        """Nothing was stopped."""

    def score(self, tokens: Sequence[int]) -> list[float]:
        """There is no model to ask."""
        return []

    def sleep(self) -> None:
        """There is no memory to give back; held sequences are prefilled again."""
        self.prefill_tokens += sum(sequence.length + sequence.done for sequence in self._sequences.values())

    def wake(self) -> None:
        """Nothing was given back."""

    def close(self) -> None:
        """There are no processes."""

    def load_weights(self, version: int, staged: Mapping[str, torch.Tensor], *, on_new_weights: OnNewWeights) -> None:
        """Take the version and ignore the weights; `reprefill` counts every held token."""
        self.version = version
        if on_new_weights == "reprefill":
            self.prefill_tokens += sum(sequence.length + sequence.done for sequence in self._sequences.values())

    def _next(self, id: int, sequence: _Sequence) -> Output:
        token, logprob = sequence.tokens[sequence.done], sequence.logprobs[sequence.done]
        sequence.done += 1
        sequence.limit -= 1
        stop: Literal["stop", "length"] | None = None
        if token == self.EOS:
            stop = "stop"
        elif sequence.done == sequence.remaining:
            stop = "length"
        if stop is not None:
            del self._sequences[id]
        return Output(id=id, tokens=(token,), logprobs=(logprob,), stop=stop)
