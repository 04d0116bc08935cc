"""What a configuration means before anything starts: derived numbers, notes, the dry run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pmdflow.config.gpus import planned_gpus
from pmdflow.config.load import Loaded, load
from pmdflow.config.model_size import measure_model
from pmdflow.config.plan import Plan, make_plan, render_dry_run
from pmdflow.config.settle import settle
from tests.support.footprints import FOOTPRINTS
from tests.support.paths import CONFIGS


def plan(loaded: Loaded) -> Plan:
    return make_plan(settle(loaded.config, gpus=None), model=None)


def test_derived_numbers(cluster_yaml: Path) -> None:
    loaded = load(
        cluster_yaml,
        [
            "rollout.tokens_per_segment=20",
            "scheduler.lookahead=3",
            "learner.checkpoint_every=2",
            "learner.keep_checkpoints=3",
            "learner.ranks=2",
        ],
    )
    result = plan(loaded)
    assert result.active_groups == 16  # 4 groups, lookahead 3
    assert result.active_trajectories == 128
    assert result.trajectories_per_iteration == 32
    assert result.versions_per_trajectory == 4  # 64 tokens in segments of 20
    assert result.optimizer_steps == 12
    assert result.store_bytes == (128 + 6 * 32) * 64 * 8
    assert {actor.role: actor.count for actor in result.actors if actor.cpus} == {"rollout": 1, "learner": 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.steps_per_iteration=1"], "learner.tau has no effect"),
        (["rollout.tokens_per_segment=8", "scheduler.lookahead=0"], "raise scheduler.max_staleness (4)"),
        (["rollout.tokens_per_segment=64"], "rollout.tokens_per_segment has no effect"),
        (["rollout.engine=simulated"], "tokens are random"),
        (["learner.algorithm=pmd_partition"], "is small for pmd_partition"),
        (["store.max_bytes=10KiB"], "store.max_bytes (10KiB) is below"),
    ],
)
def test_notes_point_at_what_is_probably_not_meant(cluster_yaml: Path, overrides: list[str], words: str) -> None:
    (note,) = plan(load(cluster_yaml, overrides)).notes
    assert words in note


def test_the_size_of_the_shipped_model_is_read_from_its_headers() -> None:
    size = measure_model(CONFIGS / "tiny-arithmetic")
    assert size is not None
    assert size.num_parameters * 4 == pytest.approx(
        (CONFIGS / "tiny-arithmetic/model.safetensors").stat().st_size, rel=0.01
    )
    assert measure_model(CONFIGS) is None


def test_the_dry_run_shows_origins_placement_and_derived_numbers(cluster_yaml: Path) -> None:
    loaded = load(cluster_yaml, ["rollout.actors=3"])
    config = settle(loaded.config, gpus=None)
    report = render_dry_run(replace(loaded, config=config), make_plan(config, model=None))
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line.startswith("  ")}
    assert rows["run.iterations"] == ["3", "cluster.yaml:3"]
    assert rows["rollout.actors"] == ["3", "override"]
    assert rows["scheduler.max_staleness"] == ["4", "default"]
    assert rows["rollout.tokens_per_segment"] == ["null", "default"]
    assert rows["rollout"][:2] == ["3", "1"]
    assert "active groups              8 (64 trajectories)" in report
    assert "unknown: no model found in nowhere" in report
    assert report.endswith("dry run of cluster.yaml: nothing was started")


def test_the_dry_run_shows_memory_by_role_beside_the_gpu_that_is_stated() -> None:
    loaded = load(CONFIGS / "gpu8.yaml", ["cluster.gpus=8x80GiB"])
    model, gpus = FOOTPRINTS[loaded.config.model.path], planned_gpus(loaded.config)
    config = settle(loaded.config, gpus=gpus, model=model)
    report = render_dry_run(replace(loaded, config=config), make_plan(config, model=model, gpus=gpus), model=model)
    memory = report.partition("\nmemory\n")[2].partition("\n\n")[0]
    assert "planned for 8 GPUs, stated by cluster.gpus" in memory
    for purpose in (
        "master weights",
        "moments",
        "gradients",
        "activations",
        "head",
        "key-value cache",
        "published weights, on each node",
    ):
        assert purpose in memory
    assert memory.count("of a GPU's 80 GiB") == 2 and "of all hosts together" in memory
