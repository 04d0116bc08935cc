"""The reward that an environment or an agent program gave itself, by its return value, file or `POST /reward`."""

from __future__ import annotations

from collections.abc import Mapping

from pmdflow.reward.rubric import InvalidCompletion


def score(*, rewards: Mapping[str, float], name: str = "reward") -> float:
    """What was said of the episode under `name`.

    Raises:
        InvalidCompletion: nothing was.
    """
    if name not in rewards:
        raise InvalidCompletion(f"no reward {name!r} was said of it; there is {sorted(rewards) or 'none'}")
    return rewards[name]
