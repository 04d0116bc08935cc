"""A claim with forked episodes on its way from the store actor to learner ranks, as a run has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from pmdflow.config.schema import Config
from pmdflow.learner.actor import LearnerActor
from pmdflow.run.actors import start_learners, start_ray, start_store
from pmdflow.store import TrajectoryStore, encode_segments
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, call
from pmdflow.types import Lease, Mask, Prompt, Quota, Segment
from tests.support.iteration import independent_iteration
from tests.support.learner import VOCAB, assert_metrics_alike, make_config

TIMEOUT_S = 120.0
GROUPS, MEMBERS = 3, 3
FORKS = [[], [(5, 3)], [(4, 2), (3, 5)]]
"""Of each member: tokens of a branch, and how many of its history the next one keeps."""


@pytest.fixture
def config(model_path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    values = make_config(model_path, ranks=2, steps_per_iteration=1, tokens_per_microbatch=48).model_dump()
    values["scheduler"] |= {"groups_per_iteration": GROUPS}
    config = Config.model_validate(values)
    start_ray(config)
    yield config
    ray.shutdown()


class Agent:
    """Generates members of groups, some of them in several branches."""

    def __init__(self, store: StoreHandle) -> None:
        self._store = store
        self._random = np.random.default_rng(0)
        self.generated = 0

    def _append(self, lease: Lease, epoch: int, offset: int, count: int, *, last: bool) -> None:
        segment = Segment(
            trajectory=lease.trajectory, epoch=epoch, offset=offset, version=0, temperature=1.0, next_version=0,
            tokens=self._random.integers(1, VOCAB, count).astype(np.int32),
            logprobs=-self._random.random(count, np.float32), stop="stop" if last else None,
        )  # fmt: skip
        ray.get(call(self._store, StoreActor.append, encode_segments([segment])), timeout=TIMEOUT_S)
        self.generated += count

    def finish(self, lease: Lease) -> None:
        epoch, offset = lease.epoch, 0
        for count, kept in FORKS[lease.trajectory % MEMBERS]:
            self._append(lease, epoch, offset, count, last=False)
            forked = ray.get(call(self._store, StoreActor.fork, lease.trajectory, epoch, kept), timeout=TIMEOUT_S)
            epoch, offset = forked.epoch, kept
        self._append(lease, epoch, offset, 4 + lease.trajectory % 5, last=True)


def fill(store: StoreHandle) -> int:
    """Scored groups; how many tokens were generated for them."""
    prompts = [
        (f"train-{number}", number, Prompt(id=f"p{number}", text="?", tokens=np.arange(2, 5 + number, dtype=np.int32)))
        for number in range(GROUPS)
    ]
    ray.get(call(store, StoreActor.publish, 0, None, {}), timeout=TIMEOUT_S)
    ray.get(call(store, StoreActor.set_quota, Quota(version=0, groups=9, tokens=10**6, tokens_per_segment=None)))
    admitted = ray.get(call(store, StoreActor.admit, prompts, "train", MEMBERS, 40), timeout=TIMEOUT_S)
    assert len(admitted) == GROUPS
    agent = Agent(store)
    for lease in ray.get(call(store, StoreActor.lease, "worker", 0, GROUPS * MEMBERS, 10.0), timeout=TIMEOUT_S):
        agent.finish(lease)
    rewards = np.random.default_rng(1).random(GROUPS * MEMBERS)
    ray.get(
        call(store, StoreActor.score, [(n, 0, "scored", float(reward), {}) for n, reward in enumerate(rewards)]),
        timeout=TIMEOUT_S,
    )
    return agent.generated


@pytest.mark.timeout(300)
def test_two_ranks_train_each_token_of_forked_episodes_once_with_the_weight_of_its_branch(
    config: Config, tmp_path: Path
) -> None:
    store = start_store(config, tmp_path)
    generated = fill(store)
    assert ray.get(call(store, StoreActor.claim, 1, 0, 10.0), timeout=TIMEOUT_S).status == "claimed"
    claim = ray.get(call(store, StoreActor.read_rows, 1), timeout=TIMEOUT_S)
    learners = start_learners(config, tmp_path, [{}, {}])
    one, other = ray.get([call(rank, LearnerActor.train, claim, store) for rank in learners], timeout=TIMEOUT_S)
    ray.get(call(store, StoreActor.close), timeout=TIMEOUT_S)
    batch = TrajectoryStore.read(tmp_path / "store").read_claim(1)
    assert np.unique(batch.episode_shares()).tolist() == pytest.approx([1 / 3, 1 / 2, 1])
    assert one.metrics == other.metrics
    assert one.metrics["learner/trained_tokens"] == generated == ((batch.mask & Mask.TRAINED) != 0).sum()
    losses, norms, *_ = independent_iteration(config, batch)
    assert_metrics_alike(one.metrics, {"learner/step_losses": losses, "learner/grad_norm": np.mean(norms)})
