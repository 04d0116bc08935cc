"""The read side of the trajectory store: nothing here changes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from pmdflow import _rust_buffer
from pmdflow.store import columns
from pmdflow.store.answers import BatchBuffers, EvalResult, GroupState, StoredTrajectory, Successes, TrajectoryState
from pmdflow.store.columns import Extras
from pmdflow.store.metadata import unpack_metadata
from pmdflow.types import (
    Branches,
    Claim,
    ClaimPlan,
    ClaimTokens,
    Counts,
    Int32,
    Int64,
    LeaseKind,
    Stop,
    TrainBatch,
    TurnRow,
)

PAGE_ROWS = 1024
"""Trajectories that a query reads in one call."""

PAGE_GROUPS = 64
"""Groups likewise, with their prompts."""

PAUSE_S = 5e-5
"""Between pages: a thread that waits for the interpreter, with an append perhaps, would otherwise rarely get it, since
whoever lets go of it for a moment is the first to take it again."""

_ROW_DTYPES = {
    "cu_seqlens": "<i8",
    "prompt_lengths": "<i4",
    "groups": "<i8",
    "trajectories": "<i8",
    "rewards": "<f8",
    "stops": "|u1",
}
_SEGMENT_DTYPES = {
    "segment_offsets": "<i8",
    "segment_lengths": "<i8",
    "segment_versions": "<i4",
    "segment_temperatures": "<f4",
    "segment_masks": "|u1",
}


class StoreView:
    """What can be seen of a store; `TrajectoryStore` adds the changes."""

    _native: _rust_buffer.TrajectoryStore

    def read_claim(self, iteration: int, *, out: BatchBuffers | None = None, check: bool = True) -> TrainBatch:
        """The groups of a claim, packed; members whose scoring failed for good are left out.

        Args:
            iteration: Of the claim.
            out: Filled and referred to by the answer; nobody else may touch them during the call.
            check: Test the checksum of every token array.

        Raises:
            Conflict: the iteration has no claim, or `out` is too small for it.
            CorruptLog: bytes of it are not those that were written; names file and offset.
        """
        plan = self.plan(iteration)
        buffers = BatchBuffers.allocate(self._native.claim_tokens(iteration)) if out is None else out
        names = [field.name for field in fields(BatchBuffers)]
        views = {name: getattr(buffers, name).view(np.uint8) for name in names}
        row = self._native.read_claim(iteration, **views, check=check)
        arrays = {name: np.frombuffer(row.pop(name), dtype=dtype) for name, dtype in _ROW_DTYPES.items()}
        arrays |= {name: getattr(buffers, name)[: arrays["cu_seqlens"][-1]] for name in names}
        extras = self._extras(arrays) if row.pop("columns") else {}
        return TrainBatch(**row | arrays | _named(row) | extras, plan=plan)

    def plan(self, iteration: int) -> ClaimPlan | None:
        """How a claim is dealt to optimizer steps; None where that is not recorded.

        Raises:
            Conflict: the iteration has no claim.
        """
        row = self._native.plan(iteration)
        return None if row is None else ClaimPlan(**row | {"steps": np.array(row["steps"], np.int32)})

    def read_rows(self, iteration: int) -> Claim:
        """A claim without its tokens, which `read_tokens` gives; its masks are those of now, and no file is read.

        Raises:
            Conflict: the iteration has no claim.
        """
        row = self._native.claim_rows(iteration)
        del row["columns"]
        arrays = {
            name: np.frombuffer(row.pop(name), dtype=dtype) for name, dtype in (_ROW_DTYPES | _SEGMENT_DTYPES).items()
        }
        return Claim(**row | arrays | _named(row), plan=self.plan(iteration))

    def _extras(self, arrays: Mapping[str, Any]) -> dict[str, dict[str, columns.Column]]:
        """The extra columns of a claim, whose rows are `arrays`."""
        stored = self._native.read_extras(arrays["trajectories"].tolist())
        extras, starts = [Extras.of(own) for own in stored], arrays["cu_seqlens"]
        return {
            "extra": columns.per_token(extras, starts[:-1] + arrays["prompt_lengths"], int(starts[-1])),
            "trajectory_extra": columns.whole(extras),
        }

    def count_tokens(self, trajectories: Sequence[int] | Int64) -> int:
        """Tokens of live trajectories, prompts included: what `read_tokens` needs room for.

        Raises:
            Conflict: one of them is not in the store.
        """
        return sum(self._native.token_counts([int(number) for number in trajectories]))

    def read_tokens(
        self, trajectories: Sequence[int] | Int64, *, out: ClaimTokens | None = None, check: bool = True
    ) -> ClaimTokens:
        """Prompt and tokens of live trajectories, of a claim or not, packed in the order of their ids here.

        Args:
            trajectories: Their ids.
            out: Filled, and the answer is of views of it; nobody else may touch it during the call.
            check: Test the checksum of every token array.

        Raises:
            Conflict: one of them is not in the store, or `out` is too small for them.
            CorruptLog: bytes of them are not those that were written; names file and offset.
        """
        ids, total = [int(number) for number in trajectories], self.count_tokens(trajectories)
        if out is None:
            out = ClaimTokens(tokens=np.empty(total, np.int32), logprobs=np.empty(total, np.float32))
        views: dict[str, Any] = {name: getattr(out, name).view(np.uint8) for name in ("tokens", "logprobs")}
        self._native.read_tokens(ids, **views, check=check)
        return ClaimTokens(tokens=out.tokens[:total], logprobs=out.logprobs[:total])

    def read_columns(
        self, trajectories: Sequence[int] | Int64, *, starts: Int64, total: int, names: Collection[str]
    ) -> dict[str, columns.Column]:
        """Extra columns of tokens of live trajectories, each [`total`, ...]; those that no trajectory has are left out.

        Args:
            trajectories: Their ids.
            starts: Where the tokens after the prompt of each begin.
            total: Tokens of all, prompts included.
            names: Of the columns.

        Raises:
            Conflict: a trajectory is not in the store, or values of one name have different shapes.
        """
        stored = self._native.read_extras([int(number) for number in trajectories])
        wanted = [{name: pieces for name, pieces in own.items() if name in names} for own in stored]
        return columns.per_token([Extras.of(own) for own in wanted], starts, total)

    def eval_results(self, prefix: str, timeout_s: float) -> list[EvalResult] | None:
        """Results of the evaluation groups whose request ids start with `prefix`; None if some are missing in time."""
        rows = self._native.eval_results(prefix, timeout_s)
        return None if rows is None else [EvalResult(**row | {"stop": Stop(row["stop"])}) for row in rows]

    def groups(self, state: GroupState | None = None) -> Iterator[dict[str, Any]]:
        """Live groups in the order of their ids with their prompts' metadata and text, read lazily, page by page.

        Each page shows the store as it is then: a group admitted meanwhile comes at the end, one that is gone before
        its page is read does not come, and `state` is that of then.

        Keys: group, request_id, prompt_id, kind, state, iteration, trajectories, cursor, priority, max_tokens,
        prompt_length, tokens (those of late members excepted), metadata, text (None: recorded before texts were kept);
        and scored, failed, late: how many members.
        """
        for row in _pages(lambda after: self._native.groups(state, after, PAGE_GROUPS)):
            yield row | {"metadata": unpack_metadata(row["metadata"])}

    def query(
        self,
        *,
        iteration: int | None = None,
        version: tuple[int | None, int | None] = (None, None),
        reward: tuple[float | None, float | None] = (None, None),
        length: tuple[int | None, int | None] = (None, None),
        stop: Stop | None = None,
        prompt_id: str | None = None,
        group: int | None = None,
        kind: LeaseKind | None = None,
        state: TrajectoryState | GroupState | None = None,
    ) -> Iterator[StoredTrajectory]:
        """Live trajectories in the order of their ids, read lazily: each page shows the store as it is then.

        Args:
            iteration: The one that claimed them.
            version: Inclusive bounds, None for open; some token is of a version within them.
            reward: Likewise; selects only trajectories with a reward if one is set.
            length: Likewise, of the number of generated tokens.
            stop: Why it ended; `Stop.NONE` selects those that did not.
            prompt_id: Its prompt's.
            group: Its group's.
            kind: Training or evaluation.
            state: Its own or its group's.

        Raises:
            ValueError: an unknown `kind` or `state`.
        """
        select = partial(
            self._native.select,
            limit=PAGE_ROWS,
            iteration=iteration,
            version=version,
            reward=reward,
            length=length,
            stop=stop,
            prompt_id=prompt_id,
            group=group,
            kind=kind,
            state=state,
        )
        for row in _pages(select):
            yield StoredTrajectory(**row | {"stop": Stop(row["stop"])})

    def claims(self) -> dict[int, str]:
        """State of every claim that is not evicted: `claimed`, `trained` or `committed`."""
        return self._native.claims()

    def claim_lsn(self, iteration: int) -> int:
        """Log position of the record of a claim, which no other claim of the iteration has.

        Raises:
            Conflict: the iteration has no claim.
        """
        return self._native.claim_lsn(iteration)

    def trajectory(self, trajectory: int) -> dict[str, Any]:
        """One live trajectory with its arrays.

        Keys: trajectory, group, state (a `TrajectoryState`), prompt int32 [P], tokens int32 [S], logprobs float32 [S],
        observed uint8 [S], segments [(length, version, temperature, observed)], reward, components, stop, attempts,
        epoch, extra {name: [(offset, length, values)] of tokens, or the values of the trajectory}, forks [(branch,
        start, offset)]: where branches of the episode begin among its tokens, and how many each keeps of the history
        before it.

        Raises:
            Conflict: it is not in the store.
        """
        return self.trajectories([trajectory])[0]

    def trajectories(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Live trajectories by id, each as `trajectory` gives it; what many of them lie in is read once.

        Raises:
            Conflict: one of them is not in the store.
        """
        return [_trajectory(row) for row in self._native.trajectories([int(number) for number in numbers])]

    def counts(self) -> Counts:
        """Live numbers."""
        return Counts(**self._native.counts())

    def ledger(self) -> dict[str, int]:
        """Durable generated training tokens, each in one place; `generated` is their sum.

        Outside the sum: `prompt` (prompt tokens, once for each trajectory), `observed`, `reprefill`, `eval` and
        `overdraft` (appended beyond the grant).
        """
        return self._native.ledger()

    def in_flight(self) -> dict[int, int]:
        """Trajectories that are not complete, evaluation too, by the version that may extend them (`one_version`).

        One without a token counts for the version of its lease, or for the newest.
        """
        return self._native.in_flight()

    def versions_spent(self) -> dict[int, int]:
        """Durable training tokens by policy version, for the versions that still have a quota."""
        return self._native.versions_spent()

    def successes(self, after: int | None = None) -> Successes:
        """Rates of success by key: what moved since those of number `after`, or all where more lies between."""
        number, keys, rates = self._native.successes(after)
        return Successes(number=number, keys=np.frombuffer(keys, np.uint64), rates=np.frombuffer(rates, np.float64))

    def close(self) -> None:
        """Sync, wake every waiter with `StoreError` and release the lock. Safe to repeat."""
        self._native.close()


