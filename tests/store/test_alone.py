"""A store as a replay buffer: finished groups go in, claims come out; nothing is leased and nobody else is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmdflow.store import Conflict, StoreError, StoreFull, TrajectoryStore
from tests.support.filled_store import PROMPT, assert_exact

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
        before = buffer.counts(), buffer.groups()
        assert buffer.put_group(PROMPT, TOKENS, LOGPROBS, **put) == group  # type: ignore[arg-type]
        assert (buffer.counts(), buffer.groups()) == before


def test_a_call_that_was_cut_short_is_made_good_by_its_repeat(tmp_path: Path) -> None:
    """What a killed process leaves: the group admitted, one attempt appended in part, nothing scored."""
    with open_buffer(tmp_path) as buffer:
        buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="other")
        group = buffer.admit("mine", PROMPT, group_size=2, max_tokens=3)
        assert len(buffer.lease_group("dead", group)) == 2
        assert buffer.lease_group("dead", group) == []
    with open_buffer(tmp_path) as buffer:
        assert buffer.put_group(PROMPT, TOKENS, LOGPROBS, [1.0, 0.0], request_id="mine") == group
        assert buffer.counts().groups_ready == 2
        assert assert_exact(buffer)["ready"] == 8


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
