"""The store of a run recorded at 1fa6726, before prompt texts were kept: it opens, tells what it holds, and goes on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Prompt, Quota, Segment
from tests.support.paths import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "run-1fa6726.tar.xz"
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
    before = store.counts(), store.ledger(), store.groups()
    store.close()

    again = open_store(recorded)
    assert (again.counts(), again.ledger(), again.groups()) == before
    assert again.evict(4) == 12
    assert [row["text"] for row in again.groups()] == [PROMPT.text]


def test_a_repeat_of_an_old_admission_may_bring_its_text(recorded: Path) -> None:
    store = open_store(recorded)
    old = store.groups("ready")[0]
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
