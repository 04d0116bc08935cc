"""One policy version a trajectory (DORA) on real actors, with a kill in between."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.runs import Up, assert_exact, small_config

PATIENCE_S = 800.0
pytestmark = pytest.mark.timeout(2000)


def versions_of(run: Path) -> list[set[int]]:
    """Policy versions of each archived trajectory."""
    found = []
    for path in parts(run):
        claim = read_part(path)
        generated = (claim.segment_masks & Mask.GENERATED) != 0
        owners, versions = claim.segment_owners[generated], claim.segment_versions[generated]
        found += [set(versions[owners == number].tolist()) for number in np.unique(owners)]
    return found


def test_every_trajectory_is_of_one_version_also_of_an_actor_that_is_killed(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=7, scheduler__lookahead=2, scheduler__versions=2, scheduler__max_staleness=None,
        rollout__actors=2, rollout__slots=4, learner__checkpoint_every=1,
    )  # fmt: skip
    up = Up(tmp_path, config)
    for iteration in (2, 4):
        up.wait_for(lambda iteration=iteration: up.reached(iteration), f"iteration {iteration}", PATIENCE_S)
        up.actor("RolloutActor").send_signal(signal.SIGKILL)
    assert up.wait(PATIENCE_S) == 0, up.output
    found = versions_of(up.run)
    print(f"\n{len(found)} trajectories of versions {sorted(set.union(*found))}")
    assert len(found) == 7 * 4 * 4
    assert all(len(versions) == 1 for versions in found), found
    assert len(set.union(*found)) >= 4, "the versions do not move"
    assert [record["trajectory/mixed_version"] for record in up.iterations()] == [0] * 7
    assert sum(event["kind"] == "actor_died" for event in up.events()) == 2
    assert_exact(up)


def test_what_a_lost_version_began_goes_on_under_the_newest_and_is_counted(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=5, scheduler__lookahead=2, scheduler__versions=2, scheduler__max_staleness=None,
        rollout__slots=4, data__max_tokens=400, learner__tokens_per_microbatch=1024,
    )  # fmt: skip
    up = Up(tmp_path, config)
    up.wait_for(lambda: up.reached(2), "iteration 2", PATIENCE_S)
    up.kill_everything()
    again = Up(tmp_path, config)
    assert again.wait(PATIENCE_S) == 0, again.output
    mixed = sum(len(versions) > 1 for versions in versions_of(again.run))
    counted = sum({record["iteration"]: record["trajectory/mixed_version"] for record in again.iterations()}.values())
    print(f"\n{mixed} trajectories of more than one version")
    assert mixed == counted > 0
    assert_exact(again)
