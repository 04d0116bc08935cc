"""Settings that contradict each other in how engines and learner ranks have the devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import Config, LearnerConfig


def device_problems(config: Config) -> Iterator[str]:
    """One line `key ...: why; remedy` for each, as `combination_problems`."""
    yield from _rank_problems(config.learner)
    if config.cluster.colocate:
        yield from _colocated_problems(config)


def _rank_problems(learner: LearnerConfig) -> Iterator[str]:
    ranks, replicas, size = learner.ranks, learner.replicas, learner.context_parallel
    if ranks != "auto" and ranks % replicas:
        yield (
            f"learner.ranks ({ranks}) is not a multiple of learner.replicas ({replicas}): each replica is sharded over "
            "equally many ranks; change one of them"
        )
    if ranks != "auto" and ranks % size:
        yield (
            f"learner.ranks ({ranks}) is not a multiple of learner.context_parallel ({size}): so many ranks share each "
            "row; change one of them"
        )
    if size > 1 and not learner.packing:
        yield (
            f"learner.context_parallel is {size} while learner.packing is false: only a packed row is shared by ranks; "
            "set packing to true, or context_parallel to 1"
        )


def _colocated_problems(config: Config) -> Iterator[str]:
    actors, ranks = config.rollout.actors, config.learner.ranks
    if config.scheduler.lookahead:
        yield (
            f"cluster.colocate is true while scheduler.lookahead is {config.scheduler.lookahead}: engines sleep while "
            "the learner trains, so nothing can run ahead; set lookahead to 0"
        )
    if names := sorted(config.learner.scorers_when("claim")):
        yield (
            f"cluster.colocate is true while learner.scorers has {names[0]} with `when: claim`: what it holds would "
            "stay on the device while the engine works; let it score with `when: complete`, or set colocate to false"
        )
    if config.rollout.tensor_parallel > 1:
        yield (
            f"cluster.colocate is true while rollout.tensor_parallel is {config.rollout.tensor_parallel}: a device has "
            "one engine and one learner rank in turn; set tensor_parallel to 1"
        )
    if actors != "auto" and ranks != "auto" and actors != ranks:
        yield (
            f"cluster.colocate is true while rollout.actors is {actors} and learner.ranks is {ranks}: a device has one "
            "of each in turn; make them equal, or set one to auto"
        )
