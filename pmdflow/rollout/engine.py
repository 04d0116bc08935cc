"""The contract between a rollout actor and what generates its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pmdflow.types import Int32

if TYPE_CHECKING:
    import torch

OnNewWeights = Literal["keep_kv", "reprefill", "finish"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to extend."""

    id: int
    tokens: Int32
    """Prompt and everything generated so far, shape [P + S]."""
    limit: int
    """New tokens it may generate before it pauses."""
    remaining: int
    """New tokens until the trajectory's own maximum; reaching it ends it with `length`."""
    temperature: float
    top_p: float = 1.0
    min_tokens: int = 0
    """New tokens before which neither an end of sequence nor a stop id is sampled; evaluation only, like `top_p`."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence with `stop`, besides the model's end of sequence. Stop strings are the actor's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one sequence generated in one step."""

    id: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Log-probs of logits / temperature at the sampled tokens, over the whole vocabulary unless evaluation narrows
    it."""
    stop: Literal["stop", "length"] | None
    """`stop`: an end of sequence or a stop id was sampled (it is the last of `tokens`). The sequence has left the
    engine."""
    columns: Mapping[str, Sequence[Any]] | None = None
    """More of each token by name, a value or array for each of `tokens`; None: the engine has none."""


class RolloutEngine(Protocol):
    """Continuous batching: sequences join and leave between steps; all calls come from one thread."""

    version: int
    """Policy version of the weights in use."""
    num_slots: int
    """Sequences it can hold, paused ones counted."""
    prefill_tokens: int
    """Tokens prefilled since the start, those of preempted sequences again."""
    overrun_tokens: int
    """Tokens generated beyond a limit, or after an abort, and thrown away; no log-prob of them is kept."""
    preemptions: int
    """Times that a running sequence lost its cache to another one, and is prefilled again."""
    drafted_tokens: int
    """Tokens proposed by speculation since the start; 0 without."""
    accepted_tokens: int
    """Those of them that were kept."""

    def add(self, request: Request) -> None:
        """Join at the next step."""

    def extend(self, id: int, limit: int) -> None:
        """Let sequence `id` generate `limit` more tokens from where it stands; resumes it if paused."""

    def abort(self, id: int) -> None:
        """Forget sequence `id`, of which no `Output` comes any more; unknown ids are ignored."""

    def step(self) -> list[Output]:
        """Generate one token or more for sequences that have a limit left; [] if none has.

        One whose prompt is long may begin some steps later: its prefill must not stop the others. An engine in a
        process of its own gives out what has arrived, after a short wait also [].

        Raises:
            EngineDied: the engine's process is gone or silent.
        """

    def active(self) -> int:
        """Sequences that would generate in the next step."""

    def stage(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """Prepare published weights for `load_weights`; may be called beside generation, from another thread."""

    def pause(self) -> list[Output]:
        """Stop generating; returns what was generated and not given out yet, all of it under `version`."""

    def load_weights(self, version: int, staged: Any, *, on_new_weights: OnNewWeights) -> None:
        """Take staged weights while paused: `keep_kv` goes on, `reprefill` recomputes every held sequence's cache."""

    def score(self, tokens: Sequence[int]) -> Sequence[float]:
        """Log-probs, at temperature 1, of the tokens after the first of a sequence, by the weights in use.

        Not while paused. Of a sequence that is too long for the engine those that fit; an engine without a model has
        none.
        """

    def resume(self) -> None:
        """Generate again, under the newest weights and limits."""

    def sleep(self) -> None:
        """Give the device's memory back while paused: weights go to the host, caches are forgotten.

        Held sequences stay, and are prefilled again by those steps that go on with them. Until `wake` it may be asked
        to add, extend and abort, and for nothing else.
        """

    def wake(self) -> None:
        """Take the memory again and generate on, under the same weights."""

    def close(self) -> None:
        """End its processes, if it has any; nothing is called afterwards."""
