"""The transports give back what was published, and nothing that is not whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pmdflow.errors import WeightsLost
from pmdflow.weights.filesystem import FilesystemTransport
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.transport import Transport, WeightsHandle

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}


@pytest.fixture(params=["filesystem", "object_store"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    if request.param == "filesystem":
        yield FilesystemTransport(tmp_path / "weights")
        return
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield ObjectStoreTransport()
    ray.shutdown()


def test_what_is_published_is_fetched_bit_for_bit(transport: Transport) -> None:
    handle = transport.publish(3, WEIGHTS)
    fetched = transport.fetch(handle, timeout_s=10.0)
    assert handle.version == 3
    assert fetched.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert fetched[name].dtype == tensor.dtype
        assert torch.equal(fetched[name], tensor)


def test_an_older_version_can_still_be_read_beside_the_newest(transport: Transport) -> None:
    older = transport.publish(1, WEIGHTS)
    transport.publish(2, {"a": torch.zeros(1)})
    assert torch.equal(transport.fetch(older, timeout_s=10.0)["a"], WEIGHTS["a"])


def test_the_directory_shows_whole_files_only_and_forgets_old_versions(tmp_path: Path) -> None:
    transport = FilesystemTransport(tmp_path)
    handles = [transport.publish(version, WEIGHTS) for version in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "version-000002.safetensors",
        "version-000003.safetensors",
    ]
    with pytest.raises(WeightsLost, match="version 0"):
        transport.fetch(handles[0], timeout_s=1.0)


def test_weights_whose_publisher_has_died_are_lost_by_name() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    publisher: Any = ray.remote(num_cpus=0)(Publisher).remote()
    handle = ray.get(publisher.publish.remote(), timeout=60.0)
    ray.kill(publisher)
    with pytest.raises(WeightsLost, match="version 7 died with the learner that made them"):
        fetch_for(60.0, handle)
    ray.shutdown()


def fetch_for(seconds: float, handle: WeightsHandle) -> None:
    """Ray hears of a death a little later."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ObjectStoreTransport().fetch(handle, timeout_s=seconds)


class Publisher:
    def publish(self) -> WeightsHandle:
        return ObjectStoreTransport().publish(7, {"a": torch.zeros(1 << 20)})  # Ray sends smaller ones along


def test_what_comes_through_the_object_store_is_not_copied() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    weights = {"a": torch.arange(1 << 18, dtype=torch.float32), "b": torch.zeros(1 << 18, dtype=torch.bfloat16)}
    transport = ObjectStoreTransport()
    handle = transport.publish(1, weights)
    first, second = (transport.fetch(handle, timeout_s=10.0) for _ in range(2))
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in weights)
    del handle, second  # the views keep the memory
    assert torch.equal(first["a"], weights["a"])
    ray.shutdown()
