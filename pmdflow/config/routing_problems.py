"""What contradicts the replay of a Mixture of Experts' choices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


def routing_problems(config: Config) -> Iterator[str]:
    """As `combination_problems`, of `learner.router_replay`."""
    if not config.learner.router_replay:
        return
    if config.rollout.engine != "transformers":
        yield (
            f"learner.router_replay is set while rollout.engine is {config.rollout.engine}: only the transformers "
            "engine returns which experts a token took; set rollout.engine to transformers, or router_replay to false"
        )
    if config.learner.compile:
        yield (
            "learner.router_replay is set while learner.compile is true: the routers of a compiled layer cannot be "
            "told what to choose; set one of them to false"
        )
    if config.agents is not None:
        yield (
            "learner.router_replay is set while `agents` is: what requests of an episode generate side by side comes "
            "without its experts; set router_replay to false"
        )