def _trajectory(row: dict[str, Any]) -> dict[str, Any]:
    own = Extras.of(row["extra"])
    arrays = {
        "prompt": int32(row["prompt"]),
        "tokens": int32(row["tokens"]),
        "logprobs": np.frombuffer(row["logprobs"], dtype="<f4"),
        "observed": np.frombuffer(row["observed"], np.uint8),
    }
    return row | arrays | {"stop": Stop(row["stop"]), "extra": {**own.per_token, **own.whole}}


def _pages(read: Callable[[int | None], tuple[list[dict[str, Any]], int | None]]) -> Iterator[dict[str, Any]]:
    """The rows of all pages; `read` gives those after an id, and the id after which the next ones come."""
    page, after = read(None)
    while after is not None:
        yield from page
        time.sleep(PAUSE_S)
        page, after = read(after)
    yield from page


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    components = {name: np.frombuffer(data, dtype="<f8") for name, data in row["components"].items()}
    branches = None if row["branches"] is None else _branches(row["branches"])
    turns = [(int(index), offset, rewards, key) for index, offset, rewards, key in row["turns"]]
    return {
        "components": components,
        "prompt_ids": tuple(row["prompt_ids"]),
        "branches": branches,
        "turns": turns if branches is None else _unforked(turns, branches),
    }


def _unforked(turns: Sequence[TurnRow], branches: Branches) -> list[TurnRow]:
    """Those of episodes of one branch: of others a note does not say where in which branch it was made."""
    _, number, sizes = np.unique(branches.episodes, return_inverse=True, return_counts=True)
    return [turn for turn in turns if sizes[number.reshape(-1)[turn[0]]] == 1]


def _branches(row: Mapping[str, bytes]) -> Branches:
    return Branches(
        episodes=np.frombuffer(row["episodes"], "<i8"),
        parents=np.frombuffer(row["parents"], "<i8"),
        fork_offsets=int32(row["fork_offsets"]),
    )


def int32(data: bytes) -> Int32:
    """A view of little-endian bytes."""
    return np.frombuffer(data, dtype="<i4")
