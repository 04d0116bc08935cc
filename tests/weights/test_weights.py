"""The transports give back what was published, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pmdflow.errors import PmdflowError, WeightsLost
from pmdflow.weights import object_store
from pmdflow.weights.blocks import BLOCK_BYTES
from pmdflow.weights.file import NamedTensors, WeightsFile
from pmdflow.weights.filesystem import FilesystemTransport
from pmdflow.weights.held import NodeNotes
from pmdflow.weights.object_store import ObjectStoreTransport
from pmdflow.weights.transport import Transport, WeightsHandle

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture(params=["filesystem", "object_store"])
def transport(request: pytest.FixtureRequest, tmp_path: Path, cluster: None) -> Transport:
    if request.param == "filesystem":
        return FilesystemTransport(tmp_path / "weights")
    return ObjectStoreTransport(str(tmp_path), kept=2)


def test_what_is_published_is_fetched_bit_for_bit(transport: Transport) -> None:
    handle = transport.publish(3, NamedTensors.of(WEIGHTS))
    fetched = transport.fetch(handle, timeout_s=10.0)
    assert handle.version == 3
    assert fetched.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert fetched[name].dtype == tensor.dtype
        assert torch.equal(fetched[name], tensor)


def test_an_older_version_can_still_be_read_beside_the_newest(transport: Transport) -> None:
    older = transport.publish(1, NamedTensors.of(WEIGHTS))
    transport.publish(2, NamedTensors.of({"a": torch.zeros(1)}))
    assert torch.equal(transport.fetch(older, timeout_s=10.0)["a"], WEIGHTS["a"])


def test_the_directory_shows_whole_files_only_and_forgets_old_versions(tmp_path: Path) -> None:
    transport = FilesystemTransport(tmp_path)
    handles = [transport.publish(version, NamedTensors.of(WEIGHTS)) for version in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "version-000002.safetensors",
        "version-000003.safetensors",
    ]
    with pytest.raises(WeightsLost, match="version 0"):
        transport.fetch(handles[0], timeout_s=1.0)


def test_what_cannot_be_written_is_taken_away_again(tmp_path: Path) -> None:
    transport = FilesystemTransport(tmp_path)
    with pytest.raises(PmdflowError, match="learner rank 0: ValueError: a is "):
        transport.publish(1, NamedTensors(specs={"a": (torch.int8, (1,))}, values=[torch.zeros(1)]))
    assert not list(tmp_path.iterdir())


def test_a_note_that_a_full_disk_cut_short_is_passed_over(tmp_path: Path) -> None:
    notes, handle = NodeNotes(str(tmp_path), "short"), WeightsHandle(version=1, location=None)
    file = WeightsFile.write(NamedTensors.of(WEIGHTS))
    notes.add(1, file)
    with notes._path(1).open("a") as lines:
        lines.write(f"{file.digest} 12")
    found = notes.find(handle)
    assert found is not None and found.digest == file.digest


def test_bytes_that_changed_on_the_way_are_refused(transport: Transport) -> None:
    handle = transport.publish(3, NamedTensors.of(WEIGHTS))
    with pytest.raises((PmdflowError, WeightsLost)):
        transport.fetch(dataclasses.replace(handle, digest="0" * 16), timeout_s=10.0)


class Holder:
    """A process with a transport, as a learner and a rollout actor have one; `node` pretends to be another."""

    def __init__(self, run: str, node: str | None = None) -> None:
        self._transport = ObjectStoreTransport(run)
        if node is not None:
            self._transport._notes = NodeNotes(run, node)

    def publish(self, version: int) -> WeightsHandle:
        return self._transport.publish(version, NamedTensors.of(WEIGHTS | {"c": torch.arange(3 << 20)}))

    def pid(self) -> int:
        return os.getpid()

    def wait_at_most(self, seconds: float) -> None:
        """For a piece of another process."""
        object_store.PIECE_TIMEOUT_S = seconds

    def end_after_a_piece(self, how: signal.Signals) -> None:
        """Of the next fetch."""
        object_store.PIECE_BYTES = BLOCK_BYTES
        write = object_store.BlockWriter.write

        def write_and_end(writer: Any, piece: Any) -> None:
            write(writer, piece)
            os.kill(os.getpid(), how)

        object_store.BlockWriter.write = write_and_end  # type: ignore[method-assign]

    def fetch(self, handle: WeightsHandle, *, timeout_s: float = 60.0) -> tuple[int, int, float]:
        """Inode of the file, process id, and what the weights are."""
        file = self._transport.fetch(handle, timeout_s=timeout_s)
        inode = os.fstat(file.descriptor).st_ino
        return inode, os.getpid(), int(file["c"].sum()) + float(file["b"].sum())

    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> Any:
        return self._transport.read(version, offset, num_bytes, delta=delta)


EXPECTED = int(torch.arange(3 << 20).sum()) - 0.75


@pytest.fixture
def holders(tmp_path: Path, cluster: None) -> Callable[..., Any]:
    return lambda node=None: ray.remote(num_cpus=0)(Holder).remote(str(tmp_path), node)


def ask(ref: Any) -> Any:
    return ray.get(ref, timeout=60.0)


def state(process: int) -> str:
    """The letter of /proc; X: it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "X"


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_processes_of_a_node_map_one_file_which_outlives_who_made_it(holders: Callable[..., Any]) -> None:
    learner, first, second = holders(), holders(), holders()
    handle = ask(learner.publish.remote(7))
    inode, _, value = ask(first.fetch.remote(handle))
    ray.kill(learner)
    again, other, _ = ask(second.fetch.remote(handle))
    assert (again, value) == (inode, EXPECTED)
    assert other != ask(first.fetch.remote(handle))[1]


