"""A trajectory that its scorer's process dies with: it fails by name, and the others are scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.store.actor import StoreActor
from tests.support.paths import ROOT
from tests.support.without_learner import without_learner

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(300)]


def test_it_fails_after_so_many_attempts_and_the_others_are_scored(tmp_path: Path) -> None:
    settings = f"timeout_s: 2, settings: {{file: '{tmp_path / 'deadly'}'}}"
    use = f"{{use: '{ROOT}/tests/support:deadly_scorer:Deadly', {settings}}}"
    with without_learner(
        tmp_path, f"learner.scorers={{deadly: {use}}}", "eval.prompts=0", "rollout.actors=1", "reward.max_attempts=2"
    ) as world:
        world.admit(2)
        world.until(lambda: world.ask(StoreActor.counts).groups_ready == 2, "both groups")
        world.until(lambda: any("died with it" in said for said in world.events("scoring_failed")), "which it was")
        states = [world.ask(StoreActor.trajectory, id)["state"] for id in range(16)]
        assert sorted(states) == ["failed", *["scored"] * 15]
