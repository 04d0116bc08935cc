"""What the lines of `crash_child.py` promise, and whether a reopened store keeps it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pmdflow.metrics.ledger import OUTSIDE_SUM
from pmdflow.store import TrajectoryStore
from pmdflow.types import Segment, Stop
from tests.support.crash_child import (
    GROUP_SIZE,
    LOADS,
    logprobs_of,
    outcome_of,
    prompt_of,
    tokens_of,
)

Row = tuple[int, int, int, int, int, str | None]
"""Trajectory, epoch, offset, count, version, stop of one appended segment."""


@dataclass(slots=True)
class Known:
    """What is known of one trajectory."""

    versions: list[int] = field(default_factory=list)
    """Of each token."""
    complete: bool = False
    epoch: int = 0
    attempts: int = 0
    scored: bool = False
    last: Row | None = None

    def add(self, row: Row, max_tokens: int) -> None:
        _, _, offset, count, version, stop = row
        assert offset == len(self.versions), "an append was acknowledged that does not continue the one before"
        self.versions += [version] * count
        self.complete = stop == "stop" or len(self.versions) == max_tokens
        self.last = row

    def judge(self, trajectory: int, attempt: int) -> None:
        self.attempts = max(self.attempts, attempt + 1)
        self.scored = outcome_of(trajectory, attempt)[0] != "infra_failure"


@dataclass(slots=True)
class Model:
    """The acknowledged history, over all lives in one directory; `under way` calls may have happened or not."""

    load: str
    trajectories: dict[int, Known] = field(default_factory=dict)
    appending: dict[str, list[Row]] = field(default_factory=dict)
    scoring: set[tuple[int, int]] = field(default_factory=set)
    admitted: dict[int, int] = field(default_factory=dict)
    admitting: set[int] = field(default_factory=set)
    claims: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    published: tuple[int, int | None] | None = None
    consumed: dict[int, int] = field(default_factory=dict)
    """Iteration of the checkpoint's history that trained a group."""
    checkpoint: int = -1
    committed: int = -1
    evicting: int = -1
    evicted: int = -1
    undoing: bool = False
    """A life began and did not yet say which claims it has undone."""
    lsn: int = 0
    lines: Counter[str] = field(default_factory=Counter)

    @property
    def max_tokens(self) -> int:
        """Of each trajectory."""
        return LOADS[self.load].max_tokens

    def hear(self, kind: str, *line: Any) -> None:
        """Take in one line of the child."""
        self.lines[kind] += 1
        getattr(self, f"_hear_{kind}")(*line)

    def _hear_error(self, trace: str) -> None:
        raise AssertionError(f"the child failed:\n{trace}")

    def _hear_opening(self) -> None:
        self.undoing = True

    def _hear_open(self, lsn: int) -> None:
        assert lsn >= self.lsn

    def _hear_uncommitted(self, iterations: list[int]) -> None:
        assert all(iteration > self.checkpoint for iteration in iterations)
        self._forget_undone(set(self.claims))

    def _forget_undone(self, iterations: set[int]) -> None:
        self.undoing = False
        self.claims = {i: claim for i, claim in self.claims.items() if i <= self.checkpoint or i not in iterations}

    def _hear_leased(self, rows: list[tuple[int, int]]) -> None:
        for trajectory, epoch in rows:
            known = self.trajectories.setdefault(trajectory, Known())
            assert epoch > known.epoch, "an epoch was given out twice"
            known.epoch = epoch

    def _hear_appending(self, number: str, rows: list[Row]) -> None:
        self.appending[number] = rows

    def _hear_appended(self, lsn: int, sent: list[tuple[str, list[bool]]]) -> None:
        self.lsn = max(self.lsn, lsn)
        for number, stale in sent:
            assert not any(stale), "a lease was fenced that nobody took"
            self._add(number)

    def _add(self, number: str) -> None:
        """A batch is there, and so is whatever of its trajectories was under way before it."""
        for row in self.appending.pop(number, []):
            for earlier, batch in list(self.appending.items()):
                if any(trajectory == row[0] and offset < row[2] for trajectory, _, offset, *_ in batch):
                    self._add(earlier)
            self.trajectories[row[0]].add(row, self.max_tokens)

    def _hear_scoring(self, trajectory: int, attempt: int) -> None:
        self.scoring.add((trajectory, attempt))

    def _hear_scored(self, trajectory: int, attempt: int) -> None:
        self.scoring.discard((trajectory, attempt))
        self.trajectories[trajectory].judge(trajectory, attempt)

    def _hear_admitting(self, number: int) -> None:
        self.admitting = {number}

    def _hear_admitted(self, number: int, group: int) -> None:
        self.admitting.clear()
        self.admitted[number] = group

    def _hear_claimed(self, iteration: int, version: int, groups: list[int]) -> None:
        assert not self.consumed.keys() & set(groups), "a group was trained and is claimed again"
        self.claims[iteration] = (version, groups)

    def _hear_publishing(self, version: int, iteration: int | None) -> None:
        assert self.published is None or version > self.published[0], "a version was published twice"

    def _hear_published(self, version: int, iteration: int | None) -> None:
        self.published = (version, iteration)

    def _hear_checkpoint(self, iteration: int) -> None:
        self.checkpoint = iteration
        for number, (_, groups) in self.claims.items():
            for group in groups:
                assert self.consumed.setdefault(group, number) == number, f"group {group} was committed twice"

    def _hear_committed(self, iteration: int) -> None:
        self.committed = iteration

    def _hear_evicting(self, iteration: int) -> None:
        self.evicting = iteration

    def _hear_evicted(self, iteration: int) -> None:
        self.evicted = iteration

    def verify(self, store: TrajectoryStore) -> None:
        """Compare a store opened after the kill with the promises; what was under way is then settled."""
        counts = store.counts()
        assert counts.durable_lsn >= self.lsn
        groups = {row["group"]: row for row in store.groups()}
        self._verify_admissions(groups)
        rows = {t: store.trajectory(t) for row in groups.values() for t in row["trajectories"]}
        self._settle(rows)
        for trajectory, row in rows.items():
            self._verify_trajectory(trajectory, row)
        self._verify_claims(groups)
        self._verify_ledger(store, groups)
        self._verify_repeats(store, groups, rows)

    def _verify_admissions(self, groups: dict[int, dict[str, Any]]) -> None:
        there = {int(row["request_id"][1:]): group for group, row in groups.items()}
        for number in self.admitting & there.keys():
            self.admitted[number] = there[number]
        self.admitting.clear()
        for number, group in self.admitted.items():
            gone = self.consumed.get(group, self.evicting + 1) <= self.evicting and number not in there
            assert gone or there[number] == group, f"admission {number} is lost"
        assert there.items() <= self.admitted.items(), "a group is there that nobody admitted"

    def _settle(self, rows: dict[int, dict[str, Any]]) -> None:
        """A batch under way is there as a whole or not at all, and so are all batches of its thread before it."""
        missing: set[str] = set()
        for number, batch in list(self.appending.items()):
            # What has been evicted was whole: another thread saw the batch before the one that made it could say so.
            there = {t not in rows or len(rows[t]["tokens"]) >= offset + count for t, _, offset, count, _, _ in batch}
            assert len(there) == 1, "half of a batch is there"
            if there == {True}:
                assert number[0] not in missing, "a batch is there and one before it is not"
                self._add(number)
            else:
                missing.add(number[0])
                self.appending.pop(number)
        for trajectory, attempt in self.scoring:
            row = rows.get(trajectory)
            if row is None or row["attempts"] > attempt or row["state"] == "scored":
                self.trajectories[trajectory].judge(trajectory, attempt)
        self.scoring.clear()

    def _verify_trajectory(self, trajectory: int, row: dict[str, Any]) -> None:
        known = self.trajectories.setdefault(trajectory, Known())
        length = len(known.versions)
        number = {group: number for number, group in self.admitted.items()}[row["group"]]
        assert row["prompt"].tobytes() == prompt_of(number).tokens.tobytes()
        assert row["tokens"].tobytes() == tokens_of(trajectory, 0, length).tobytes()
        assert row["logprobs"].tobytes() == logprobs_of(trajectory, 0, length).tobytes()
        stored = [(count, version) for count, version, *_ in row["segments"]]
        assert np.array_equal(np.repeat([v for _, v in stored], [c for c, _ in stored]), known.versions)
        assert row["epoch"] >= known.epoch
        assert (row["stop"] is not Stop.NONE) is known.complete
        assert row["state"] == ("scored" if known.scored else "unscored" if known.complete else "idle")
        if known.scored:
            assert row["reward"] == outcome_of(trajectory, known.attempts - 1)[1]

    def _verify_claims(self, groups: dict[int, dict[str, Any]]) -> None:
        if self.undoing:
            claimed = {row["iteration"] for row in groups.values()}
            self._forget_undone(self.claims.keys() - claimed)
        for iteration, (_, members) in self.claims.items():
            states = {groups[group]["state"] if group in groups else "gone" for group in members}
            allowed = {"claimed", "trained"} if iteration > self.checkpoint else {"trained", "committed"}
            if iteration <= self.committed:
                allowed = {"committed"}
            if iteration <= self.evicting:
                allowed |= {"gone"}
            if iteration <= self.evicted:
                allowed = {"gone"}
            assert len(states) == 1, f"the groups of claim {iteration} went different ways: {states}"
            assert states <= allowed, f"claim {iteration} is {states}, not one of {allowed}"
        claimed = {row["iteration"] for row in groups.values()} - {None}
        new = claimed - self.claims.keys()
        assert len(new) <= 1
        assert all(iteration > max(self.claims, default=-1) for iteration in new)

    def _verify_ledger(self, store: TrajectoryStore, groups: dict[int, dict[str, Any]]) -> None:
        places: Counter[str] = Counter()
        live = {t: row["state"] for row in groups.values() for t in row["trajectories"]}
        for trajectory, known in self.trajectories.items():
            state = live.get(trajectory, "committed")
            place = {"committed": "trained", "partial": "waiting_group"}.get(state, state)
            if state == "partial" and not known.scored:
                place = "unscored" if known.complete else "partial_idle"
            places[place] += len(known.versions)
        ledger = {name: count for name, count in store.ledger().items() if name not in OUTSIDE_SUM}
        assert ledger.pop("generated") == sum(places.values())
        assert {name: count for name, count in ledger.items() if count} == +places

    def _verify_repeats(
        self, store: TrajectoryStore, groups: dict[int, dict[str, Any]], rows: dict[int, dict[str, Any]]
    ) -> None:
        """Every call that was answered, called again: the first answer, and nothing changes."""

        def snapshot() -> tuple[Any, ...]:
            members = [store.trajectory(trajectory) for trajectory in rows]
            states = [(row["epoch"], row["attempts"], row["state"], len(row["tokens"])) for row in members]
            return store.ledger(), list(store.groups()), states

        before = snapshot()
        for number, group in self.admitted.items():
            if group in groups:
                prompt = prompt_of(number)
                again = store.admit(
                    f"r{number}", prompt, group_size=GROUP_SIZE, max_tokens=self.max_tokens, cursor=number
                )
                assert again == group
        for trajectory, row in rows.items():
            known = self.trajectories[trajectory]
            if known.last is not None and known.last[5] is not None and known.last[1] == row["epoch"]:
                _, [grant] = store.append([_segment(known.last)])
                assert not grant.stale
            for attempt in range(known.attempts):
                store.score(trajectory, attempt, *outcome_of(trajectory, attempt))
        for iteration, (version, members) in self.claims.items():
            if iteration > self.evicting:
                assert list(store.claim(iteration, version, 0.0).groups) == members
        if self.published is not None and self.published[1] in {None, *self.claims}:
            store.publish(*self.published)
        if self.committed >= 0:
            store.commit(self.committed)
        if self.evicted >= 0:
            assert store.evict(self.evicted) == 0
        assert snapshot() == before


def _segment(row: Row) -> Segment:
    trajectory, epoch, offset, count, version, stop = row
    return Segment(
        trajectory=trajectory,
        epoch=epoch,
        offset=offset,
        version=version,
        temperature=1.0,
        tokens=tokens_of(trajectory, offset, count),
        logprobs=logprobs_of(trajectory, offset, count),
        next_version=version,
        stop=stop,  # type: ignore[arg-type]
    )
