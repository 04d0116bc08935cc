"""How many groups may be admitted in the place of those that were evicted because their rewards say nothing."""

from __future__ import annotations

import sys

from pmdflow.types import Counts


class Refills:
    """Counts one iteration's admissions in the place of evicted groups; others are not its business.

    Theorem: between two calls of `renew` at most `most` groups are admitted in the place of others, whenever these were
    evicted: also while the learner trains, and before the iteration's claim begins to wait.

    Proof. Each group that was evicted makes one place free, counted once in `_owed`. Of the places that are free,
    `allowed` keeps all but `left` of those back, and `took` lowers `left` by what was admitted beyond the others.

    Example:
        >>> refills = Refills(most=8)
        >>> refills.allowed(4, store.counts())  # doctest: +SKIP
        4
    """

    def __init__(self, *, most: int | None) -> None:
        """At most so many an iteration; None: nothing is evicted for its rewards."""
        self._most = sys.maxsize if most is None else most
        self._left = self._most
        self._owed = 0
        """Places of evicted groups that nothing was admitted into."""
        self._seen = 0
        """Evicted groups that were counted, of those since the store was opened."""

    def renew(self) -> None:
        """Another iteration begins."""
        self._left = self._most

    def allowed(self, room: int, counts: Counts) -> int:
        """Groups that may be admitted now, of the `room` that there is."""
        evicted = counts.groups_no_signal
        self._owed += evicted - (self._seen if evicted >= self._seen else 0)  # a store that is opened begins at 0
        self._seen = evicted
        self._owed = min(self._owed, room)
        return room - max(self._owed - self._left, 0)

    def took(self, admitted: int, room: int) -> None:
        """So many were admitted of the `room` of the last question."""
        used = max(admitted - (room - self._owed), 0)
        self._left -= used
        self._owed -= used
