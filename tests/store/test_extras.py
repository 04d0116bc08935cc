"""Extra columns: what a user keeps beside tokens comes back with claim, trajectory, archive and replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from pmdflow.replay.claims import claim_to_train
from pmdflow.store import Conflict, TrajectoryStore, encode_segments
from pmdflow.store.archive import read_part, write_part
from tests.support.filled_store import PROMPT, admit, lease_all, ready_store, score_all, segment

TOKENS, LOGPROBS, REWARDS = [[3, 4, 5], [6]], [[-0.5, -0.25, 0.0], [-1.0]], [1.0, 0.0]
EXPERTS = [np.arange(6, dtype=np.int16).reshape(3, 2), np.array([[7, 8]], np.int16)]
EXTRA: list[dict[str, Any]] = [
    {"experts": EXPERTS[0], "reference": np.array([-1.0, -2.0, -3.0], np.float32)},
    {"experts": EXPERTS[1]},
]
VALUES: list[dict[str, Any]] = [{"difficulty": 0.75, "plane": [[1, 2], [3, 4]]}, {"plane": [[5, 6], [7, 8]]}]


def filled(path: Path | None) -> TrajectoryStore:
    store = TrajectoryStore(path, groups_per_iteration=2, lookahead=0, max_staleness=None)
    store.put_group(
        PROMPT, TOKENS, LOGPROBS, REWARDS, extra=EXTRA, trajectory_extra=VALUES, request_id="with", temperature=0.5
    )
    store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS)
    assert store.claim(1, 0, timeout_s=0.0).status == "claimed"
    return store


def test_they_are_in_the_claim_of_a_store_that_was_opened_again(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with TrajectoryStore.read(tmp_path) as store:
        batch = store.read_claim(1)
    assert batch.extra.keys() == {"experts", "reference"}
    experts, reference = batch.extra["experts"], batch.extra["reference"]
    assert (experts.shape, experts.dtype, reference.shape) == ((len(batch.tokens), 2), np.int16, (len(batch.tokens),))
    np.testing.assert_array_equal(experts[3:6], EXPERTS[0])
    np.testing.assert_array_equal(experts[9:10], EXPERTS[1])
    assert not experts[[0, 1, 2, 6, 7, 8]].any() and not experts[10:].any(), "0 where a token has none"
    np.testing.assert_array_equal(reference[:7], [np.nan] * 3 + [-1.0, -2.0, -3.0] + [np.nan])
    np.testing.assert_array_equal(batch.trajectory_extra["difficulty"], [0.75, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(batch.trajectory_extra["plane"][:2], [VALUES[0]["plane"], VALUES[1]["plane"]])
    assert batch.trajectory_extra["plane"].shape == (4, 2, 2)


def test_columns_are_read_for_some_trajectories() -> None:
    store = filled(None)
    batch = store.read_claim(1)
    rows = np.array([1, 0])
    lengths = np.diff(batch.cu_seqlens)[rows]
    starts = np.cumsum(lengths) - lengths + batch.prompt_lengths[rows]
    ids, total = batch.trajectories[rows], int(lengths.sum())
    found = store.read_columns(ids, starts=starts, total=total, names=["experts"])
    assert found.keys() == {"experts"}
    expected = np.concatenate([batch.extra["experts"][slice(*batch.cu_seqlens[row : row + 2])] for row in rows])
    np.testing.assert_array_equal(found["experts"], expected)
    assert store.read_columns(ids, starts=starts, total=total, names=["nobody"]) == {}


def test_the_archive_keeps_them_and_a_replay_reads_them(tmp_path: Path) -> None:
    batch = filled(tmp_path / "store").read_claim(1)
    path = write_part(tmp_path, batch, attrs={})
    for found in (read_part(path), claim_to_train(path, anew=None)):
        for kept, given in ((found.extra, batch.extra), (found.trajectory_extra, batch.trajectory_extra)):
            assert kept.keys() == given.keys()
            for name in given:
                np.testing.assert_array_equal(kept[name], given[name], strict=True)
    with xarray.open_datatree(path, engine="zarr", consolidated=False) as tree:
        assert tree["token_extra"]["experts"].dims == ("token", "experts_1")
        assert tree["trajectory_extra"]["plane"].dims == ("trajectory", "plane_1", "plane_2")


def test_a_trajectory_shows_its_own_and_fragments_keep_theirs() -> None:
    store = ready_store()
    admit(store)
    first, second = lease_all(store)
    for offset in (0, 2):
        piece = segment(first, 2, offset=offset, stop="stop" if offset else None)
        store.append(encode_segments([piece], extra=[{"place": [[offset], [offset + 1]]}]))
    store.append([segment(second, 1, stop="stop")])
    score_all(store)
    shown = store.trajectory(first.trajectory)["extra"]["place"]
    assert [(offset, length, values.tolist()) for offset, length, values in shown] == [
        (0, 2, [[0], [1]]),
        (2, 2, [[2], [3]]),
    ]
    assert store.claim(1, 0, timeout_s=0.0).status == "claimed"
    assert store.read_claim(1).extra["place"][:8].ravel().tolist() == [0, 0, 0, 0, 1, 2, 3, 0]


def test_a_repeat_compares_them() -> None:
    with filled(None) as store:
        put: dict[str, Any] = {"request_id": "with", "temperature": 0.5, "trajectory_extra": VALUES}
        store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS, extra=EXTRA, **put)
        with pytest.raises(Conflict, match="other extra columns"):
            store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS, **put)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a/b": [1, 2, 3]}, "cannot have the name 'a/b'"),
        ({"": [1, 2, 3]}, "cannot have the name ''"),
        ({"zarr.json": [1, 2, 3]}, "cannot have the name 'zarr.json'"),
        ({"a" * 201: [1, 2, 3]}, "cannot have the name 'a*'; .* at most 200 bytes"),
        ({"short": [1, 2]}, r"column 'short' has shape \(2,\) for 3 tokens"),
        ({"scalar": 1}, r"column 'scalar' has shape \(\) for 3 tokens"),
        ({"words": ["a", "b", "c"]}, "column 'words' is 3 values of type <U1"),
        ({"none": np.zeros((3, 0))}, "column 'none' is 0 values"),
    ],
)
def test_what_is_no_column_is_refused_before_anything_is_written(extra: dict[str, Any], message: str) -> None:
    with TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None) as store:
        with pytest.raises(ValueError, match=message):
            store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS, extra=[extra, {}])
        assert store.counts().lsn == 0


def test_shapes_that_differ_name_the_column() -> None:
    with TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None) as store:
        store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS, trajectory_extra=[{"odd": [1, 2]}, {"odd": [1, 2, 3]}])
        store.claim(1, 0, timeout_s=0.0)
        with pytest.raises(Conflict, match=r"'odd' has values of shapes \[\(2,\), \(3,\)\]"):
            store.read_claim(1)


@pytest.mark.parametrize(
    ("first", "second", "types"),
    [(2**63 + 1, 5, "'int64', 'uint64'"), (2**60 + 1, 0.5, "'float64', 'int64'")],
)
def test_whole_numbers_that_only_a_float_could_hold_together_are_refused(first: int, second: float, types: str) -> None:
    with TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None) as store:
        store.put_group(PROMPT, TOKENS, LOGPROBS, REWARDS, trajectory_extra=[{"hash": first}, {"hash": second}])
        store.claim(1, 0, timeout_s=0.0)
        with pytest.raises(Conflict, match=rf"'hash' has values of types \[{types}\] in one claim"):
            store.read_claim(1)


def test_a_name_is_of_tokens_or_of_trajectories() -> None:
    store = ready_store()
    admit(store)
    (lease, _) = lease_all(store)
    with pytest.raises(ValueError, match=r"\['x'\] in both"):
        encode_segments([segment(lease, 1)], extra=[{"x": [1]}], trajectory_extra=[{"x": 1}])
