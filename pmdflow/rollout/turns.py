"""The durable record of a trajectory with an environment: its turns."""

from __future__ import annotations

from dataclasses import dataclass

from pmdflow.types import Int32, UInt8


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model wrote, and what the environment said to it."""

    action: tuple[int, ...]
    observed: tuple[int, ...]
    """Empty if it has not answered yet, or the turn goes on."""


def split_turns(tokens: Int32, observed: UInt8) -> tuple[tuple[int, ...], list[Turn]]:
    """What `reset` said, and the turns after it, of the tokens after a prompt and their flags, both [S].

    Example:
        >>> split_turns(np.array([9, 5, 6, 7]), np.array([0, 1, 1, 0]))[1][0]
        Turn(action=(9,), observed=(5, 6))
    """
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(tokens.tolist(), observed.tolist(), strict=True):
        if not runs or runs[-1][0] != bool(flag):
            runs.append((bool(flag), []))
        runs[-1][1].append(token)
    first = tuple(runs.pop(0)[1]) if runs and runs[0][0] else ()
    actions, answers = runs[::2], [*runs[1::2], (True, [])]
    return first, [Turn(action=tuple(a), observed=tuple(o)) for (_, a), (_, o) in zip(actions, answers, strict=False)]
