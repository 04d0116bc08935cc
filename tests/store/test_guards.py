"""What the typed facade refuses before it is bytes: ids that would wrap, metadata that would not come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pmdflow import _rust_buffer
from pmdflow.store import Conflict, TrajectoryStore, encode_segments
from pmdflow.types import Prompt, Quota, Segment


def leased(**metadata: Any) -> tuple[TrajectoryStore, int]:
    """A store with one leased trajectory, and its epoch."""
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=None)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=8, tokens=1000, tokens_per_segment=None))
    prompt = Prompt(id="p", text="1+1=", tokens=np.array([1]), metadata=metadata)
    store.admit("train-0", prompt, group_size=1, max_tokens=8)
    (lease,) = store.lease("worker", version=0, max_leases=1, timeout_s=0.0)
    assert lease.metadata == metadata
    return store, lease.epoch


def segment(epoch: int, tokens: Any, logprobs: Any = (-1.0, -1.0)) -> Segment:
    return Segment(
        trajectory=0, epoch=epoch, offset=0, version=0, temperature=1.0, tokens=tokens, logprobs=np.array(logprobs),
        next_version=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        (np.array([5, 2**32 + 5]), "4294967301"),
        (np.array([5, -1], dtype=np.int32), "-1"),
        (np.array([5, 2**31], dtype=np.uint32), "2147483648"),
        (np.array([5.0, 6.0]), "float64"),
    ],
)
def test_ids_that_are_no_int32_are_refused_and_never_wrapped(tokens: Any, named: str) -> None:
    store, epoch = leased()
    # What is int32 already is looked through by the store alone, as log-probs are.
    with pytest.raises((ValueError, Conflict), match=f"trajectory 0.*: .*{named}"):
        store.append([segment(epoch, tokens)])
    with pytest.raises(ValueError, match=f"prompt 'q': .*{named}"):
        store.admit("train-1", Prompt(id="q", text="", tokens=tokens), group_size=1, max_tokens=8)
    assert store.trajectory(0)["tokens"].tolist() == []
    store.append([segment(epoch, [2**31 - 1, 0])])
    assert store.trajectory(0)["tokens"].tolist() == [2**31 - 1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e300])
def test_log_probs_that_are_not_finite_are_refused(value: float) -> None:
    store, epoch = leased()
    with np.errstate(over="ignore"), pytest.raises(Conflict, match=r"trajectory 0 at offset 0: log-prob .*inf|NaN"):
        store.append(encode_segments([segment(epoch, [1, 2], [-1.0, value])]))
    assert store.ledger()["generated"] == 0


COLUMNS = {
    "objects": np.array([None, 1], object),
    "records": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "text": np.array(["a", "b"]),
    "long doubles": np.zeros(2, np.longdouble),
    "empty": np.zeros(0, np.float32),
    "one too many": np.zeros(3, np.float32),
    "one for all": np.zeros(1, np.float32),
    "rows of nothing": np.zeros((2, 0), np.float32),
    "": np.zeros(2, np.float32),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_are_no_numbers_for_each_token_are_refused(name: str) -> None:
    store, epoch = leased()
    with pytest.raises(ValueError, match=r"trajectory 0: .*column"):
        encode_segments([segment(epoch, [1, 2])], extra=[{name.replace(" ", "_"): COLUMNS[name]}])
    assert store.ledger()["generated"] == 0


def test_columns_are_refused_before_the_log_is_written_whoever_encoded_them() -> None:
    store, epoch = leased()
    whole = encode_segments([segment(epoch, [1, 2])], extra=[{"a": np.ones(2, "<f4"), "b": np.ones((2, 2), "<i2")}])
    for before, after in ((b"<f4", b"<f8"), (b"<f4", b"<O4"), (b"(2,)", b"(3,)"), (b"\xa1a", b"\xa1b")):
        assert whole.count(before) == 1
        with pytest.raises(Conflict, match="trajectory 0 at offset 0: column"):
            store.append(whole.replace(before, after))
    assert store.ledger()["generated"] == 0
    store.append(whole)
    (rows,) = store.trajectory(0)["extra"]["b"]
    assert rows[2].tolist() == [[1, 1], [1, 1]]


def test_a_repeat_compares_columns() -> None:
    store, epoch = leased()

    def append(offset: int, stop: int, column: Any) -> None:
        tokens = list(range(offset, stop))
        part = replace(segment(epoch, tokens, [-1.0] * len(tokens)), offset=offset)
        store.append(encode_segments([part], extra=[column]))

    append(0, 4, {"c": np.arange(4)})
    append(0, 4, {"c": np.arange(4)})
    append(2, 6, {"c": np.arange(2, 6)})
    refused = [
        {"c": np.array([0, 1, 2, 9, 4, 5])}, {"c": np.arange(6, dtype=np.int32)}, {"d": np.arange(6)}, {},
        {"c": np.arange(6), "d": np.arange(6)},
    ]  # fmt: skip
    for column in refused:
        with pytest.raises(Conflict, match="other content is durable there"):
            append(0, 6, column)
    append(0, 8, {"c": np.arange(8)})
    pieces = store.trajectory(0)["extra"]["c"]
    assert np.concatenate([values for _, _, values in pieces]).tolist() == list(range(8))


def test_keys_of_metadata_may_be_numbers() -> None:
    store, _ = leased(choices={1: "x", 2: ["y"]}, answer="2")
    assert next(store.groups())["metadata"] == {"choices": {1: "x", 2: ["y"]}, "answer": "2"}


@pytest.mark.parametrize("value", [object(), 2**70, {(1, 2): 3, (4, [5][0]): {(6,): {7}}}])
def test_metadata_that_cannot_be_stored_are_refused_at_admission(value: Any) -> None:
    store, _ = leased()
    prompt = Prompt(id="q", text="", tokens=np.array([1]), metadata={"value": value})
    with pytest.raises(ValueError, match="metadata of prompt 'q' cannot be stored"):
        store.admit("train-1", prompt, group_size=1, max_tokens=8)
    assert store.counts().groups_untrained == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ranks": 2**40}, "ranks"),
        ({"ranks": 2, "steps": [2**64 - 1, 3]}, "steps"),
        ({"ranks": 2, "steps": [0] * 2**20}, "ranks"),
        ({"ranks": 2, "lengths": [2**63, 2**63]}, "lengths"),
    ],
)
def test_packing_of_hostile_sizes_is_an_error(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _rust_buffer.pack(**{"lengths": [1, 1], "limit": 8} | settings)


@pytest.mark.parametrize("file_bytes", [0, 2**40 + 1, 2**64 - 1])
def test_a_log_file_of_no_length_or_of_too_many_bytes_is_refused(file_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"file_bytes is {file_bytes}; give 1 to 1099511627776"):
        TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=None, file_bytes=file_bytes)


def test_only_published_weights_are_restored() -> None:
    with TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=None) as store:
        store.publish(0)
        store.set_quota(Quota(version=1000, groups=8, tokens=1000, tokens_per_segment=None))
        with pytest.raises(Conflict, match="cannot have the weights of 900: the newest published is 0"):
            store.restore(1001, weights_of=900)
        store.restore(1001, weights_of=0)
