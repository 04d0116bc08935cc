"""Prompts drawn by how well earlier ones were answered: in proportion to failure, and from a point on only hard ones.

A draw is a function of seed, cursor and the rates of success of one number. The store owns the rates, and the record of
each admission names their number, so a run that is resumed draws as it would have without the crash.

Source: Kimi k1.5, arXiv:2501.12599, section 2.3.4 (curriculum and prioritized sampling).
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pmdflow.types import Drawn, Float64, Int64

if TYPE_CHECKING:
    from pmdflow.config.sources import CurriculumConfig
    from pmdflow.data.mixture import Schedule
    from pmdflow.data.prompts import Source
    from pmdflow.store.answers import Successes

SCALE = 1 << 20
"""Weight of a prompt that never succeeded. Weights are whole numbers, so that sums are the same on every machine."""
BLOCK = 1 << 7
"""Prompts whose weights have a sum of their own: a draw searches the blocks, then one of them."""
ROW_BITS = 40
"""Of a key: the row of its source, below the number of the source."""


def prompt_probabilities(success_rates: npt.ArrayLike, *, eligible: npt.ArrayLike | None = None) -> Float64:
    """Chance of each prompt to be drawn: in proportion to 1 - s, 0 where it is not eligible.

    Where every eligible prompt is solved they are all as likely, and where none is eligible all are.

    Args:
        success_rates: s, 0 to 1, shape [n]; 0 for prompts that were never tried.
        eligible: bool, shape [n]; None is all.

    Returns:
        float64 [n], sum 1; resolved to about 1e-6 of the largest.

    Example:
        >>> prompt_probabilities([0.0, 0.5, 1.0]).round(3).tolist()
        [0.667, 0.333, 0.0]
    """
    rates = np.asarray(success_rates, np.float64)
    chosen = np.ones(len(rates), bool) if eligible is None else np.asarray(eligible, bool)
    if not chosen.any():
        chosen = ~chosen
    weights = _weights(rates, chosen)
    weights = weights if weights.any() else chosen.astype(np.int64)
    chances: Float64 = weights / weights.sum()
    return chances


def _weights(rates: Float64, eligible: npt.NDArray[np.bool_]) -> Int64:
    return np.where(eligible, np.rint((1.0 - rates.clip(0.0, 1.0)) * SCALE), 0.0).astype(np.int64)


class Pool:
    """The prompts of one source with their rates of success; a draw costs the same whatever their number."""

    def __init__(self, size: int) -> None:
        """A pool of `size` prompts that were never tried, each as likely."""
        self._rates = np.zeros(size)
        self._tried = np.zeros(size, bool)
        self.choose(priority=True, hard_below=None)

    def choose(self, *, priority: bool, hard_below: float | None) -> None:
        """Draw in proportion to failure, or all as likely; and only what succeeds less than `hard_below`."""
        self._priority, self._hard_below = priority, hard_below
        padded = -(-len(self._rates) // BLOCK) * BLOCK
        self._weights = np.zeros(padded, np.int64)
        self._weights[: len(self._rates)] = self._weights_of(self._rates)
        self._sums = self._weights.reshape(-1, BLOCK).sum(1)
        self._add_up()

    def update(self, rows: Int64, rates: Float64) -> None:
        """New rates of some prompts."""
        self._rates[rows], self._tried[rows] = rates, True
        self._weights[rows] = self._weights_of(rates)
        blocks = np.unique(rows // BLOCK)
        self._sums[blocks] = self._weights.reshape(-1, BLOCK)[blocks].sum(1)
        self._add_up()

    @property
    def share(self) -> float:
        """Mean weight, 1 where nothing succeeds; 0 where nothing is left to draw."""
        return self._total / (SCALE * len(self._rates))

    @property
    def tried(self) -> Float64:
        """Rates of what was tried."""
        tried: Float64 = self._rates[self._tried]
        return tried

    def draw(self, number: int) -> int:
        """The row for a uniform random number of 64 bits; all rows are as likely where no weight is left."""
        if not self._total:
            return number * len(self._rates) >> 64
        target = number * self._total >> 64
        block = bisect(self._ends, target)
        target -= self._ends[block - 1] if block else 0
        first = block * BLOCK
        return first + int(self._weights[first : first + BLOCK].cumsum().searchsorted(target, "right"))

    def _add_up(self) -> None:
        self._ends: list[int] = self._sums.cumsum().tolist()  # a list is searched several times faster
        self._total: int = self._ends[-1]

    def _weights_of(self, rates: Float64) -> Int64:
        eligible = np.ones(len(rates), bool) if self._hard_below is None else rates < self._hard_below
        return _weights(rates if self._priority else np.zeros(len(rates)), eligible)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a cursor draws."""

    source: int
    row: int
    """Of the source's training prompts, see `Source.at`."""
    drawn: Drawn


