"""A version that nobody has in memory any more comes out of its checkpoint, byte for byte as it was published."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pmdflow.config.schema import Config
from pmdflow.errors import WeightsLost
from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, manifests
from pmdflow.learner.checkpoint.stored import StoredVersions
from pmdflow.learner.learner import Learner
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.filesystem import FilesystemTransport
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.transport import WeightsHandle
from tests.support.families import write_family
from tests.support.learner import make_batch, make_config

VERSION = 7


def trained_config(folder: Path, *, family: str, dtype: str, **learner: Any) -> Config:
    write_family(family, folder, vocab_size=128, tie_word_embeddings=family == "qwen3")
    config = make_config(str(folder), **learner)
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def checkpoint(config: Config, run_dir: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Train once, publish and save; the digest of what is published, and the weights."""
    learner = Learner(config=config, rank=0)
    learner.setup(learner.address())
    try:
        learner.train(make_batch())
        digest = learner.publish(lambda tensors, _: WeightsFile.write(tensors).digest)
        manifest = Manifest.new(run_dir / "checkpoints", iteration=3, version=VERSION, lsn=0)
        learner.save(str(manifest.writing))
        commit_checkpoint(manifest.root, manifest, learner.await_saved())
        weights = learner.weights()
    finally:
        learner.close()
        torch.use_deterministic_algorithms(False)
    assert digest is not None
    assert weights is not None
    return digest, weights


@pytest.mark.parametrize(
    ("family", "dtype", "learner"),
    [
        ("qwen3", "bfloat16", {}),
        ("qwen3_moe", "float32", {}),
        ("llama", "bfloat16", {"lora": {"rank": 2, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}}),
    ],
)
def test_a_checkpoint_gives_the_bytes_that_were_published(
    tmp_path: Path, family: str, dtype: str, learner: dict[str, Any]
) -> None:
    config = trained_config(tmp_path / "model", family=family, dtype=dtype, **learner)
    digest, weights = checkpoint(config, tmp_path)
    stored = StoredVersions(config, tmp_path)
    assert (stored.newest(before=9), stored.newest(before=VERSION)) == (VERSION, None)
    assert stored.tensors(6) is None
    tensors = stored.tensors(VERSION)
    assert tensors is not None
    file = WeightsFile.write(tensors)
    assert file.keys() == weights.keys()
    assert all(torch.equal(file[name], tensor) for name, tensor in weights.items())
    assert file.digest == digest
    (manifest,) = manifests(tmp_path / "checkpoints")
    damaged = manifest.directory / manifest.files[0].path
    first = damaged.read_bytes()[:1]
    with damaged.open("r+b") as file_of_it:
        file_of_it.write(bytes([first[0] ^ 1]))
    assert stored.newest(before=9) is None


class Process:
    """A learner's rank or a rollout actor, each on a node of its own."""

    def __init__(self, config: Config, run_dir: Path, node: str) -> None:
        self._transport = ObjectStoreTransport(str(run_dir), stored=StoredVersions(config, run_dir))
        self._transport._notes = NodeNotes(str(run_dir), node)

    def publish(self, weights: dict[str, torch.Tensor]) -> tuple[WeightsHandle, int]:
        return self._transport.publish(VERSION, NamedTensors.of(weights)), os.getpid()

    def fetch(self, handle: WeightsHandle) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._transport.fetch(handle, timeout_s=60.0).items()}

    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> Any:
        return self._transport.read(version, offset, num_bytes, delta=delta)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


def test_a_live_version_is_fetched_after_rank_0_was_killed(tmp_path: Path, cluster: None) -> None:
    config = trained_config(tmp_path / "model", family="qwen3", dtype="bfloat16")
    digest, weights = checkpoint(config, tmp_path)
    rank, late = (ray.remote(num_cpus=0)(Process).remote(config, tmp_path, node) for node in ("a", "b"))
    handle, process = ray.get(rank.publish.remote(weights), timeout=60.0)
    assert handle.digest == digest
    os.kill(process, signal.SIGKILL)
    fetched = ray.get(late.fetch.remote(handle), timeout=60.0)
    assert all(torch.equal(fetched[name], tensor) for name, tensor in weights.items())
    of_another = ray.get(late.fetch.remote(WeightsHandle(version=VERSION, location=None)), timeout=60.0)
    assert of_another.keys() == weights.keys()
    changed = dataclasses.replace(handle, digest="0" * 16, location=None)
    other = ray.remote(num_cpus=0)(Process).remote(config, tmp_path, "c")
    with pytest.raises(WeightsLost, match=f"the checkpoint's have the digest {digest}, published was 0000"):
        ray.get(other.fetch.remote(changed), timeout=60.0)


def test_what_is_gone_from_the_shared_directory_comes_out_of_the_checkpoint(tmp_path: Path) -> None:
    config = trained_config(tmp_path / "model", family="llama", dtype="float32")
    digest, weights = checkpoint(config, tmp_path)
    transport = FilesystemTransport(tmp_path / "weights", stored=StoredVersions(config, tmp_path))
    gone = WeightsHandle(version=VERSION, location=str(tmp_path / "weights" / "gone"), digest=digest)
    file = transport.fetch(gone, timeout_s=10.0)
    assert all(torch.equal(file[name], tensor) for name, tensor in weights.items())
    with pytest.raises(WeightsLost, match=r"version 5 are lost: they are gone .*, and no checkpoint is of them"):
        transport.fetch(dataclasses.replace(gone, version=5), timeout_s=10.0)
