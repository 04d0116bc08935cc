"""The admission window: how many groups may be on their way, what that bounds, and the tokens that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


def active_groups(*, groups_per_iteration: int, lookahead: int, extra_groups: int = 0) -> int:
    """W = groups_per_iteration x (lookahead + 1): most groups admitted and not yet trained, partial ones counted.

    What it bounds: while iteration i is being generated or trained, at most (i + lookahead) x groups_per_iteration
    groups that were not evicted have ever been admitted, so rollout is at most `lookahead` iterations ahead.

    Proof. Let A be the groups ever admitted, T those that were trained or evicted, U = A - T. Only admission raises A,
    by one and only where U < W, so A <= T + W after it; training and eviction raise T, which keeps A <= T + W. While
    iteration i is under way, T counts (i - 1) x groups_per_iteration trained groups and the evicted ones: A less the
    evicted is at most (i - 1 + lookahead + 1) x groups_per_iteration. At a resume T falls by the groups of the undone
    claims; U may then exceed W by as many, admission waits until U < W again, and A, the bounded number, is unchanged.

    With `extra_groups`, W and what it bounds are greater by as many.
    """
    return groups_per_iteration * (lookahead + 1) + extra_groups


def most_tokens(config: Config) -> int:
    """Tokens that one policy version may generate: the budget, or where that is automatic, all that are admitted."""
    scheduler, data = config.scheduler, config.data
    if scheduler.tokens_per_iteration != "auto":
        return scheduler.tokens_per_iteration
    groups = active_groups(
        groups_per_iteration=scheduler.groups_per_iteration,
        lookahead=scheduler.lookahead,
        extra_groups=scheduler.extra_groups,
    )
    return groups * data.group_size * data.max_tokens
