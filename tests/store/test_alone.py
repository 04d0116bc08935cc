"""A store as a replay buffer: finished groups go in, claims come out; nothing is leased and nobody else is asked."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmdflow.store import Conflict, StoreError, StoreFull, TrajectoryStore
from pmdflow.types import Lease, Quota, Segment
from tests.support.filled_store import PROMPT, assert_exact, snapshot

TOKENS = [[3, 4, 5], [6]]
LOGPROBS = [[-0.5, -0.25, 0.0], [-1.0]]


def open_buffer(path: Path | None, **settings: Any) -> TrajectoryStore:
    defaults: dict[str, Any] = {"groups_per_iteration": 2, "lookahead": 0, "max_staleness": None}
    return TrajectoryStore(path, **defaults | settings)


def test_groups_go_in_and_claims_come_out(tmp_path: Path) -> None:
    with open_buffer(tmp_path) as buffer:
        first = buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], components=[{"right": 1.0}, {"short": 1.0}])
        second = buffer.put_group(PROMPT, np.array(TOKENS[:1] * 3), LOGPROBS[:1] * 3, [0.0, 0.5, 1.0], temperature=0.5)
        assert buffer.claim(1, 0, timeout_s=0.0).groups == (first, second)
    with pytest.raises(StoreError, match="closed"):
        buffer.counts()
    with open_buffer(tmp_path) as buffer:
        batch = buffer.read_claim(1)
        assert batch.rewards.tolist() == [1.0, 0.0, 0.0, 0.5, 1.0]
        assert batch.cu_seqlens.tolist() == [0, 6, 10, 16, 22, 28]
        assert batch.tokens[3:6].tolist() == TOKENS[0]
        assert batch.logprobs[3:6].tolist() == LOGPROBS[0]
        assert set(batch.temperatures[13:16].tolist()) == {0.5}
        np.testing.assert_array_equal(batch.components["right"], [1.0] + [np.nan] * 4)
        shown = buffer.trajectories(batch.trajectories[:2].tolist())
        assert [row["tokens"].tolist() for row in shown] == TOKENS
        buffer.publish(1, 1)
        third = buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])
        assert buffer.claim(2, 1, timeout_s=0.0).groups == (third,), "it does not wait for more"
        assert set(buffer.read_claim(2).versions.tolist()) == {-1, 1}
        assert assert_exact(buffer)["overdraft"] == 0


def test_a_repeat_adds_nothing(tmp_path: Path) -> None:
    with open_buffer(tmp_path) as buffer:
        put = {"request_id": "mine", "rewards": [1.0, 0.0]}
        group = buffer.put_group(PROMPT, TOKENS, LOGPROBS, **put)  # type: ignore[arg-type]
        before = buffer.counts(), list(buffer.groups())
        assert buffer.put_group(PROMPT, TOKENS, LOGPROBS, **put) == group  # type: ignore[arg-type]
        assert (buffer.counts(), list(buffer.groups())) == before


@pytest.mark.parametrize("steps", ["admitted", "leased", "appended", "scored in part"])
def test_a_call_that_was_cut_short_is_made_good_by_its_repeat(tmp_path: Path, steps: str) -> None:
    """What a killed process leaves after each step."""
    with open_buffer(tmp_path) as buffer:
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="other")
        group = buffer.admit("mine", PROMPT, group_size=2, max_tokens=3)
        if steps != "admitted":
            leases = buffer.lease_group("dead", group)
            assert len(leases) == 2
            assert buffer.lease_group("dead", group) == []
        if steps in ("appended", "scored in part"):
            buffer.append([finished(lease, number) for number, lease in enumerate(leases)])
        if steps == "scored in part":
            buffer.score(leases[0].trajectory, 0, "scored", 1.0)
    with open_buffer(tmp_path) as buffer:
        buffer.publish(1)  # what is kept already keeps its version
        assert buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="mine") == group
        assert buffer.counts().groups_ready == 2
        assert assert_exact(buffer)["ready"] == 8


def finished(lease: Lease, number: int) -> Segment:
    return Segment(
        trajectory=lease.trajectory,
        epoch=lease.epoch,
        offset=0,
        version=0,
        temperature=1.0,
        tokens=np.array(TOKENS[number], np.int32),
        logprobs=np.array(LOGPROBS[number], np.float32),
        next_version=0,
        stop="stop",
    )


def test_a_refusal_leaves_no_lease_behind() -> None:
    """Here by a worker that holds one member: once it is gone the repeat goes on at once."""
    with open_buffer(None) as buffer:
        buffer.publish(0)
        buffer.set_quota(Quota(version=0, groups=9, tokens=2, tokens_per_segment=None))
        group = buffer.admit("mine", PROMPT, group_size=2, max_tokens=3)
        (stolen,) = buffer.lease("worker", 0, 1, 0.0)
        buffer.set_quota(Quota(version=0, groups=9, tokens=0, tokens_per_segment=None))
        with pytest.raises(Conflict, match=rf"another worker holds trajectories \[{stolen.trajectory}\]"):
            buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="mine")
        assert buffer.fence("worker") == 1
        assert buffer.counts().trajectories_leased == 0
        assert buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="mine") == group
        assert buffer.counts().groups_ready == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completions": [[3, 4, 9], [6]]}, "trajectory 0 is there already and has other tokens"),
        ({"logprobs": [[-0.5, -0.25, 0.0], [-2.0]]}, "trajectory 1 is there already and has other log-probs"),
        ({"rewards": [1.0, 0.5]}, "has reward 0.0 {}, not 0.5 {}"),
        ({"components": [{"right": 1.0}, {}]}, "has reward 1.0 {}, not 1.0 {'right': 1.0}"),
        ({"temperature": 0.5}, "has temperature 1, not 0.5"),
        ({"version": 1}, "has version 0, not 1"),
    ],
)
def test_a_repeat_with_other_content_is_a_conflict(change: dict[str, Any], said: str) -> None:
    put: dict[str, Any] = {"completions": TOKENS, "logprobs": LOGPROBS, "rewards": [1.0, 0.0], "request_id": "mine"}
    with open_buffer(None) as buffer:
        group = buffer.put_group(PROMPT, **put)
        buffer.publish(1)
        assert buffer.put_group(PROMPT, **put) == group
        before = snapshot(buffer)
        with pytest.raises(Conflict, match=re.escape(said)):
            buffer.put_group(PROMPT, **put | change)
        assert snapshot(buffer) == before
        assert buffer.counts().scores_ignored == 0


def test_nobody_leases_what_is_put_in() -> None:
    with open_buffer(None, lookahead=1) as buffer:
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])
        buffer.admit("cut short", PROMPT, group_size=2, max_tokens=3)
        assert buffer.lease("worker", 0, 9, 0.0) == []
        assert buffer.claim(1, 0, 0.0).status == "claimed", "it does not wait for what was cut short"


def test_a_budget_that_is_open_to_workers_is_refused() -> None:
    with open_buffer(None) as buffer:
        buffer.publish(0)
        buffer.set_quota(Quota(version=0, groups=9, tokens=100, tokens_per_segment=None))
        before = snapshot(buffer)
        with pytest.raises(Conflict, match=r"budget of 100 tokens.*without rollout workers"):
            buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])
        assert snapshot(buffer) == before


def test_the_answer_of_a_scorer_beside_it_is_an_error() -> None:
    with open_buffer(None) as buffer, ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            for item in buffer.unscored(64, 60.0, 10.0):
                buffer.score(item.trajectory, item.attempt, "scored", 42.0)

        scorer = threads.submit(answer)
        size = 1024
        try:
            buffer.put_group(PROMPT, [[1]] * size, [[-1.0]] * size, [1.0] * size)
            said = ""
        except Conflict as error:
            said = str(error)
        scorer.result()
        wrong = [row.trajectory for row in buffer.query(reward=(42.0, 42.0))]
        assert bool(wrong) == ("has reward 42.0 {}, not 1.0 {}" in said), "never silent"


def test_members_that_the_straggler_rule_evicts_are_an_error() -> None:
    with open_buffer(None, straggler=(2, 1e-6)) as buffer, pytest.raises(Conflict, match="is late: something else"):
        buffer.put_group(PROMPT, TOKENS * 64, LOGPROBS * 64, [1.0] * 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completions": [[1, 2, 3], []]}, "attempt 1: 0 tokens"),
        ({"logprobs": [[-1.0], [-1.0]]}, "attempt 0: 3 tokens with log-probs of shape"),
        ({"logprobs": [[-1.0, np.nan, -1.0], [-1.0]]}, "attempt 0: .* finite"),
        ({"rewards": [1.0, np.inf]}, "attempt 1: .* finite"),
        ({"rewards": [1.0]}, "2 completions, 2 log-probs, 1 rewards"),
        ({"completions": [[1, 2, -3], [1]]}, "attempt 0: token id -3"),
        ({"completions": [], "logprobs": [], "rewards": []}, "0 completions"),
        ({"completions": [[[1], [2], [3]], [1]], "logprobs": [[[-1.0]] * 3, [-1.0]]}, "attempt 0: 3 tokens"),
        ({"logprobs": [[-1.0, -1e300, -1.0], [-1.0]]}, "attempt 0: .* finite"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": np.nan}, "temperature nan"),
        ({"temperature": 1e-300}, "temperature 1e-300"),
        ({"components": [{1: 0.5}, {}]}, "attempt 0: components {1: 0.5}"),
        ({"components": [{}, {"\udcff": 0.5}]}, "attempt 1: components"),
        ({"components": [None, None]}, "attempt 0: components None"),
        ({"components": [{"right": None}, {}]}, "attempt 0: reward and its components must be numbers"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(change: dict[str, Any], said: str) -> None:
    with open_buffer(None) as buffer:
        with pytest.raises(ValueError, match=said):
            buffer.put_group(PROMPT, **{"completions": TOKENS, "logprobs": LOGPROBS, "rewards": [1.0, 0.0]} | change)
        assert buffer.counts().lsn == 0


def test_limits_and_conflicts_are_the_stores() -> None:
    with open_buffer(None) as buffer:
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="mine")
        with pytest.raises(Conflict, match="other content"):
            buffer.put_group(PROMPT, TOKENS + TOKENS, LOGPROBS + LOGPROBS, [1.0] * 4, request_id="mine")
        with pytest.raises(Conflict, match="version 7 was never published"):
            buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], version=7)
    with open_buffer(None, max_bytes=64) as buffer, pytest.raises(StoreFull, match="max_bytes"):
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])


def test_a_store_that_an_earlier_version_opened_to_workers_is_closed() -> None:
    with open_buffer(None, lookahead=1) as buffer:
        buffer.publish(0)
        buffer.set_quota(Quota(version=0, groups=1 << 40, tokens=1 << 40, tokens_per_segment=None))
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])
        buffer.admit("cut short", PROMPT, group_size=2, max_tokens=3)
        assert buffer.lease("worker", 0, 9, 0.0) == []


def test_a_version_that_is_published_in_the_middle_of_a_call_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_buffer(None) as buffer:
        admit = buffer.admit

        def beside_a_publication(*given: Any, **named: Any) -> int:
            if buffer.counts().version < 3:
                buffer.publish(buffer.counts().version + 1)
            return admit(*given, **named)

        monkeypatch.setattr(buffer, "admit", beside_a_publication)
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0])
        assert buffer.claim(1, 3, timeout_s=0.0).status == "claimed"
        assert set(buffer.read_claim(1).versions.tolist()) == {-1, 3}
