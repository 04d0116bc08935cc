"""The durable tokens of an episode as turns: what a program that is started again is answered from."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

Tokens: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """The tokens of an episode after its prompt, in the order in which they came."""

    tokens: Sequence[int] = ()
    observed: Sequence[bool] = ()
    """Whether the model did not generate it; of each token."""
    logprobs: Sequence[float] = ()
    """Of each token; anything where it is observed."""
    versions: Sequence[int] = ()
    """Policy version of each token; likewise."""
    forks: Sequence[tuple[int, int]] = ()
    """(start, offset): tokens before a branch begins, and how many of the history before it goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was generated in one piece."""

    tokens: Tokens
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    last: bool = False
    """Nothing came after it: it may not be whole."""


@dataclass(slots=True)
class Record:
    """Turns by the history that they follow; each is given out once, in order."""

    live: Tokens
    """The history of the newest branch, prompt included."""
    spent: int
    """Tokens of the episode after the prompt, of all branches."""
    bare: bool = False
    """The newest branch has no token of its own yet."""
    forks: int = 0
    """Branches that were begun."""
    _turns: defaultdict[Tokens, deque[Turn]] = field(default_factory=lambda: defaultdict(deque))

    @classmethod
    def of(cls, prompt: Sequence[int], episode: Episode) -> Record:
        """The turns of what is durable."""
        record = cls(live=tuple(prompt), spent=len(episode.tokens), forks=len(episode.forks))
        cuts = dict(episode.forks)
        start, total = 0, len(episode.tokens)
        while start < total:
            if start in cuts:
                record.live = record.live[: len(prompt) + cuts[start]]
            end = start + 1
            while end < total and end not in cuts and bool(episode.observed[end]) == bool(episode.observed[start]):
                end += 1
            tokens = tuple(episode.tokens[start:end])
            if not episode.observed[start]:
                record._turns[record.live].append(
                    Turn(
                        tokens=tokens,
                        logprobs=tuple(episode.logprobs[start:end]),
                        versions=tuple(episode.versions[start:end]),
                        last=end == total and total not in cuts,
                    )
                )
            record.live += tokens
            start = end
        if total in cuts:
            record.live, record.bare = record.live[: len(prompt) + cuts[total]], True
        return record

    def take(self, target: Tokens) -> Turn | None:
        """The next recorded turn that follows a history."""
        turns = self._turns.get(target)
        return turns.popleft() if turns else None

    def cut(self, target: Tokens, turn: Turn, end: int) -> Turn:
        """The first `end` tokens of a turn that was taken; the next one follows these and goes on with the rest."""
        head, rest = (
            replace(turn, tokens=turn.tokens[part], logprobs=turn.logprobs[part], versions=turn.versions[part])
            for part in (slice(end), slice(end, None))
        )
        self._turns[target + head.tokens].appendleft(rest)
        return replace(head, last=False)

    @property
    def remaining(self) -> int:
        """Turns that nobody has asked for again."""
        return sum(len(turns) for turns in self._turns.values())
