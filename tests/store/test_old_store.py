"""Stores that earlier programs left: they open, tell what they hold, and go on.

Format 3 is that of a run recorded at 1fa6726, before prompt texts were kept; format 4 holds every kind of record.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Prompt, Quota, Segment
from tests.support.filled_store import admit, complete, quota
from tests.support.filled_store import open_store as open_plain
from tests.support.paths import ROOT
from tests.support.recorded_store import told

FIXTURE = ROOT / "tests" / "fixtures" / "run-1fa6726.tar.xz"
FORMAT_3 = ROOT / "tests" / "fixtures" / "store-format3.tar.xz"
"""Of the same commit, with a snapshot."""
FORMAT_3_RESUMED = ROOT / "tests" / "fixtures" / "store-format3-resumed.tar.xz"
"""Of 729fb9a: claims 2 and 3 were undone, claimed anew and committed; groups 3 and 4 are ready."""
FORMAT_4 = ROOT / "tests" / "fixtures" / "store-format4.tar.xz"
PROMPT = Prompt(id="new", text="1+1=", tokens=np.array([5, 6, 7], dtype=np.int32))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "recorded"


def open_store(run: Path) -> TrajectoryStore:
    return TrajectoryStore(run / "store", groups_per_iteration=6, lookahead=1, max_staleness=4, durability="os")


def test_it_holds_what_was_archived(recorded: Path) -> None:
    store = open_store(recorded)
    assert store.claims() == {3: "committed"}
    claim, part = store.read_claim(3), read_part(parts(recorded)[-1])
    assert part.iteration == 3
    for name in ("tokens", "logprobs", "versions", "mask", "cu_seqlens", "groups", "trajectories", "rewards"):
        np.testing.assert_array_equal(getattr(claim, name), getattr(part, name), err_msg=name)
    assert {group["text"] for group in store.groups()} == {None}
    assert store.ledger()["generated"] == 1277


def test_it_goes_on(recorded: Path) -> None:
    store = open_store(recorded)
    assert store.counts().groups_ready == 6
    assert store.claim(4, 3, timeout_s=0.0).status == "claimed"
    assert len(store.read_claim(4).rewards) == 24
    store.publish(4, iteration=4)
    store.commit(4)

    store.set_quota(Quota(version=4, groups=6, tokens=100, tokens_per_segment=None))
    cursor = store.counts().next_cursor
    group = store.admit("train-new", PROMPT, cursor=cursor, group_size=2, max_tokens=8)
    for lease in store.lease("worker", 4, 2, timeout_s=0.0):
        assert (lease.group, lease.text) == (group, PROMPT.text)
        tokens = np.array([8, 9], dtype=np.int32)
        run = Segment(
            trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=4, temperature=1.0, tokens=tokens,
            logprobs=-tokens.astype(np.float32), next_version=4, stop="stop",
        )  # fmt: skip
        store.append([run])
    assert [item.text for item in store.unscored(9, ttl_s=60.0, timeout_s=0.0)] == [PROMPT.text] * 2
    before, ledger, groups = store.counts(), store.ledger(), list(store.groups())
    store.close()

    again = open_store(recorded)
    now = again.counts()
    assert now.lsn >= before.lsn  # the store rewrites what lies scattered beside its callers
    upkeep = {"lsn": now.lsn, "durable_lsn": now.durable_lsn, "bytes": now.bytes}
    assert (replace(before, **upkeep), ledger, groups) == (now, again.ledger(), list(again.groups()))
    assert again.evict(4) == 12
    assert [row["text"] for row in again.groups()] == [PROMPT.text]


def test_a_repeat_of_an_old_admission_may_bring_its_text(recorded: Path) -> None:
    store = open_store(recorded)
    old = next(store.groups("ready"))
    tokens = store.trajectory(old["trajectories"][0])["prompt"]
    prompt = Prompt(id=old["prompt_id"], text="1+1=", tokens=tokens, metadata=old["metadata"])

    def repeat(prompt: Prompt) -> int:
        size = len(old["trajectories"])
        return store.admit(
            old["request_id"], prompt, cursor=old["cursor"], group_size=size, max_tokens=old["max_tokens"]
        )

    assert repeat(prompt) == old["group"]
    with pytest.raises(Conflict, match="other content"):
        repeat(Prompt(id=prompt.id, text=prompt.text, tokens=tokens[1:], metadata=prompt.metadata))


def formats(store: Path) -> set[int]:
    """Formats of the log's files."""
    return {int.from_bytes(path.read_bytes()[8:12], "little") for path in store.glob("*.log")}


