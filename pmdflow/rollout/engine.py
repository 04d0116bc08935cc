"""The contract between a rollout actor and what generates its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

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


class RolloutEngine(Protocol):
    """Continuous batching: sequences join and leave between steps; all calls come from one thread."""

    version: int
    """Policy version of the weights in use."""
    num_slots: int
    """Sequences it can hold, paused ones counted."""
    prefill_tokens: int
    """Tokens prefilled since the start."""

    def add(self, request: Request) -> None:
        """Join at the next step."""

    def extend(self, id: int, limit: int) -> None:
        """Let sequence `id` generate `limit` more tokens from where it stands; resumes it if paused."""

    def abort(self, id: int) -> None:
        """Forget sequence `id`, of which no `Output` comes any more; unknown ids are ignored."""

    def step(self) -> list[Output]:
        """Generate one token for each sequence that has a limit left; [] if none has.

        One whose prompt is long may begin some steps later: its prefill must not stop the others.
        """

    def active(self) -> int:
        """Sequences that would generate in the next step."""

    def load_weights(self, version: int, weights: Mapping[str, torch.Tensor], *, on_new_weights: OnNewWeights) -> None:
        """Take new weights between steps: `keep_kv` goes on, `reprefill` recomputes every held sequence's cache."""
