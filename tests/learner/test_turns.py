"""What environments say of turns, as the learner sees it: states and rewards of the turns of a claim."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pmdflow.learner.batch import pack
from pmdflow.learner.methods.gigpo import GIGPO
from pmdflow.learner.turns import notes_of, turn_keys, turn_rewards
from pmdflow.learner.view import ClaimView
from pmdflow.store import TrajectoryStore
from pmdflow.types import Mask, Prompt, Quota, Segment

TOKENS = np.array([5, 6, 70, 1, 2, 80, 81, 3, 80, 81, 4], np.int32)
"""A prompt of two, what `reset` said, and three turns, the last two of which answer the same words."""
GENERATED = np.array([3, 4, 7, 10])
NOTES: Any = [(0, 0, {}, "a"), (0, 3, {"reward": 0.5, "m": 9.0}, "b"), (0, 6, {}, None), (0, 9, {"reward": 1.0}, "c")]


LEARNER: Any = SimpleNamespace(settings={"gamma": 0.95, "weight": 1.0})


def test_a_state_is_what_was_noted_and_else_what_was_said() -> None:
    keys = turn_keys(TOKENS, 0, GENERATED, said=2, notes=NOTES)
    said = turn_keys(TOKENS, 0, GENERATED)
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3
    assert said[2] == said[3] == keys[3] != keys[2], "the third turn has no key"
    again = turn_keys(np.append(TOKENS[:2], TOKENS), 2, GENERATED + 2, said=4, notes=NOTES)
    assert (again == keys).all(), "a state is known again wherever it is"


def test_a_turn_has_the_reward_that_answered_it() -> None:
    assert turn_rewards(GENERATED, said=2, notes=NOTES).tolist() == [0.5, 0.5, 0.0, 1.0]
    assert turn_rewards(GENERATED[:0], said=2, notes=NOTES).tolist() == []
    assert [note[0] for note in notes_of([(0, 0, {}, "a"), (2, 0, {}, "b"), (2, 4, {}, "c")], 2)] == [2, 2]


def test_gigpo_takes_the_turns_own_rewards() -> None:
    arrays = {"turns": np.array([0, 0, 0, 0]), "turn_keys": np.zeros(4, np.int64), "trained": np.ones(4, bool)}
    arrays |= {"tokens": np.zeros(4, np.int64), "turn_rewards": np.array([2.0, 0.0, 0.0, 0.0])}
    view = ClaimView.of_rewards([0.0, 0.0, 1.0, 0.0], [0, 0, 0, 0], per_token=arrays)
    credit = GIGPO.credit(view, LEARNER, {})
    returns = np.array([2.0, 0.0, 1.0, 0.0])
    episode = np.array([0.0, 0.0, 1.0, 0.0])
    assert credit.values == pytest.approx(episode - episode.mean() + returns - returns.mean())


def test_notes_reach_a_claim_and_a_microbatch() -> None:
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=None)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=99, tokens_per_segment=None))
    prompt = Prompt(id="p", text="", tokens=TOKENS[:2])
    store.admit("p", prompt, cursor=0, group_size=2, max_tokens=20)
    for lease in store.lease("w", 0, 2, 0.0):
        runs = [(TOKENS[2:3], True), (TOKENS[3:5], False), (TOKENS[5:7], True), (TOKENS[7:8], False)]
        at, number = 0, 0
        for tokens, observed in runs:
            if observed:
                note = NOTES[number]
                assert not store.turn(lease.trajectory, lease.epoch, number, note[2], note[3])
                number += 1
            store.append([_segment(lease, at, tokens, observed)])
            at += len(tokens)
        again = NOTES[0]
        assert not store.turn(lease.trajectory, lease.epoch, 0, again[2], again[3]), "a repeat, late"
        store.append([_segment(lease, at, TOKENS[:0], False, stop="stop")])
    for item in store.unscored(9, 9.0, 0.0):
        store.score(item.trajectory, item.attempt, "scored", 1.0)
    assert store.claim(1, 0, 0.0).status == "claimed"
    claim, batch = store.read_rows(1), store.read_claim(1)
    assert claim.turns == batch.turns == [(row, *note[1:]) for row in (0, 1) for note in NOTES[:2]]
    micro = pack(batch, trained=(batch.mask & Mask.TRAINED) != 0, trajectories=(1, 0))
    assert micro.turn_rewards.tolist() == [0.5, 0.5, 0.0] * 2
    assert micro.turn_keys.tolist() == turn_keys(TOKENS, 0, GENERATED[:3], said=2, notes=NOTES).tolist() * 2
    store.close()


def _segment(lease: Any, at: int, tokens: Any, observed: bool, stop: Any = None) -> Segment:
    return Segment(
        trajectory=lease.trajectory, epoch=lease.epoch, offset=at, version=0, temperature=1.0, tokens=tokens,
        logprobs=np.full(0 if observed else len(tokens), -1.0, np.float32), next_version=0, stop=stop,
        observed=observed,
    )  # fmt: skip
