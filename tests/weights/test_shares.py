"""Ranks that write a share each make the file that one would, and nodes get it of them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pmdflow.errors import PmdflowError, WeightsLost
from pmdflow.learner.fsdp import all_ranks, free_address
from pmdflow.weights.blocks import BLOCK_BYTES
from pmdflow.weights.delta import DeltaWriter, patch
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.shares import Ranks, Share, write_shares
from pmdflow.weights.transport import WeightsHandle

BLOCK_WORDS = BLOCK_BYTES // 2


class Together:
    """Threads as ranks, the first `near` of them on node a, the others on b."""

    def __init__(self, count: int, near: int) -> None:
        self._count, self._near = count, near
        self._barrier = threading.Barrier(count)
        self._given: list[Any] = [None] * count

    def write(self, tensors: Callable[[int], NamedTensors], bases: list[WeightsFile | None]) -> list[Any]:
        """What each rank gets: its file and all shares, or an error."""

        def one(rank: int) -> Any:
            ranks = Ranks(rank=rank, count=self._count, gather=lambda value: self._gather(rank, value))
            node = "a" if rank < self._near else "b"
            try:
                return write_shares(tensors(rank), ranks, node=node, holder=None, base=bases[rank])
            except PmdflowError as error:
                return error

        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(one, range(self._count)))

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait(30.0)
        values = list(self._given)
        self._barrier.wait(30.0)
        return values


def content(file: WeightsFile, begin: int = 0, end: int | None = None) -> bytes:
    size = os.fstat(file.descriptor).st_size
    return os.pread(file.descriptor, (size if end is None else end) - begin, begin)


def weights(numels: list[int]) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(len(numels))
    return {f"w{index}": torch.randn(numel, generator=made) for index, numel in enumerate(numels)}


def in_bfloat16(values: dict[str, Tensor]) -> NamedTensors:
    """Float32 tensors of a bfloat16 file, as a learner has them."""
    specs = {name: (torch.bfloat16, tuple(values[name].shape)) for name in sorted(values)}
    return NamedTensors(specs=specs, values=(values[name] for name in sorted(values)))


numbers = st.sampled_from([1, 5, BLOCK_WORDS - 30, BLOCK_WORDS, 2 * BLOCK_WORDS + 3])


@settings(max_examples=25, deadline=None)
@given(
    numels=st.lists(numbers, min_size=1, max_size=4), count=st.integers(1, 5), near=st.integers(1, 5), data=st.data()
)
def test_shares_are_those_bytes_and_their_deltas_make_the_next(
    numels: list[int], count: int, near: int, data: st.DataObject
) -> None:
    before = weights(numels)
    whole = WeightsFile.write(NamedTensors.of({name: value.bfloat16() for name, value in before.items()}))
    bases = _whole(Together(count, near).write(lambda _: in_bfloat16(before), [None] * count), whole)
    after = {name: value.clone() for name, value in before.items()}
    for value in after.values():
        value[data.draw(st.integers(0, len(value) - 1))] += 1.0
    whole = WeightsFile.write(NamedTensors.of({name: value.bfloat16() for name, value in after.items()}))
    base = WeightsFile.write(in_bfloat16(before))
    results = Together(count, near).write(lambda _: in_bfloat16(after), list(bases))
    files = _whole(results, whole)
    shares: tuple[Share, ...] = results[0][1]
    if any(share.delta_bytes is None for share in shares):  # it is no shorter than a share
        assert all(file.delta is None for file in files)
        return
    records = b"".join(os.pread(file.delta.descriptor, 1 << 30, 0) for file in files if file.delta is not None)
    assert len(records) == sum(share.delta_bytes or 0 for share in shares)
    made = WeightsFile.make(lambda into: patch(base.descriptor, np.frombuffer(records, np.uint8), into=into))
    assert made.digest == whole.digest


def _whole(results: list[Any], expected: WeightsFile) -> list[WeightsFile]:
    """The ranks' files, which have the bytes that are expected."""
    for file, shares in results:
        assert file.digest == expected.digest
        assert [share.begin for share in shares[1:]] == [share.end for share in shares[:-1]]
        for share in shares:
            if share.file.inode == os.fstat(file.descriptor).st_ino:
                assert content(file, share.begin, share.end) == content(expected, share.begin, share.end)
    return [file for file, _ in results]


@pytest.mark.parametrize("which", [0, 2])
def test_a_rank_that_fails_fails_all_after_all_have_gone_through_the_tensors(which: int) -> None:
    through = [0, 0, 0]

    def tensors(rank: int) -> NamedTensors:
        def values() -> Iterator[Tensor]:
            for index in range(3):
                through[rank] += 1
                yield torch.zeros(2, dtype=torch.int32 if (rank, index) == (which, 1) else torch.float32)

        return NamedTensors(specs=dict.fromkeys("abc", (torch.float32, (2,))), values=values())

    results = Together(3, 2).write(tensors, [None] * 3)
    assert through == [3, 3, 3]
    assert all(f"learner rank {which}: ValueError: b is torch.int32" in str(error) for error in results)


