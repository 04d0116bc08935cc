"""A store alone: finished groups put in by whoever generated them, with TRL or plain transformers for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from pmdflow._rust_buffer import Conflict
from pmdflow.store.tokens import token_ids
from pmdflow.types import Float32, Int32, Prompt, Quota, Segment

if TYPE_CHECKING:
    from pmdflow.store.facade import TrajectoryStore

_UNBOUNDED = 1 << 40
"""A budget that never binds: nothing is rolled out by lease."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One finished completion of a prompt."""

    tokens: Int32
    logprobs: Float32
    """Log-probs of logits / temperature, shape of `tokens`."""
    reward: float
    components: Mapping[str, float]
    """Parts of the reward by name."""


def attempts_of(
    completions: Sequence[ArrayLike],
    logprobs: Sequence[ArrayLike],
    rewards: Sequence[float],
    components: Sequence[Mapping[str, float]] | None,
) -> list[Attempt]:
    """What the caller of `put_group` gave, checked before anything is written.

    Raises:
        ValueError: lengths differ, a completion is empty, or a number is none.
    """
    parts = components if components is not None else [{}] * len(completions)
    if not 0 < len(completions) == len(logprobs) == len(rewards) == len(parts):
        raise ValueError(
            f"{len(completions)} completions, {len(logprobs)} log-probs, {len(rewards)} rewards and {len(parts)} "
            "components; give one of each for each attempt"
        )
    attempts = []
    for number, (ids, values, reward, named) in enumerate(zip(completions, logprobs, rewards, parts, strict=True)):
        tokens, scores = token_ids(ids, of=f"attempt {number}"), np.asarray(values, np.float32)
        if len(tokens) == 0 or scores.shape != tokens.shape:
            raise ValueError(
                f"attempt {number}: {len(tokens)} tokens with log-probs of shape {scores.shape}; give one or more "
                "tokens and a log-prob for each"
            )
        if not np.isfinite([*scores, reward, *named.values()]).all():
            raise ValueError(f"attempt {number}: log-probs, reward and its components must be finite")
        attempts.append(Attempt(tokens, scores, float(reward), named))
    return attempts


def put_attempts(
    store: TrajectoryStore,
    request_id: str,
    prompt: Prompt,
    attempts: Sequence[Attempt],
    *,
    version: int | None,
    temperature: float,
) -> int:
    """Admit, append and score a group that is finished; each step is safe to repeat, and so is all of it."""
    newest = _open_version(store)
    if version is not None and not 0 <= version <= newest:
        raise Conflict(f"group {request_id!r}: version {version} was never published, the newest is {newest}")
    longest = max(len(attempt.tokens) for attempt in attempts)
    group = store.admit(request_id, prompt, group_size=len(attempts), max_tokens=longest, wait=False)
    epochs = {lease.trajectory: lease.epoch for lease in store.lease_group("put_group", group)}
    first = next(row.trajectory for row in store.query(group=group))
    segments = [
        Segment(
            trajectory=first + number,
            epoch=epochs[first + number],
            offset=0,
            version=newest if version is None else version,
            temperature=temperature,
            tokens=attempt.tokens,
            logprobs=attempt.logprobs,
            next_version=newest,
            stop="stop",
        )
        for number, attempt in enumerate(attempts)
        if first + number in epochs
    ]
    store.append(segments, wait=False)
    for number, attempt in enumerate(attempts):
        store.score(first + number, 0, "scored", attempt.reward, attempt.components, wait=False)
    store.wait_durable(None, timeout_s=60.0)
    return group


def _open_version(store: TrajectoryStore) -> int:
    """The newest version, with room for groups; the first is published here."""
    counts = store.counts()
    if counts.version < 0:
        store.publish(0)
    newest = max(counts.version, 0)
    if counts.tokens_budget == 0:
        store.set_quota(Quota(version=newest, groups=_UNBOUNDED, tokens=_UNBOUNDED, tokens_per_segment=None))
    return newest
