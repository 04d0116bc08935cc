"""What the agent programs of one episode did, from the files that they left in the run: see `pmdflow.agents.diary`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmdflow.agents.diary import SUFFIX

OUTPUT_BYTES = 20_000
"""Of the end of what they said."""
MOST_TURNS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLine:
    """One turn of the model."""

    number: int
    branch: int
    """Forks before it."""
    asked_s: float
    """Seconds since the first program started."""
    took_s: float
    tokens: int
    calls: str
    """Names of the tools that it calls."""
    finish: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeView:
    """Everything of one episode."""

    programs: int
    """How often one was started."""
    lasted_s: float
    """From the first start to the last line."""
    ended: str
    """Why the last one ended; empty while it runs."""
    num_turns: int
    turns: list[TurnLine]
    """The first `MOST_TURNS`."""
    rewards: list[tuple[float, str, float]]
    """(seconds since the start, name, value) of what was said of it."""
    output: str
    """The end of what they wrote."""


def episode_of(run_dir: Path, trajectory: int) -> EpisodeView | None:
    """The episode that begins with a trajectory; None where no program worked on it."""
    folder = run_dir / "logs" / "agents"
    diaries = _by_epoch(folder, trajectory, SUFFIX)
    lines = [line for path in diaries for line in _lines(path)]
    if not lines:
        return None
    start = lines[0]["time"]
    new = [line for line in lines if line["kind"] == "turn" and not line["recorded"]]
    turns = [
        TurnLine(
            number=number,
            branch=line["branch"],
            asked_s=line["asked"] - start,
            took_s=line["time"] - line["asked"],
            tokens=line["tokens"],
            calls=", ".join(line["calls"]),
            finish=line["finish"],
        )
        for number, line in enumerate(new[:MOST_TURNS], 1)
    ]
    said = [line for line in lines if line["kind"] == "reward"]
    return EpisodeView(
        programs=sum(line["kind"] == "start" for line in lines),
        lasted_s=lines[-1]["time"] - start,
        ended=lines[-1]["why"] if lines[-1]["kind"] == "end" else "",
        num_turns=len(new),
        turns=turns,
        rewards=[(line["time"] - start, name, value) for line in said for name, value in line["rewards"].items()],
        output=_output(_by_epoch(folder, trajectory, ".log")),
    )


def _by_epoch(folder: Path, trajectory: int, suffix: str) -> list[Path]:
    """Files of the programs of a trajectory, in the order in which they were started."""
    found = {}
    for path in folder.glob(f"{trajectory}-*{suffix}"):
        epoch = path.name.removeprefix(f"{trajectory}-").removesuffix(suffix)
        if epoch.isdigit():
            found[int(epoch)] = path
    return [found[epoch] for epoch in sorted(found)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole ones; the last may be torn, or is being written."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _output(logs: list[Path]) -> str:
    text = ""
    for nth, path in enumerate(logs, 1):
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - OUTPUT_BYTES, 0))
            said = file.read().decode(errors="replace").strip()
        if said:
            text += f"[program {nth}]\n{said}\n" if len(logs) > 1 else said
    return text[-OUTPUT_BYTES:]
