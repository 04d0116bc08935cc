"""Where learner ranks go: GPUs by arithmetic, nodes on a Ray cluster of two simulated nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster
from test_learner import make_config

from pmdflow import launch
from pmdflow.errors import LaunchError


@given(gpus=st.integers(0, 16), actors=st.integers(1, 12), ranks=st.integers(1, 12))
def test_gpu_shares_fit_and_no_two_ranks_share_a_gpu(gpus: int, actors: int, ranks: int) -> None:
    if 0 < gpus < ranks:
        with pytest.raises(LaunchError, match=f"Ray has {gpus} GPUs"):
            launch.gpu_shares(gpus, actors=actors, ranks=ranks)
        return
    rollout, learner = launch.gpu_shares(gpus, actors=actors, ranks=ranks)
    if gpus == 0:
        assert rollout == learner == 0
        return
    assert learner > 0.5
    room = [1 - learner] * ranks + [1.0] * (gpus - ranks)
    fit = sum(int(free / rollout + 1e-9) for free in room)
    assert fit >= actors
    assert (rollout == learner == 1) == (gpus >= actors + ranks)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of three CPUs."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    nodes.add_node(num_cpus=3)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@ray.remote
class Rank:
    """Where an actor runs."""

    def node(self) -> str:
        """The node's id."""
        return str(ray.get_runtime_context().get_node_id())


@pytest.mark.timeout(180)
def test_the_ranks_of_a_replica_are_on_one_node_also_after_a_restart(cluster: Cluster) -> None:
    places = launch.place_learners(make_config("no-model", ranks=4, replicas=2))
    for _ in range(2):
        ranks = [Rank.options(**place).remote() for place in places]
        nodes = ray.get([rank.node.remote() for rank in ranks], timeout=90)
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        for rank in ranks:
            ray.kill(rank)


@pytest.mark.timeout(180)
def test_too_many_ranks_are_refused_with_what_is_free(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PLACEMENT_TIMEOUT_S", 1)
    with pytest.raises(LaunchError, match=r"no place for 7 learner ranks of replica 0 with \{'CPU': 1.0\} each"):
        launch.place_learners(make_config("no-model", ranks=7))
