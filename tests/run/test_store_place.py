"""Where a run's store lies, on a Ray cluster of two nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError, PmdflowError
from pmdflow.run.actors import start_archive, start_store
from pmdflow.run.store_place import StorePlace
from pmdflow.run.stored import stored
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, call
from tests.support.learner import make_config

TIMEOUT_S = 150.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "node_name": "head"}
    )
    nodes.add_node(num_cpus=1, node_name="disks")
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def node_id(name: str) -> str:
    (node,) = (node for node in ray.nodes() if node["NodeName"] == name)
    return str(node["NodeID"])


def config_with(directory: Path | None) -> Config:
    values = make_config("no-model").model_dump()
    return Config.model_validate(values | {"store": {"dir": None if directory is None else str(directory)}})


def restarted(store: StoreHandle) -> str:
    """Kill the store actor; the node of its successor."""
    ray.kill(store, no_restart=False)
    return ray.get(call(store, StoreActor.node), timeout=TIMEOUT_S)


@pytest.mark.timeout(400)
def test_the_store_stays_on_the_node_where_the_run_began(cluster: Cluster, tmp_path: Path) -> None:
    run, config = tmp_path / "run", config_with(tmp_path / "disk")
    run.mkdir()
    there = NodeAffinitySchedulingStrategy(node_id("disks"), soft=False)
    begun: Any = ray.remote(lambda: StorePlace.find(config, run)).options(num_cpus=0, scheduling_strategy=there)
    place = ray.get(begun.remote(), timeout=TIMEOUT_S)
    assert place == StorePlace(directory=tmp_path / "disk" / "test", node=node_id("disks"))
    store = start_store(config, run)
    assert ray.get(call(store, StoreActor.node), timeout=TIMEOUT_S) == node_id("disks")
    archive = start_archive(config, run, store, attrs={})
    ray.get(archive.__ray_ready__.remote(), timeout=TIMEOUT_S)
    states = ray._private.state.actors()
    where = [states[actor._actor_id.hex()] for actor in (store, archive)]
    assert [one["Address"]["NodeID"] for one in where] == [node_id("disks")] * 2
    assert where[0]["Pid"] != where[1]["Pid"], "no append waits for the archive's interpreter"
    ray.get(call(store, StoreActor.publish, 0, None, {}), timeout=TIMEOUT_S)
    assert restarted(store) == node_id("disks")
    assert ray.get(call(store, StoreActor.counts), timeout=TIMEOUT_S).version == 0
    ray.get(call(store, StoreActor.close), timeout=TIMEOUT_S)
    assert stored(run, "list", group=None, reason=None) == 0, "read where it lies"
    with pytest.raises(LaunchError, match=r"store.dir is null, but the store of .* lies in .*disk/test"):
        StorePlace.find(config_with(None), run)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(LaunchError, match=r"disk/test is there already, and .*other does not say"):
        StorePlace.find(config, other)


def test_a_store_whose_node_is_missing_is_not_begun_anew(cluster: Cluster, tmp_path: Path) -> None:
    record = {"directory": str(tmp_path / "disk" / "test"), "node": "10.0.0.7", "host": "rack-7"}
    (tmp_path / "store.json").write_text(json.dumps(record))
    with pytest.raises(
        LaunchError, match=r"on node 10.0.0.7 \(rack-7\), which has not joined Ray within 0.1 s; nodes"
    ) as told:
        StorePlace.find(config_with(tmp_path / "disk"), tmp_path, timeout_s=0.1)
    assert "disks (" in str(told.value) and "head (" in str(told.value)
    with pytest.raises(PmdflowError, match=r"disk/test, which is not on this machine"):
        stored(tmp_path, "list", group=None, reason=None)
    host = next(node["NodeManagerHostname"] for node in ray.nodes())
    (tmp_path / "store.json").write_text(json.dumps(record | {"host": host}))
    found = StorePlace.find(config_with(tmp_path / "disk"), tmp_path, timeout_s=0.1)
    assert found.node in {node_id("head"), node_id("disks")}, "another Ray on the same machine"


def test_without_store_dir_it_is_in_the_run_directory_and_cannot_be_moved(tmp_path: Path) -> None:
    assert StorePlace.find(config_with(None), tmp_path) == StorePlace(directory=tmp_path / "store", node=None)
    (tmp_path / "store").mkdir()
    with pytest.raises(LaunchError, match=r"store.dir is .*disk, but the store of .* lies in .*store"):
        StorePlace.find(config_with(tmp_path / "disk"), tmp_path)
