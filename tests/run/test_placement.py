"""Where actors go: GPUs by arithmetic, nodes on a Ray cluster of two simulated nodes with logical GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster

from pmdflow.config.gpus import gpu_shares
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError
from pmdflow.run import placement
from tests.support.learner import make_config


@given(gpus=st.integers(0, 16), actors=st.integers(1, 12), ranks=st.integers(1, 12), split=st.integers(1, 4))
def test_no_two_ranks_and_no_two_engines_share_a_gpu(gpus: int, actors: int, ranks: int, split: int) -> None:
    everyone_alone = gpus >= actors * split + ranks
    each_with_a_rank = gpus == ranks and actors <= gpus and split == 1
    if gpus and not everyone_alone and not each_with_a_rank:
        with pytest.raises(LaunchError, match=f"there are {gpus}"):
            gpu_shares(gpus, actors=actors, ranks=ranks, tensor_parallel=split)
        return
    rollout, learner = gpu_shares(gpus, actors=actors, ranks=ranks, tensor_parallel=split)
    if gpus == 0:
        assert rollout == learner == 0
    elif everyone_alone:
        assert (rollout, learner) == (split, 1)
    else:
        assert learner > 0.5 and rollout + learner <= 1 < 2 * rollout + learner


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of three CPUs."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    nodes.add_node(num_cpus=3)
    nodes.wait_for_nodes()
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

    def gpus(self) -> list[str]:
        """Ids of its GPUs."""
        return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])


@pytest.mark.timeout(180)
def test_the_ranks_of_a_replica_are_on_one_node_also_after_a_restart(cluster: Cluster) -> None:
    places = placement.place_learners(make_config("no-model", ranks=4, replicas=2))
    for _ in range(2):
        ranks = [Rank.options(**place).remote() for place in places]
        nodes = ray.get([rank.node.remote() for rank in ranks], timeout=90)
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        for rank in ranks:
            ray.kill(rank)


@pytest.mark.timeout(180)
def test_too_many_ranks_are_refused_with_what_is_free(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PLACEMENT_TIMEOUT_S", 1)
    with pytest.raises(LaunchError, match=r"no place for 7 learner ranks of replica 0 with \{'CPU': 1.0\} each"):
        placement.place_learners(make_config("no-model", ranks=7))


def engine_config(*, actors: int, tensor_parallel: int, threads: int = 1) -> Config:
    rollout = {"engine": "vllm", "actors": actors, "tensor_parallel": tensor_parallel, "threads": threads}
    config = make_config("no-model").model_dump()
    return Config.model_validate({**config, "rollout": config["rollout"] | rollout})


@pytest.mark.timeout(180)
def test_the_ranks_of_an_engine_are_on_one_node_and_its_successor_takes_their_place(cluster: Cluster) -> None:
    gpus = cluster.add_node(num_cpus=4, num_gpus=5)
    places = placement.place_rollouts(engine_config(actors=2, tensor_parallel=2))
    for _ in range(2):
        engines = [Rank.options(**place).remote() for place in places]
        assert ray.get([engine.node.remote() for engine in engines], timeout=90) == [gpus.node_id] * 2
        seen = ray.get([engine.gpus.remote() for engine in engines], timeout=90)
        assert [len(ids) for ids in seen] == [2, 2] and len({*seen[0], *seen[1]}) == 4
        for engine in engines:
            ray.kill(engine)


@pytest.mark.timeout(180)
def test_an_engine_that_fits_on_no_node_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PLACEMENT_TIMEOUT_S", 1)
    with pytest.raises(LaunchError, match="no place for the 4 ranks of rollout actor 0, which must be on one node"):
        placement.place_rollouts(engine_config(actors=1, tensor_parallel=4, threads=2))
