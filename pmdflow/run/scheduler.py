"""The scheduler: pure functions from counts and settings to numbers. It keeps no books and reads no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from pmdflow.config.schema import DEFAULT_SLOTS
from pmdflow.config.window import active_groups, most_tokens
from pmdflow.data.curriculum import prompt_probabilities as prompt_probabilities
from pmdflow.store.answers import ClaimAnswer
from pmdflow.types import Counts, Quota

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


RATES = 5
"""Newest iterations by whose rates an automatic budget goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """What the scheduler needs of the configuration."""

    groups_per_iteration: int
    tokens_per_iteration: int
    """Generated tokens that all rollout actors may spend under one policy version."""
    tokens_per_segment: int | None
    """Generated tokens that one trajectory may spend under one policy version; None is unlimited."""
    lookahead: int
    iteration_s: float | None = None
    """Seconds that an iteration should take: an automatic budget, of at most `tokens_per_iteration`."""
    least_tokens: int = 1
    """An automatic budget is never smaller."""

    @classmethod
    def of(cls, config: Config) -> SchedulerSettings:
        """Take the settings out of a configuration."""
        return cls(
            groups_per_iteration=config.scheduler.groups_per_iteration,
            tokens_per_iteration=most_tokens(config),
            tokens_per_segment=config.rollout.tokens_per_segment,
            lookahead=config.scheduler.lookahead,
            iteration_s=config.scheduler.iteration_s,
            least_tokens=config.scheduler.groups_per_iteration * config.data.group_size,
        )

    @property
    def active_groups(self) -> int:
        """Most groups admitted and not yet trained; see `pmdflow.config.window`."""
        return active_groups(groups_per_iteration=self.groups_per_iteration, lookahead=self.lookahead)

    def budgeted(self, rates: Sequence[float]) -> SchedulerSettings:
        """These settings with the budget of the next version, if it is automatic.

        Args:
            rates: Tokens a second that all rollout actors generated in each iteration, their waits left out, oldest
                first. A wait for the budget is one, so that a small budget makes no rate look small.

        Example:
            >>> settings = SchedulerSettings(
            ...     groups_per_iteration=4, tokens_per_iteration=9000, tokens_per_segment=None, lookahead=1,
            ...     iteration_s=10.0)
            >>> settings.budgeted([]).tokens_per_iteration, settings.budgeted([80.0, 100.0, 90.0]).tokens_per_iteration
            (9000, 900)
        """
        if self.iteration_s is None or not rates:
            return self
        tokens = max(round(median(rates[-RATES:]) * self.iteration_s), self.least_tokens)
        return replace(self, tokens_per_iteration=min(tokens, self.tokens_per_iteration))

    def room(self, counts: Counts) -> int:
        """Groups that may be admitted now."""
        return max(self.active_groups - counts.groups_untrained, 0)


def next_quota(settings: SchedulerSettings, counts: Counts) -> Quota:
    """The quota of the newest version, with its token budget granted one more time.

    Called when a version is published (nothing granted yet: the first grant) and when rollout is closed without a
    ready group (the budget is exhausted: the same version's budget is granted once more, without a step). Both token
    budgets grow together, so every repetition lets at least one token be generated and no run can stall; an automatic
    budget is fixed when the version is published (`SchedulerSettings.budgeted`), and after a restart may be another.

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
        groups=settings.active_groups,
        tokens=settings.tokens_per_iteration * grants,
        tokens_per_segment=None if segment is None else segment * grants,
    )


def grant_tokens(config: Config) -> int:
    """Tokens of one grant: many, so that it is extended before it ends; but all held ones leave half of the budget."""
    held = config.rollout.actors * (config.rollout.slots or DEFAULT_SLOTS)
    return min(max(most_tokens(config) // (2 * held), 64), 1024)


def must_regrant(answer: ClaimAnswer, *, admitted: int) -> bool:
    """Whether a claim that was not granted needs its version's budget once more.

    Only if rollout is closed (`starved`), no over-age group was evicted to make room, and nothing could be admitted
    since: then no lease can be granted, so no group can ever become ready.
    """
    return answer.status == "starved" and answer.reason == "closed" and admitted == 0
