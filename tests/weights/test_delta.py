"""The delta of two files makes the second of the first, bit for bit; whoever lacks the first gets all of the second."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pmdflow.weights.blocks import BLOCK_BYTES
from pmdflow.weights.delta import patch
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.shares import ALONE, write_shares
from pmdflow.weights.transport import WeightsHandle

Weights = dict[str, Tensor]
WORDS = 3 * BLOCK_BYTES // 4 + 5
"""One and a half blocks of two-byte words, and a few."""


def weights(seed: int = 0) -> Weights:
    made = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(WORDS, generator=made).bfloat16(), "b": torch.randn(3, generator=made)}


def changed(before: Weights, places: list[int]) -> Weights:
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["a"].view(torch.int16)[places] ^= 1
    return after


def written(after: Weights, base: WeightsFile) -> WeightsFile:
    return write_shares(NamedTensors.of(after), ALONE, node="a", holder=None, base=base)[0]


def content(file: WeightsFile) -> bytes:
    return os.pread(file.descriptor, os.fstat(file.descriptor).st_size, 0)


@settings(max_examples=20)
@given(places=st.lists(st.integers(0, WORDS - 1), max_size=40, unique=True))
def test_any_change_of_words_is_carried_in_four_bytes_each(places: list[int]) -> None:
    base = WeightsFile.write(NamedTensors.of(weights()))
    file = written(changed(weights(), places), base)
    assert file.delta is not None
    assert file.delta.num_bytes <= 4 * len(places) + 2 * 256
    made = WeightsFile.make(lambda into: patch(base.descriptor, file.delta.records(), into=into))
    assert made.digest == file.digest
    assert content(made) == content(file)


def test_a_block_that_changed_throughout_is_carried_whole() -> None:
    before = {"a": torch.zeros(2 * BLOCK_BYTES, dtype=torch.bfloat16)}
    base = WeightsFile.write(NamedTensors.of(before))
    words = BLOCK_BYTES // 2
    file = written(changed(before, [0, *range(words + 9, 2 * words)]), base)
    assert file.delta is not None
    assert BLOCK_BYTES < file.delta.num_bytes < BLOCK_BYTES + 1000
    made = WeightsFile.make(lambda into: patch(base.descriptor, file.delta.records(), into=into))
    assert made.digest == file.digest
    assert content(made) == content(file)


def test_there_is_no_delta_that_is_longer_than_half_the_file_or_of_another_model() -> None:
    base = WeightsFile.write(NamedTensors.of(weights()))
    assert written(weights(1), base).delta is None
    assert written({**weights(), "c": torch.ones(2)}, base).delta is None


class Node:
    """A process with a transport, on a node of its own."""

    def __init__(self, run: str, name: str) -> None:
        self._transport = ObjectStoreTransport(run, delta=True)
        self._transport._notes = NodeNotes(run, name)

    def publish(self, version: int, weights: Weights) -> WeightsHandle:
        return self._transport.publish(version, NamedTensors.of(weights))

    def fetch(self, handle: WeightsHandle) -> tuple[Weights, dict[str, int]]:
        """The weights, and what came over the wire for them."""
        before = self._transport.received.copy()
        file = self._transport.fetch(handle, timeout_s=60.0)
        came = self._transport.received.copy()
        came.subtract(before)
        return {name: tensor.clone() for name, tensor in file.items()}, dict(came)

    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> Any:
        return self._transport.read(version, offset, num_bytes, delta=delta)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture
def nodes(tmp_path: Path, cluster: None) -> Callable[[str], Any]:
    return lambda name: ray.remote(num_cpus=0)(Node).remote(str(tmp_path), name)


def ask(ref: Any) -> Any:
    return ray.get(ref, timeout=60.0)


def alike(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_node_with_the_version_before_gets_what_changed_and_others_get_all(nodes: Callable[[str], Any]) -> None:
    learner, follower, late = nodes("a"), nodes("b"), nodes("c")
    first, second = weights(), changed(weights(), [0, 5, WORDS - 1])
    whole = WORDS * 2
    found, came = ask(follower.fetch.remote(ask(learner.publish.remote(1, first))))
    assert alike(found, first)
    assert came["fetched_bytes"] > whole
    handle = ask(learner.publish.remote(2, second))
    found, came = ask(follower.fetch.remote(handle))
    assert alike(found, second)
    assert came["fetched_bytes"] < 1000
    assert came["fetched_deltas"] == 1
    found, came = ask(late.fetch.remote(handle))
    assert alike(found, second)
    assert came["fetched_bytes"] > whole
    third = changed(second, [7])
    handle = ask(learner.publish.remote(3, third))
    ask(follower.fetch.remote(handle))
    ray.kill(learner)
    by_peer = replace(handle, peers=(follower,))
    found, came = ask(late.fetch.remote(by_peer))
    assert alike(found, third)
    assert came["fetched_bytes"] < 1000, "a peer that got the delta gives it on"


def test_a_base_of_other_bytes_is_not_patched(nodes: Callable[[str], Any]) -> None:
    learner, follower = nodes("a"), nodes("b")
    ask(follower.fetch.remote(ask(learner.publish.remote(1, weights(1)))))
    again = nodes("a2")
    ask(again.publish.remote(1, weights()))
    second = changed(weights(), [3])
    found, came = ask(follower.fetch.remote(ask(again.publish.remote(2, second))))
    assert alike(found, second)
    assert (came.get("fetched_deltas", 0), came["fetched_bytes"] > 2 * WORDS) == (0, True)
