"""One policy version a trajectory (DORA) on real actors, with a kill in between."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.support.runs import Up, assert_exact, small_config

PATIENCE_S = 150.0
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def versions_of(run: Path) -> list[set[int]]:
    """Policy versions of each archived trajectory."""
    found = []
    for path in parts(run):
        claim = read_part(path)
        generated = (claim.mask & Mask.GENERATED) != 0
        for tokens in map(slice, claim.cu_seqlens[:-1], claim.cu_seqlens[1:]):
            found += [set(claim.versions[tokens][generated[tokens]].tolist())]
    return found


def partial(run: Path) -> int:
    """Trajectories that a published version began and that are not complete; everybody has the weights of version 0."""
    with TrajectoryStore.read(run / "store") as store:
        return sum(found.state == "idle" and (found.last_version or 0) > 0 for found in store.query())


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
    assert len(set.union(*found)) >= 2, "the versions do not move"  # how many serve is up to the clock
    assert [record["trajectory/mixed_version"] for record in up.iterations()] == [0] * 7
    assert sum(event["kind"] == "actor_died" for event in up.events()) == 2
    assert_exact(up)


def test_what_a_lost_version_began_goes_on_under_the_newest_and_is_counted(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, run__iterations=5, scheduler__lookahead=2, scheduler__versions=2, scheduler__max_staleness=None,
        rollout__slots=4, rollout__temperature=3.0, data__max_tokens=400, learner__tokens_per_microbatch=1024,
    )  # fmt: skip
    up = Up(tmp_path, config)
    up.wait_for(lambda: up.reached(2) and partial(up.run) > 0, "what is begun and not complete", PATIENCE_S)
    up.kill_everything()
    began = partial(up.run)
    again = Up(tmp_path, config)
    assert again.wait(PATIENCE_S) == 0, again.output
    mixed = sum(len(versions) > 1 for versions in versions_of(again.run))
    counted = sum({record["iteration"]: record["trajectory/mixed_version"] for record in again.iterations()}.values())
    print(f"\n{mixed} trajectories of more than one version")
    assert mixed == counted >= min(began, 1)
    assert_exact(again)
