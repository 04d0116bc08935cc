"""Trajectories as rows of a table, and one of them token by token: those of the archive; `live` has the store's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pmdflow.store.archive import open_part, part_iteration, part_path, parts, read_table
from pmdflow.types import Mask, Stop

PAGE_ROWS = 50
NEWEST_PARTS = 50
"""Without a filter on the iteration, only this many newest iterations are searched."""

SortKey = Literal["iteration", "trajectory", "reward", "length", "versions", "stop"]
SORT_KEYS: tuple[SortKey, ...] = ("iteration", "trajectory", "reward", "length", "versions", "stop")

STOP_NAMES = {Stop.NONE: "partial", Stop.STOP: "stop", Stop.LENGTH: "length", Stop.REPETITION: "repetition"}
_MASK_REASONS = (
    (Mask.OVER_AGE, "over-age"), (Mask.SEGMENT, "older segment"), (Mask.FILTER, "filtered"), (Mask.VETO, "veto"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trajectory in the table."""

    iteration: int | None
    """The one that claimed it; None while none has."""
    trajectory: int
    group: int
    prompt_id: str
    reward: float | None
    """None without one."""
    length: int
    """Generated tokens."""
    first_version: int
    """-1 without a token."""
    last_version: int
    versions: int
    """Policy versions that generated it; of a live one, 2 may be more."""
    stop: str
    state: str = "archived"
    """Where it is, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What the table shows."""

    live: bool = False
    """Those that the store has, instead of the archived ones."""
    iteration: int | None = None
    reward_min: float = -math.inf
    reward_max: float = math.inf
    length_min: int = 0
    multi_version: bool = False
    sort: SortKey = "iteration"
    descending: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as shown."""

    text: str
    """Decoded text, or the id if the run's tokenizer is missing."""
    generated: bool
    trained: bool
    starts_segment: bool
    version: int
    hint: str
    """Everything known about it, as a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One trajectory with its tokens."""

    row: Row
    claim_version: int | None
    """None while it is not claimed."""
    components: dict[str, float]
    temperature: float
    tokens: list[Token]
    versions: list[tuple[int, int, int]]
    """(policy version, tokens, tokens with a gradient), ascending."""
    siblings: list[Row]
    """The group's trajectories, this one included."""
    branches: list[tuple[int, int | None, int]]
    """(branch, the one that it was forked from, tokens after the prompt that it keeps of that) of its episode."""


def search(run_dir: Path, wanted: Filter) -> list[Row]:
    """All archived rows that match, sorted."""
    paths = parts(run_dir)
    if wanted.iteration is not None:
        paths = [path for path in paths if part_iteration(path) == wanted.iteration]
    return select((row for path in paths[-NEWEST_PARTS:] for row in part_rows(path)), wanted)


def select(rows: Iterable[Row], wanted: Filter) -> list[Row]:
    """Those that match, sorted; what has no value comes last."""
    found = [row for row in rows if _matches(row, wanted)]
    found.sort(key=lambda row: (math.inf if row.iteration is None else row.iteration, row.trajectory))
    name = "state" if wanted.live and wanted.sort == "stop" else wanted.sort
    known = [row for row in found if getattr(row, name) is not None]
    known.sort(key=lambda row: getattr(row, name), reverse=wanted.descending)
    return known + [row for row in found if getattr(row, name) is None]


def find(run_dir: Path, trajectory: int) -> Row | None:
    """An archived trajectory by its number alone, among the newest parts."""
    newest = reversed(parts(run_dir)[-NEWEST_PARTS:])
    return next((row for path in newest for row in part_rows(path) if row.trajectory == trajectory), None)


def part_rows(path: Path) -> tuple[Row, ...]:
    """The rows of one archive part."""
    return _part_rows(path, (path / "zarr.json").stat().st_mtime_ns)


def detail(run_dir: Path, iteration: int, trajectory: int, tokenizer: Tokenizer | None) -> Detail | None:
    """One trajectory of one claim; None if the archive does not hold it."""
    path = part_path(run_dir, iteration)
    rows = part_rows(path) if path.is_dir() else ()
    index = next((i for i, row in enumerate(rows) if row.trajectory == trajectory), None)
    if index is None:
        return None
    root: Any = open_part(path)
    low, high = (int(offset) for offset in root["trajectory/token_offset"][index : index + 2])
    ids, logprobs, mask = (root[f"token/{name}"][low:high] for name in ("id", "logprob", "mask"))
    lengths = root["segment/length"][...]
    versions = np.repeat(root["segment/policy_version"][...], lengths)[low:high]
    temperatures = np.repeat(root["segment/temperature"][...], lengths)[low:high]
    starts = np.zeros(high - low, bool)
    edges = np.concatenate(([0], np.cumsum(lengths)))
    starts[edges[(edges >= low) & (edges < high)] - low] = True
    names = root.attrs["components"]
    values = root["trajectory/components"][index] if names else []
    in_prompt = np.arange(high - low) < root["trajectory/prompt_length"][index]
    columns = zip(texts(ids.tolist(), tokenizer), ids, logprobs, mask, versions, starts, in_prompt, strict=True)
    return Detail(
        row=rows[index],
        claim_version=int(root.attrs["version"]),
        components={name: float(value) for name, value in zip(names, values, strict=True) if not np.isnan(value)},
        temperature=float(temperatures[-1]) if high > low else 1.0,
        tokens=[make_token(*column) for column in columns],
        versions=version_counts(versions, mask),
        siblings=[row for row in rows if row.group == rows[index].group],
        branches=_branches(root["trajectory"], index),
    )


