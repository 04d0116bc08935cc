"""The scheduler: a pure function from counts and settings to a quota. It keeps no books and reads no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pmdflow.types import Counts, Quota

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """What the scheduler needs of the configuration."""

    groups_per_iteration: int
    tokens_per_iteration: int
    """Generated tokens that all rollout actors may spend under one policy version."""
    tokens_per_segment: int | None
    """Generated tokens that one trajectory may spend under one policy version; None is unlimited."""
    lookahead: int

    @classmethod
    def of(cls, config: Config) -> SchedulerSettings:
        """Take the settings out of a configuration."""
        return cls(
            groups_per_iteration=config.scheduler.groups_per_iteration,
            tokens_per_iteration=config.scheduler.tokens_per_iteration,
            tokens_per_segment=config.rollout.tokens_per_segment,
            lookahead=config.scheduler.lookahead,
        )


def next_quota(settings: SchedulerSettings, counts: Counts) -> Quota:
    """The quota of the newest version, with its token budget granted one more time.

    Called when a version is published (nothing granted yet: the first grant) and when rollout is closed without a
    ready group (the budget is exhausted: the same version's budget is granted once more, without a step). Both token
    budgets grow together, so every repetition lets at least one token be generated and no run can stall.

    Args:
        settings: Budgets of one grant.
        counts: Live numbers of the store; `tokens_budget` is what the newest version has been granted so far.

    Returns:
        The whole quota of `counts.version`: it replaces the earlier one.

    Example:
        >>> settings = SchedulerSettings(
        ...     groups_per_iteration=4, tokens_per_iteration=100, tokens_per_segment=10, lookahead=1)
        >>> next_quota(settings, Counts(**{name: 0 for name in Counts.__slots__})).tokens
        100
    """
    grants = counts.tokens_budget // settings.tokens_per_iteration + 1
    segment = settings.tokens_per_segment
    return Quota(
        version=counts.version,
        groups=settings.groups_per_iteration * (settings.lookahead + 1),
        tokens=settings.tokens_per_iteration * grants,
        tokens_per_segment=None if segment is None else segment * grants,
    )