class Curriculum:
    """Draws from several sources by the newest rates of success that it was told.

    An endless source has one rate for all of its prompts.
    """

    def __init__(
        self,
        settings: CurriculumConfig,
        *,
        sources: Sequence[Source],
        weights: Sequence[float],
        schedule: Schedule,
        seed: int,
    ) -> None:
        """`schedule` draws as long as neither priority nor switch ask for another order."""
        self._settings, self._schedule, self._seed = settings, schedule, seed
        self._sources, self._weights = tuple(sources), tuple(weights)
        self._pools = [Pool(source.num_train or 1) for source in sources]
        hard = settings.hard_sources
        self._hard = [not hard or source.name in hard for source in sources]
        self.number = 0
        """Of the rates that the next draw goes by."""
        self._choose()
        self._ends = self._masses()
        """Sums of the sources' chances up to each, not normalized."""

    def learn(self, successes: Successes) -> None:
        """Go by newer rates from now on."""
        sources, rows = successes.keys >> np.uint64(ROW_BITS), successes.keys & np.uint64((1 << ROW_BITS) - 1)
        for source, pool in enumerate(self._pools):
            mine = sources == source
            if mine.any():
                pool.update(rows[mine].astype(np.int64), successes.rates[mine])
        switched = self.is_switched
        self.number = successes.number
        if self.is_switched != switched:
            self._choose()
        self._ends = self._masses()

    @property
    def is_switched(self) -> bool:
        """Whether the next iteration draws hard prompts only."""
        switch_at = self._settings.switch_at
        return switch_at is not None and self.number + 1 >= switch_at

    def draw(self, cursor: int) -> Choice:
        """What `cursor` draws by the present rates."""
        if self._settings.priority == "uniform" and not self.is_switched:
            source, number = self._schedule.draw(cursor)
            return self._choice(source, self._sources[source].row(number))
        digest = hashlib.blake2b(f"pmdflow-draw-{self._seed}-{cursor}".encode(), digest_size=16).digest()
        source = bisect(self._ends, int.from_bytes(digest[:8], "little") / 2**64 * self._ends[-1])
        if self._sources[source].num_train is None:
            return self._choice(source, cursor)
        return self._choice(source, self._pools[source].draw(int.from_bytes(digest[8:], "little")))

    def metrics(self) -> dict[str, Any]:
        """What is known of the prompts that were tried; see METRICS.md."""
        rates = np.concatenate([pool.tried for pool in self._pools])
        mean = float(rates.mean()) if len(rates) else None
        return {"data/success_rate_mean": mean, "data/prompts_tried": len(rates)}

    def _choice(self, source: int, row: int) -> Choice:
        key = source << ROW_BITS | (0 if self._sources[source].num_train is None else row)
        return Choice(source, row, Drawn(key=key, number=self.number))

    def _choose(self) -> None:
        for pool in self._pools:
            pool.choose(
                priority=self._settings.priority == "failure",
                hard_below=self._settings.hard_below if self.is_switched else None,
            )

    def _masses(self) -> list[float]:
        weights = [
            weight if chosen or not self.is_switched else 0.0
            for weight, chosen in zip(self._weights, self._hard, strict=True)
        ]
        masses = [weight * pool.share for weight, pool in zip(weights, self._pools, strict=True)]
        return list(accumulate(masses if any(masses) else weights))