def test_records_of_both_formats_lie_in_one_log(recorded: Path) -> None:
    before = formats(recorded / "store")
    assert before == {3}
    open_store(recorded).close()
    assert 4 in formats(recorded / "store"), "an earlier program is not to read on"
    store = open_store(recorded)
    held = told(store)
    assert store.discard(next(store.groups("ready"))["group"], "one of format 4") is True
    store.close()
    again = open_store(recorded)
    assert again.ledger()["evicted_discarded"] > 0
    assert len(list(again.groups())) == len(held["groups"]) - 1


def test_a_snapshot_of_format_3_holds_what_it_held_and_goes_on(tmp_path: Path) -> None:
    with tarfile.open(FORMAT_3) as archive:
        archive.extractall(tmp_path, filter="data")
    assert (tmp_path / "store" / "index").read_bytes()[8] == 3
    expected = json.loads((tmp_path / "told.json").read_text())
    store = open_plain(tmp_path / "store", max_staleness=1, file_bytes=2048)
    held = told(store)
    assert [row.pop("turns") for row in held["trajectories"].values()] == [[]] * len(held["trajectories"])
    for name, value in expected.items():
        known = {key: held[name][key] for key in value} if isinstance(value, dict) else held[name]
        assert known == value, name
    with pytest.raises(Conflict, match="gone"):
        admit(store, 0)
    assert store.claim(3, 3, 0.0).groups == (2,)
    store.publish(4, 3)
    store.set_quota(quota(4))
    store.commit(3)
    complete(store, version=4)
    before = told(store)
    assert store.evict(3) == 2
    store.close()
    store = open_plain(tmp_path / "store", max_staleness=1)
    assert [group["group"] for group in told(store)["groups"]] == [3]
    assert before["ledger"] == store.ledger()


def test_claims_that_format_3_undid_and_made_anew_are_not_made_a_third_time(tmp_path: Path) -> None:
    with tarfile.open(FORMAT_3_RESUMED) as archive:
        archive.extractall(tmp_path, filter="data")

    def open_again() -> TrajectoryStore:
        return TrajectoryStore(tmp_path / "store", groups_per_iteration=1, lookahead=1, max_staleness=8)

    store = open_again()
    assert store.claims() == {1: "committed", 2: "committed", 3: "committed"}
    assert store.claim(4, 5, 0.0).groups == (3,)
    store.publish(6, 4)
    store.evict(3)
    assert store.claim(5, 6, 0.0).groups == (4,)
    store.publish(7, 5)
    store.uncommit(3)
    assert store.claim(6, 7, 0.0).groups == (3,)
    store.close()
    assert open_again().claims() == {6: "claimed"}


@pytest.fixture
def format_4(tmp_path: Path) -> Path:
    with tarfile.open(FORMAT_4) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_format_4_holds_what_it_held(format_4: Path) -> None:
    assert formats(format_4 / "store") == {4}
    expected = json.loads((format_4 / "told.json").read_text())
    for store in (TrajectoryStore.read(format_4 / "store"), open_plain(format_4 / "store", max_staleness=1)):
        now = told(store)
        assert [row.pop("turns") for row in now["trajectories"].values()] == [[]] * len(now["trajectories"])
        assert (now["counts"].pop("oldest_untrained"), now["counts"].pop("claims_undone")) == (2, 1)
        for numbers in ("counts", "ledger"):
            since = {name for name in now[numbers] if name not in expected[numbers]}
            assert {now[numbers].pop(name) for name in since} <= {0}, "places that were made since are empty"
        assert now == expected
        store.close()


def test_format_4_goes_on(format_4: Path) -> None:
    store = open_plain(format_4 / "store", max_staleness=1)
    assert store.claim(3, 3, 0.0).groups == (2,), "its claim was undone and is made again"
    assert store.read_claim(3).version == 2
    store.publish(4, 3)
    store.set_quota(quota(4))
    store.commit(3)
    admit(store, 6)
    complete(store, version=4)
    assert store.claim(4, 4, 0.0).status == "claimed"
    before = told(store)
    store.close()
    store = open_plain(format_4 / "store", max_staleness=1)
    assert told(store) == before
    assert store.evict(3) == 2
