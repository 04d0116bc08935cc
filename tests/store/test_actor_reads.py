"""Tokens from the store actor: each caller is given what it asked for, mapped from shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pmdflow.store import StoreSettings, TrajectoryStore
from pmdflow.store.actor import StoreActor
from pmdflow.types import ClaimTokens
from tests.support.filled_store import PROMPT

pytestmark = pytest.mark.timeout(300)

LENGTH, ATTEMPTS, TIMEOUT_S = 20_000, 8, 120.0
SETTINGS: StoreSettings = {"groups_per_iteration": 1, "lookahead": 0, "max_staleness": None}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """An actor whose one group has attempts that are each of one token of their own."""
    with TrajectoryStore(tmp_path, **SETTINGS) as filled:
        completions = [np.full(LENGTH, number + 10, np.int32) for number in range(ATTEMPTS)]
        filled.put_group(PROMPT, completions, [np.zeros(LENGTH, np.float32)] * ATTEMPTS, [0.0] * ATTEMPTS)
        assert filled.claim(1, 0, timeout_s=0.0).status == "claimed"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    groups = dict.fromkeys(("lease", "append", "score", "claim", "read", "evict"), 2)
    actor: Any = ray.remote(num_cpus=0, concurrency_groups=groups, max_concurrency=4)(StoreActor)
    yield actor.remote(directory=str(tmp_path), settings=SETTINGS, steps_per_iteration=1, seed=0)
    ray.shutdown()


def test_callers_at_once_are_each_given_their_own(store: Any) -> None:
    claim = ray.get(store.read_rows.remote(1), timeout=TIMEOUT_S)
    assert claim.plan is not None and claim.plan.num_steps == 1
    asked = [claim.trajectories[[number % ATTEMPTS, (3 * number + 1) % ATTEMPTS]] for number in range(24)]
    answers: list[ClaimTokens] = ray.get([store.read_tokens.remote(own) for own in asked], timeout=TIMEOUT_S)
    for own, answer in zip(asked, answers, strict=True):
        first = int(claim.trajectories[0])
        expected = [[*PROMPT.tokens.tolist(), *[number - first + 10] * LENGTH] for number in own.tolist()]
        np.testing.assert_array_equal(answer.tokens, np.concatenate(expected))
        assert not answer.tokens.flags.writeable, "it is mapped, not copied"
    ray.get(store.close.remote(), timeout=TIMEOUT_S)
