"""Several sources as one stream: which one a cursor draws from, and the how manieth draw of it that is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pmdflow.data.curriculum import Curriculum
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from pmdflow.config.sources import CurriculumConfig
    from pmdflow.data.prompts import Source

BLOCK = 1024
"""Draws of which every source has its share exactly; the order in a block is drawn from the seed."""


class Schedule:
    """A pure function of seed and cursor, without a state that a crash could lose.

    Each source's draws are numbered 0, 1, 2, ... without a gap or a repeat, in the order of the cursors, so a finite
    source is gone through whole before it begins again, whatever its weight.

    Example:
        >>> schedule = Schedule([3.0, 1.0], seed=0)
        >>> draws = [schedule.draw(cursor) for cursor in range(1024)]
        >>> [sum(source == chosen for chosen, _ in draws) for source in (0, 1)]
        [768, 256]
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Weights are positive; a source has at least one draw of a block."""
        self._counts, self._seed = shares(weights, BLOCK, least=1), seed
        self._block = lru_cache(maxsize=2)(self._make_block)

    def draw(self, cursor: int) -> tuple[int, int]:
        """The source that `cursor` draws from, and the number of that draw among all of that source."""
        block, position = divmod(cursor, BLOCK)
        source, rank = self._block(block)[position]
        return source, block * self._counts[source] + rank

    def _make_block(self, block: int) -> list[tuple[int, int]]:
        order = [source for source, count in enumerate(self._counts) for _ in range(count)]
        random.Random(f"pmdflow-mixture-{self._seed}-{block}").shuffle(order)
        seen = [0] * len(self._counts)
        draws = []
        for source in order:
            draws.append((source, seen[source]))
            seen[source] += 1
        return draws


def shares(weights: Sequence[float], total: int, *, least: int = 0) -> list[int]:
    """Whole numbers in the proportion of the weights that sum to `total`, by largest remainder, none below `least`.

    Example:
        >>> shares([1.0, 1.0, 1.0], 128)
        [43, 43, 42]
    """
    assert total >= least * len(weights), (weights, total)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(int(share), least) for share in exact]
    while sum(counts) > total:  # what the least ones got is taken from the largest
        counts[counts.index(max(counts))] -= 1
    by_remainder = sorted(range(len(weights)), key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """One of `eval.sets`."""

    source: Source
    """Of which all that is held out is trained on nowhere."""
    prompts: list[Prompt]
    """The first `prompts` of it, tokenized."""


class MixedPrompts:
    """The prompts of all sources of a configuration, and its evaluation sets.

    What is held out of one source, or is in an evaluation set, is trained on from none.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Source],
        weights: Sequence[float],
        sets: Mapping[str, EvaluationSet],
        seed: int,
        curriculum: CurriculumConfig | None = None,
    ) -> None:
        """Mix sources by weight, which are positive, one each; `seed` is of the order in which they are drawn from."""
        self.sources, self._sets = tuple(sources), sets
        self._schedule = Schedule(weights, seed=seed)
        held_out = [*sources, *(given.source for given in sets.values())]
        keys = {key for source in held_out for key in source.held_out_keys}
        for source in sources:
            source.exclude(keys)
        self._held_out = self._interleave()
        self.curriculum: Curriculum | None = None
        """What draws instead of the schedule, if the configuration asks for it; its user tells it the rates."""
        if curriculum is not None:
            self.curriculum = Curriculum(
                curriculum, sources=self.sources, weights=weights, schedule=self._schedule, seed=seed
            )

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`; with a curriculum also a function of the rates that it was told."""
        if self.curriculum is not None:
            choice = self.curriculum.draw(cursor)
            return replace(self.sources[choice.source].at(choice.row), drawn=choice.drawn)
        source, number = self._schedule.draw(cursor)
        return self.sources[source].prompt(number)

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        return self._held_out[:n]

    def evaluation_set(self, name: str) -> list[Prompt]:
        """The prompts of one of `eval.sets`, in its order."""
        return self._sets[name].prompts

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What must be the same when a run is resumed, by source and evaluation set."""
        sets = {given.source.name: given.source.identity for given in self._sets.values()}
        return {source.name: source.identity for source in self.sources} | sets

    @property
    def summary(self) -> list[tuple[str, str]]:
        """Name and numbers of every source and evaluation set."""
        sets = [(given.source.name, f"{len(given.prompts):,} prompts") for given in self._sets.values()]
        return [(source.name, source.summary) for source in self.sources] + sets

    def _interleave(self) -> list[Prompt]:
        """Held-out prompts of all sources, so that each beginning of the list has about each source's share."""
        lists = [source.held_out(source.num_held_out) for source in self.sources]
        placed = [((i + 0.5) / len(prompts), prompt) for prompts in lists for i, prompt in enumerate(prompts)]
        return [prompt for _, prompt in sorted(placed, key=lambda pair: pair[0])]