def load_tokenizer(run_dir: Path, model: str | None) -> Tokenizer | None:
    """The tokenizer of the run's model folder; None if it is not on this machine."""
    for base in (Path(), run_dir, run_dir.parent.parent) if model else ():
        file = base / str(model) / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_file(str(file))
    return None


def _branches(table: Any, index: int) -> list[tuple[int, int | None, int]]:
    """Those of the episode of the trajectory in this row."""
    ids = table["id"][...].tolist()
    if "episode" not in table:
        return [(ids[index], None, 0)]
    columns = [table[name][...].tolist() for name in ("episode", "parent", "fork_offset")]
    rows = zip(ids, *columns, strict=True)
    own = columns[0][index]
    return [(id, parent if parent >= 0 else None, kept) for id, episode, parent, kept in rows if episode == own]


@lru_cache(maxsize=4 * NEWEST_PARTS)
def _part_rows(path: Path, _written_ns: int) -> tuple[Row, ...]:
    columns = ("id", "group", "num_segments", "reward", "stop")
    trajectory = read_table(path, "trajectory", columns)
    group = read_table(path, "group", ("prompt_id", "size"))
    segment = read_table(path, "segment", ("policy_version", "length"))
    bounds = np.cumsum(trajectory["num_segments"])[:-1]
    versions = np.split(segment["policy_version"], bounds)
    generated = np.split(np.where(segment["policy_version"] >= 0, segment["length"], 0), bounds)
    prompts = [str(p) for p, size in zip(group["prompt_id"], group["size"], strict=True) for _ in range(size)]
    rows = []
    for i, prompt_id in enumerate(prompts):
        used = np.unique(versions[i][versions[i] >= 0])
        row = Row(
            iteration=part_iteration(path),
            trajectory=int(trajectory["id"][i]),
            group=int(trajectory["group"][i]),
            prompt_id=prompt_id,
            reward=float(trajectory["reward"][i]),
            length=int(generated[i].sum()),
            first_version=int(used[0]) if len(used) else -1,
            last_version=int(used[-1]) if len(used) else -1,
            versions=len(used),
            stop=STOP_NAMES.get(Stop(int(trajectory["stop"][i])), "?"),
        )
        rows.append(row)
    return tuple(rows)


def _matches(row: Row, wanted: Filter) -> bool:
    return (
        _between(wanted.reward_min, row.reward, wanted.reward_max)
        and row.length >= wanted.length_min
        and (row.versions >= 2 or not wanted.multi_version)
    )


def _between(low: float, value: float | None, high: float) -> bool:
    """Whether a value is within bounds; none is within open ones alone."""
    return low <= value <= high if value is not None else (low, high) == (-math.inf, math.inf)


def texts(ids: list[int], tokenizer: Tokenizer | None) -> Iterator[str]:
    """The text that each token adds; a token that only begins a character adds none yet."""
    if tokenizer is None:
        yield from (f"{token} " for token in ids)
        return
    stream = DecodeStream(skip_special_tokens=False)
    for token in ids:
        yield stream.step(tokenizer, token) or ""


def make_token(
    text: str, token: int, logprob: float, mask: int, version: int, starts: bool, in_prompt: bool, *, live: bool = False
) -> Token:
    """A token as shown; one of a live trajectory has not been trained yet, whatever its mask."""
    generated, trained = bool(mask & Mask.GENERATED), bool(mask & Mask.TRAINED) or live
    if not generated:
        hint = f"{'prompt' if in_prompt else 'observed'}, id {token}"
    else:
        reasons = ", ".join(reason for flag, reason in _MASK_REASONS if mask & flag) or "masked"
        use = "not trained yet" if live else "trained" if trained else reasons
        hint = f"version {version}, logprob {logprob:.4f}, {use}, id {token}"
    return Token(
        text=text, generated=generated, trained=trained, starts_segment=bool(starts), version=int(version), hint=hint
    )


def version_counts(versions: Any, mask: Any) -> list[tuple[int, int, int]]:
    """Policy versions with their tokens, and those of them with a gradient."""
    generated, trained = (mask & Mask.GENERATED) != 0, (mask & Mask.TRAINED) != 0
    return [
        (int(version), int(np.sum(generated & (versions == version))), int(np.sum(trained & (versions == version))))
        for version in np.unique(versions[generated])
    ]
