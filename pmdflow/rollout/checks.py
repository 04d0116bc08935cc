"""What every engine refuses in the same words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from pmdflow.errors import PmdflowError
from pmdflow.rollout.engine import Request


def check_joins(request: Request, held: Collection[int], num_slots: int) -> None:
    """Refuse a sequence that an engine with `held` ones cannot hold.

    Raises:
        ValueError: No free slot, or the id is held already.
    """
    if len(held) == num_slots:
        raise ValueError(f"sequence {request.id}: all {num_slots} slots are held; abort one or wait for a stop")
    if request.id in held:
        raise ValueError(f"sequence {request.id} is held already; abort it first")


def check_request(request: Request, *, vocab_size: int, max_length: int | None) -> None:
    """Refuse a request that means nothing to a model, or is too long for it.

    Args:
        request: The request.
        vocab_size: Tokens of the model.
        max_length: Its positions, or those that the engine was started for; None is unlimited.

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
    length = len(request.tokens) + request.remaining
    if max_length is not None and length > max_length:
        raise ValueError(
            f"sequence {request.id} may reach {length} tokens, the engine has positions for {max_length}; lower "
            "data.max_tokens, choose a model with more positions or, for vLLM, raise data.max_prompt_tokens"
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


def check_logprobs(logprobs: Iterable[float], version: int) -> None:
    """Refuse what diverged weights give.

    Raises:
        PmdflowError: A log-prob under policy version `version` is not finite.
    """
    if not math.isfinite(sum(logprobs)):
        raise PmdflowError(f"log-probs under policy version {version} are not finite: the weights have diverged")
