"""What the learner leaves out of a claim is in the store and in the archive: who, why, and how many tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pmdflow.store import Conflict, TrajectoryStore
from pmdflow.store.archive import parts, read_part, write_part
from pmdflow.types import Mask, Prompt, Quota, Segment, TrainBatch
from tests.support.learner import make_config

torch.set_num_threads(1)
PROMPT = Prompt(id="p", text="?", tokens=np.array([5, 6, 7], np.int32))
GROUP_SIZE = 3
REWARDS = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
"""Of six trajectories: all of the first group are right, so a filter leaves it out."""
VETOED = 4
OLDER_TOKENS = 2
"""Tokens of each trajectory that are over-age at the claim."""


def open_store(path: Path) -> TrajectoryStore:
    return TrajectoryStore(path, groups_per_iteration=2, lookahead=0, max_staleness=0)


def claimed_store(path: Path, model: str) -> TrajectoryStore:
    """A claim of two groups whose log-probs are the model's, but for one that it would veto."""
    store, policy = open_store(path), AutoModelForCausalLM.from_pretrained(model)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=2, tokens=1000, tokens_per_segment=None))
    for number in range(2):
        store.admit(f"train-{number}", PROMPT, cursor=number, group_size=GROUP_SIZE, max_tokens=20)
    newer = []
    for lease in store.lease("worker", 0, 6, 0.0):
        tokens = np.arange(5 + lease.trajectory, dtype=np.int32) + 10 * lease.trajectory + 8
        with torch.no_grad():
            whole = torch.from_numpy(np.concatenate([PROMPT.tokens, tokens]).astype(np.int64))
            scores = policy(whole[None]).logits[0, len(PROMPT.tokens) - 1 : -1].log_softmax(-1)
        logprobs = scores.gather(1, whole[len(PROMPT.tokens) :, None])[:, 0].numpy()
        if lease.trajectory == VETOED:
            logprobs[-1] += 10.0  # A ratio of e^-10, below 1e-4.
        older = Segment(
            trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=0, temperature=1.0,
            tokens=tokens[:OLDER_TOKENS], logprobs=logprobs[:OLDER_TOKENS], next_version=1,
        )  # fmt: skip
        store.append([older])
        rest = {"tokens": tokens[OLDER_TOKENS:], "logprobs": logprobs[OLDER_TOKENS:]}
        newer.append(replace(older, offset=OLDER_TOKENS, version=1, stop="stop", **rest))
    store.publish(1)
    store.append(newer)
    for item in store.unscored(6, 60.0, 0.0):
        store.score(item.trajectory, 0, "scored", REWARDS[item.trajectory])
    assert store.claim(1, 1, 0.0).status == "claimed"
    return store


def flags(batch: TrainBatch) -> list[set[int]]:
    """Flags of the generated tokens of each trajectory."""
    ends = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    return [set(batch.mask[first:last].tolist()) - {0} for first, last in ends]


def test_the_archive_says_who_was_left_out_and_why(start, model_path, tmp_path):
    store = claimed_store(tmp_path / "store", model_path)
    learner = start(make_config(model_path, keep_groups_below=1.0, veto=True))
    claim = store.read_claim(1)
    result = learner.train(claim)
    assert result.left_out == {"filter": [0, 1, 2], "veto": [VETOED]}
    store.publish(2, 1, result.left_out)
    store.publish(2, 1, {reason: ids[::-1] for reason, ids in result.left_out.items()})
    store.commit(1)
    store.close()

    store = open_store(tmp_path / "store")
    write_part(tmp_path, store.read_claim(1), attrs={})
    archived = read_part(*parts(tmp_path))
    older = int(Mask.GENERATED | Mask.OVER_AGE)
    own = [Mask.FILTER] * 3 + [Mask.TRAINED, Mask.VETO, Mask.TRAINED]
    assert flags(archived) == [{older, int(Mask.GENERATED | flag)} for flag in own]
    np.testing.assert_array_equal(archived.tokens, claim.tokens)

    ledger = store.ledger()
    assert ledger["trained"] == result.metrics["learner/trained_tokens"] == 6 + 8
    assert (ledger["masked_filter"], ledger["masked_veto"], ledger["masked_over_age"]) == (3 + 4 + 5, 7, 12)
    assert ledger["masked_filter"] == pytest.approx(result.metrics["learner/filter_share"] * 33)

    learner.load_initial()
    again = learner.train(archived)
    assert (again.metrics, again.left_out) == (result.metrics, result.left_out)


def test_an_undone_claim_forgets_what_was_left_out(model_path, tmp_path):
    store = claimed_store(tmp_path, model_path)
    before, mask = store.ledger(), store.read_claim(1).mask.tolist()
    store.publish(2, 1, {"filter": [0, 1, 2], "veto": [VETOED]})
    assert store.uncommit(0) == [1]
    assert store.ledger()["masked_filter"] == store.ledger()["masked_veto"] == 0
    store.claim(1, 1, 0.0)
    assert (store.ledger(), store.read_claim(1).mask.tolist()) == (before, mask)


def test_what_is_left_out_must_be_in_the_claim_for_one_reason(model_path, tmp_path):
    store = claimed_store(tmp_path, model_path)
    before = store.counts().lsn
    with pytest.raises(Conflict, match="trajectory 6, which the learner left out, is not in the claim"):
        store.publish(2, 1, {"filter": [6]})
    with pytest.raises(Conflict, match="trajectory 0, which the learner left out, is not in the claim"):
        store.publish(2, None, {"veto": [0]})
    with pytest.raises(Conflict, match="trajectory 0 is left out by filter and by veto"):
        store.publish(2, 1, {"filter": [0], "veto": [0]})
    with pytest.raises(ValueError, match="choose one of filter, veto"):
        store.publish(2, 1, {"age": [0]})
    assert store.counts().lsn == before
    store.publish(2, 1, {"filter": [0]})
    with pytest.raises(Conflict, match="version 2 is not above"):
        store.publish(2, 1, {"veto": [0]})
