"""Paired measurements: every round measures all subjects, and only numbers of the same round are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """What was asked, and the ratios that were seen, one a round."""

    name: str
    values: tuple[float, ...]
    wanted: float | None = None
    sense: Literal["at least", "at most"] = "at least"

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def met(self) -> bool | None:
        if self.wanted is None:
            return None
        return self.median >= self.wanted if self.sense == "at least" else self.median <= self.wanted

    def line(self) -> str:
        values = f"{self.median:8.3g}  ({min(self.values):.3g} to {max(self.values):.3g}, n={len(self.values)})"
        if self.wanted is None:
            return f"  {self.name:<58}{values}"
        return f"  {self.name:<58}{values}  wanted {self.sense} {self.wanted:g}: {'yes' if self.met else 'NO'}"

    def as_dict(self) -> dict[str, Any]:
        wanted = {} if self.wanted is None else {"wanted": self.wanted, "sense": self.sense, "met": self.met}
        return {"name": self.name, "median": self.median, "values": self.values, **wanted}


@dataclass(slots=True)
class Rounds:
    """Numbers of the subjects, by round."""

    unit: str
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, subjects: Mapping[str, Callable[[], float]]) -> None:
        """Measure all subjects in each round; each round begins with another one."""
        names = list(subjects)
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                self.add(name, subjects[name]())

    def add(self, name: str, value: float) -> None:
        self.numbers.setdefault(name, []).append(value)

    def ratio(
        self, above: str, below: str, wanted: float | None, sense: Literal["at least", "at most"] = "at least"
    ) -> Ratio:
        pairs = zip(self.numbers[above], self.numbers[below], strict=True)
        return Ratio(name=f"{above} / {below}", values=tuple(a / b for a, b in pairs), wanted=wanted, sense=sense)

    def fast_mode(self, above: str, below: str, wanted: float) -> Ratio:
        """The ratio in the rounds in which the bimodal `below` reached half of its best."""
        best = max(self.numbers[below])
        pairs = zip(self.numbers[above], self.numbers[below], strict=True)
        values = tuple(a / b for a, b in pairs if b >= best / 2)
        return Ratio(name=f"{above} / {below} in its fast mode", values=values, wanted=wanted)

    def lines(self) -> list[str]:
        return [
            f"  {name:<58}{median(values):>12,.4g} {self.unit}  ({min(values):,.4g} to {max(values):,.4g})"
            for name, values in self.numbers.items()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question's numbers, its ratios, and what a reader must know about them."""

    rounds: Rounds
    ratios: list[Ratio]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join(self.rounds.lines() + [ratio.line() for ratio in self.ratios] + notes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "unit": self.rounds.unit,
            "numbers": self.rounds.numbers,
            "ratios": [ratio.as_dict() for ratio in self.ratios],
            "notes": self.notes,
        }
