"""Which tokens a rank reads: those of the trajectories that it trains, once."""

from __future__ import annotations

import numpy as np
import pytest

from pmdflow.learner.batch import pack, pack_rank, plan_iteration
from pmdflow.types import Claim, ClaimTokens, Int64, Mask
from tests.support.learner import make_batch


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_read_every_trained_trajectory_once_and_nothing_else(packing: bool) -> None:
    batch = make_batch(seed=5)
    claim, counts = Claim.of(batch), batch.count(Mask.TRAINED)
    plans = plan_iteration(claim, counts=counts, steps=2, ranks=2, tokens_per_microbatch=64, packing=packing)
    asked: list[int] = []

    def read(rows: Int64) -> ClaimTokens:
        asked.extend(rows.tolist())
        return batch.read(rows)

    for rank in range(2):
        steps = pack_rank(claim, read, plans, rank=rank, packing=packing)
        for plan, micros in zip(plans, steps, strict=True):
            for rows, micro in zip(plan.ranks[rank], micros, strict=True):
                trained = (batch.mask & Mask.TRAINED) != 0
                whole = pack(batch, trained=trained, trajectories=rows, packing=packing)
                for name in ("trajectories", "tokens", "positions", "targets", "temperatures", "behavior", "versions"):
                    np.testing.assert_array_equal(getattr(micro, name), getattr(whole, name), err_msg=name)
                np.testing.assert_array_equal(micro.trained, whole.trained)
                assert micro.lengths == whole.lengths
    assert sorted(asked) == np.flatnonzero(counts).tolist()
