"""The contract between a rollout actor and what generates its tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


class RolloutEngine(Protocol):
    """Continuous batching: sequences join and leave between steps; all calls come from one thread."""

    version: int
    """Policy version of the weights in use."""
    num_slots: int
    """Sequences it can hold, paused ones counted."""
    prefill_tokens: int
    """Tokens prefilled since the start."""
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

    def resume(self) -> None:
        """Generate again, under the newest weights and limits."""

    def close(self) -> None:
        """End its processes, if it has any; nothing is called afterwards."""


def check_joins(request: Request, held: Collection[int], num_slots: int) -> None:
    """Refuse a sequence that an engine with `held` ones cannot hold.

    Raises:
        ValueError: No free slot, or the id is held already.
    """
    if len(held) == num_slots:
        raise ValueError(f"sequence {request.id}: all {num_slots} slots are held; abort one or wait for a stop")
    if request.id in held:
        raise ValueError(f"sequence {request.id} is held already; abort it first")


def check_request(request: Request, *, vocab_size: int) -> None:
    """Refuse a request that means nothing to a model with `vocab_size` tokens.

    Raises:
        ValueError: Names the sequence and what is wrong.
    """
    if len(request.tokens) == 0:
        raise ValueError(f"sequence {request.id} has no token; a prompt needs at least one")
    if request.limit < 0 or request.remaining < 1 or request.temperature < 0 or not 0 < request.top_p <= 1:
        raise ValueError(
            f"sequence {request.id}: limit {request.limit} must be >= 0, remaining {request.remaining} >= 1, "
            f"temperature {request.temperature} >= 0 and top_p {request.top_p} in (0, 1]"
        )
    outside = [token for token in request.stop_token_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"sequence {request.id}: stop_token_ids {outside} are not among the model's {vocab_size} tokens"
        )


def check_extends(id: int, limit: int, held: Collection[int]) -> None:
    """Refuse a limit that means nothing.

    Raises:
        ValueError: The sequence is not held, or the limit is negative.
    """
    if id not in held:
        raise ValueError(f"sequence {id} is not held: it has stopped, was aborted or was never added")
    if limit < 0:
        raise ValueError(f"sequence {id}: limit {limit} is below 0")