def test_a_rank_without_memory_for_its_delta_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(DeltaWriter):
        def __init__(self, *args: Any, begin: int, end: int) -> None:
            if begin:
                raise OSError(errno.EMFILE, "no descriptor left")
            super().__init__(*args, begin=begin, end=end)

    numels = [3 * BLOCK_WORDS]
    base = WeightsFile.write(in_bfloat16(weights(numels)))
    monkeypatch.setattr("pmdflow.weights.shares.DeltaWriter", Full)
    results = Together(2, 1).write(lambda _: in_bfloat16(weights(numels)), [base, base])
    assert all("learner rank 1: OSError: " in str(error) for error in results)


class Process:
    """A learner rank or a rollout actor, on a node of its own name."""

    def __init__(self, run: str, node: str) -> None:
        torch.set_num_threads(1)
        self._transport = ObjectStoreTransport(run, delta=True)
        self._transport._notes = NodeNotes(run, node)
        self._ranks = Ranks()

    def address(self) -> str:
        return free_address("127.0.0.1")

    def join(self, master: str, rank: int, count: int) -> None:
        dist.init_process_group("gloo", init_method=f"tcp://{master}", rank=rank, world_size=count)
        self._ranks = all_ranks(rank)

    def publish(self, version: int, values: dict[str, Tensor]) -> WeightsHandle:
        return self._transport.publish(version, NamedTensors.of(values), self._ranks)

    def fetch(self, handle: WeightsHandle) -> tuple[dict[str, Tensor], int, dict[str, int]]:
        """The weights, the inode of their file, and what came over the wire."""
        before = self._transport.received.copy()
        file = self._transport.fetch(handle, timeout_s=60.0)
        came = self._transport.received.copy()
        came.subtract(before)
        inode = os.fstat(file.descriptor).st_ino
        return {name: tensor.clone() for name, tensor in file.items()}, inode, dict(came)

    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> Any:
        return self._transport.read(version, offset, num_bytes, delta=delta)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


def ask(*refs: Any) -> Any:
    return ray.get(list(refs), timeout=60.0)


def test_nodes_get_the_shares_of_ranks_on_several_nodes(tmp_path: Path, cluster: None) -> None:
    def process(node: str) -> Any:
        return ray.remote(num_cpus=0)(Process).remote(str(tmp_path), node)

    ranks = [process(node) for node in ("a", "a", "b")]
    near, far, late = process("a"), process("c"), process("d")
    (master,) = ask(ranks[0].address.remote())
    ask(*(one.join.remote(master, rank, 3) for rank, one in enumerate(ranks)))
    first = {"w": torch.arange(7 * BLOCK_WORDS // 2, dtype=torch.float32), "x": torch.ones(3)}
    size = sum(4 * len(tensor) for tensor in first.values())

    handles = ask(*(one.publish.remote(1, first) for one in ranks))
    assert len({handle.digest for handle in handles}) == 1
    handle = handles[0]
    ((found, _, came),) = ask(far.fetch.remote(handle))
    assert all(torch.equal(found[name], tensor) for name, tensor in first.items())
    assert came["fetched_bytes"] >= size
    ((found, inode, came),) = ask(near.fetch.remote(handle))
    assert all(torch.equal(found[name], tensor) for name, tensor in first.items())
    assert inode == handle.location[0].file.inode, "it is the file that the ranks of the node began"
    assert came["fetched_bytes"] == handle.location[2].end - handle.location[2].begin

    second = {"w": first["w"].clone(), "x": torch.zeros(3)}
    second["w"][[0, BLOCK_WORDS, 3 * BLOCK_WORDS]] += 1.0
    handle = ask(*(one.publish.remote(2, second) for one in ranks))[0]
    ((found, _, came),) = ask(far.fetch.remote(handle))
    assert all(torch.equal(found[name], tensor) for name, tensor in second.items())
    assert (came["fetched_deltas"], came["fetched_bytes"] < 2000) == (1, True)
    near2 = process("a")
    ((found, inode, came),) = ask(near2.fetch.remote(replace(handle, peers=(far,))))
    assert all(torch.equal(found[name], tensor) for name, tensor in second.items())
    assert inode == handle.location[0].file.inode, "also with peers"
    assert came["fetched_bytes"] == handle.location[2].end - handle.location[2].begin
    small = {"w": torch.ones(9)}
    handle = ask(*(one.publish.remote(3, small) for one in ranks))[0]
    for one in (near, far):  # the only block is that of the last rank
        ((found, _, _),) = ask(one.fetch.remote(handle))
        assert torch.equal(found["w"], small["w"])
    handle = ask(*(one.publish.remote(4, second) for one in ranks))[0]
    ask(far.fetch.remote(handle))
    ray.kill(ranks[1])
    with pytest.raises(WeightsLost, match="version 4 are lost: those that had them died"):
        ask(late.fetch.remote(handle))
    ((found, _, _),) = ask(late.fetch.remote(replace(handle, peers=(far,))))
    assert all(torch.equal(found[name], tensor) for name, tensor in second.items())