def test_another_node_copies_it_once_from_the_learner_or_a_peer(holders: Callable[..., Any]) -> None:
    learner, near, far, beside, third = holders(), holders(), holders("b"), holders("b"), holders("c")
    handle = ask(learner.publish.remote(7))
    home = ask(near.fetch.remote(handle))[0]
    inode, _, value = ask(far.fetch.remote(handle))
    assert inode != home
    assert value == EXPECTED
    assert ask(beside.fetch.remote(handle))[0] == inode
    ray.kill(learner)
    with_peers = dataclasses.replace(handle, peers=(far,))
    assert ask(third.fetch.remote(with_peers))[2] == EXPECTED


def test_a_peer_that_is_stopped_holds_nobody(holders: Callable[..., Any]) -> None:
    learner, stopped, third = holders(), holders("b"), holders("c")
    handle = ask(learner.publish.remote(7))
    ask(stopped.fetch.remote(handle))
    ask(third.wait_at_most.remote(1.0))
    process = ask(stopped.pid.remote())
    os.kill(process, signal.SIGSTOP)
    try:
        assert ask(third.fetch.remote(dataclasses.replace(handle, peers=(stopped,))))[2] == EXPECTED
    finally:
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_ends_in_mid_fetch_holds_neither_its_node_nor_the_learner(
    holders: Callable[..., Any], how: signal.Signals
) -> None:
    learner, ended, beside = holders(), holders("b"), holders("b")
    handle = ask(learner.publish.remote(7))
    process = ask(ended.pid.remote())
    ask(ended.end_after_a_piece.remote(how))
    ended.fetch.remote(handle)
    wait_until(lambda: state(process) in "TZX")
    try:
        assert ask(beside.fetch.remote(handle, timeout_s=4.0))[2] == EXPECTED
        assert ask(beside.fetch.remote(ask(learner.publish.remote(8))))[2] == EXPECTED
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_weights_that_nobody_has_any_more_are_lost_by_name(holders: Callable[..., Any]) -> None:
    learner, far = holders(), holders("b")
    handle = ask(learner.publish.remote(7))
    ask(learner.publish.remote(8))
    with pytest.raises(WeightsLost, match=r"version 7 are lost: those that had them died .*version 7 any more"):
        ask(far.fetch.remote(handle))
    newest = ask(learner.publish.remote(9))
    ray.kill(learner)
    with pytest.raises(WeightsLost, match="version 9 are lost: those that had them died"):
        ask(far.fetch.remote(newest))
