"""The GPUs that a run has, and those that a dry run plans for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.config.gpus import Gpus
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.inputs import Inputs
from pmdflow.run import room
from pmdflow.run.cluster import ClusterFacts
from pmdflow.run.room import Room, real_gpus
from tests.support.footprints import FOOTPRINTS
from tests.support.paths import CONFIGS

ONE = Gpus(count=1, bytes_each=24 << 30, source="of this machine")


def config(*overrides: str) -> Config:
    return load(CONFIGS / "gpu.yaml", overrides).config


def test_a_run_takes_what_is_there_and_not_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "local_gpus", lambda: ONE)
    assert real_gpus(config("cluster.gpus=8x80GiB")) == ONE
    monkeypatch.setattr(room, "local_gpus", lambda: None)
    assert real_gpus(config("cluster.gpus=8x80GiB")) is None


@pytest.mark.parametrize(("stated", "each"), [("cluster.gpus=8x80GiB", 80 << 30), ("cluster.gpus=null", None)])
def test_a_cluster_tells_how_many_and_the_file_how_large(
    monkeypatch: pytest.MonkeyPatch, stated: str, each: int | None
) -> None:
    monkeypatch.setattr(room, "ask_cluster", lambda address: ClusterFacts(gpus=3))
    found = real_gpus(config("cluster.address=auto", stated))
    assert found is not None and (found.count, found.bytes_each) == (3, each)
    monkeypatch.setattr(room, "ask_cluster", lambda address: ClusterFacts(gpus=0))
    assert real_gpus(config("cluster.address=auto", stated)) is None


def test_gpus_of_unknown_memory_are_split_without_a_plan_of_it() -> None:
    given, model = config("cluster.address=auto"), FOOTPRINTS["Qwen/Qwen3-0.6B"]
    inputs = Inputs(config=given, model={}, pins={}, base=Path())
    found = Room(gpus=Gpus(count=8, bytes_each=None, source="of the Ray cluster"), model=model)
    settled = found.settled(inputs).config
    assert (settled.rollout.actors, settled.learner.ranks, settled.rollout.memory_share) == (6, 2, 0.9)
    assert found.plan(settled).memory is None
