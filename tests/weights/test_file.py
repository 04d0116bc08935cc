"""The file of a version: what safetensors reads, its digest, what writing costs, and a thread that is not held up."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pmdflow.weights.blocks import BLOCK_BYTES, digest_of
from pmdflow.weights.file import NamedTensors, WeightsFile, write_file

MIXED = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5).bfloat16(),
    "none": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "long": torch.arange(5),
    "large": torch.randn(BLOCK_BYTES // 4 + 3),
}


def test_it_is_a_safetensors_file_of_what_was_given() -> None:
    file = WeightsFile.write(NamedTensors.of(MIXED))
    read = safetensors.torch.load_file(file.path)
    assert read.keys() == file.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        for found in (read[name], file[name]):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    with pytest.raises(KeyError):
        file["other"]


def test_of_tied_weights_the_first_is_written() -> None:
    shared = torch.randn(4, 2)
    assert list(WeightsFile.write(NamedTensors.of({"embed": shared, "norm": torch.ones(2), "head": shared}))) == [
        "embed",
        "norm",
    ]


def test_the_digest_is_that_of_the_bytes_however_they_came() -> None:
    file = WeightsFile.write(NamedTensors.of(MIXED))
    assert digest_of(file.descriptor) == file.digest
    size = os.fstat(file.descriptor).st_size
    for at in (0, 9, BLOCK_BYTES - 1, BLOCK_BYTES, size - 1):
        (byte,) = os.pread(file.descriptor, 1, at)
        os.pwrite(file.descriptor, bytes([byte ^ 16]), at)
        assert digest_of(file.descriptor) != file.digest, f"byte {at}"
        os.pwrite(file.descriptor, bytes([byte]), at)
    assert digest_of(file.descriptor) == file.digest


def test_the_digest_covers_how_many_bytes_there_are(tmp_path: Path) -> None:
    found = set()
    for count in (1, 8, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1):
        path = tmp_path / f"{count}"
        path.write_bytes(bytes(count))
        with path.open("rb") as file:
            found.add(digest_of(file.fileno()))
    assert len(found) == 5


def test_a_tensor_that_is_not_what_was_said_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.int32)):
            with pytest.raises(ValueError, match="norm is "):
                write_file(file.fileno(), NamedTensors(specs={"norm": (torch.float32, (2,))}, values=[wrong]))
        with pytest.raises(ValueError, match="no safetensors file holds"):
            write_file(file.fileno(), NamedTensors.of({"norm": torch.zeros(2, dtype=torch.complex64)}))


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Ticking:
    """A thread that wakes up every millisecond: its longest sleep, and the most memory it saw."""

    def __enter__(self) -> Self:
        self.stall_s, self.peak_bytes, self._stop = 0.0, anonymous_bytes(), False
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._stop:
            time.sleep(0.001)
            now = time.perf_counter()
            self.stall_s, last = max(self.stall_s, now - last), now
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def test_pages_that_are_mapped_before_take_no_faults_later() -> None:
    made = WeightsFile.write(NamedTensors.of({"a": torch.ones(4 * BLOCK_BYTES, dtype=torch.uint8)}))
    faults = []
    for is_populated in (False, True):
        file = WeightsFile.open(made.path, made.digest)
        if is_populated:
            file.populate()
        into = torch.ones(4 * BLOCK_BYTES, dtype=torch.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        into.copy_(file["a"])
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[1] < faults[0] / 4, faults
    WeightsFile.write(NamedTensors(specs={}, values=[])).populate()


def test_only_the_file_is_let_go() -> None:
    names = [f"a.tensor.with.a.long.name.{number}" for number in range(500)]  # a header of many pages
    weights = {name: torch.ones(3000) for name in names} | {"empty": torch.zeros(0)}
    file = WeightsFile.write(NamedTensors.of(weights))
    file.populate()
    begin, end = file._mapping.begin, file._mapping.begin + file._mapping.num_bytes
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "pmdflow-weights" in line]
    assert f"{begin:x}-{end:x}" in {fields[0] for fields in maps}
    kept = file[names[0]]
    file.close()
    assert torch.equal(kept, torch.ones(3000)), "who still reads it has it"
    only_empty = WeightsFile.write(NamedTensors.of({"empty": torch.zeros(0)}))
    only_empty.populate()
    assert only_empty._mapping.num_bytes == 0


@pytest.mark.parametrize("mebibytes", [64, pytest.param(512, marks=pytest.mark.nightly)])
def test_writing_holds_one_tensor_and_no_thread(mebibytes: int) -> None:
    rows, layers = 1 << 11, mebibytes // 4
    specs = {f"layer.{index}": (torch.bfloat16, (rows, 1024)) for index in range(layers)}

    def values() -> Iterator[Tensor]:
        for index in range(layers):
            yield torch.full((rows, 1024), float(index)).to(torch.bfloat16)

    WeightsFile.write(NamedTensors.of({"warm": torch.zeros(BLOCK_BYTES)}))
    before, total = anonymous_bytes(), mebibytes << 20
    with Ticking() as idle:
        time.sleep(mebibytes / 256)
    with Ticking() as ticking:
        started = time.perf_counter()
        file = WeightsFile.write(NamedTensors(specs=specs, values=values()))
        took_s = time.perf_counter() - started
    size, extra = os.fstat(file.descriptor).st_size, ticking.peak_bytes - before
    stalls = f"stall {ticking.stall_s:.3f} s (idle {idle.stall_s:.3f} s)"
    print(f"\n{mebibytes} MiB: {took_s:.2f} s, {stalls}, {extra >> 20} MiB")
    assert total <= size < 1.01 * total
    assert extra < max(0.2 * total, 64 << 20)
    if mebibytes > 64:  # a shorter one says more of the machine's other work
        assert ticking.stall_s < 0.05 + 3 * idle.stall_s
    other = WeightsFile.open(file.path, file.digest)
    assert other["layer.3"].data_ptr() != file["layer.3"].data_ptr()
    assert os.fstat(other.descriptor).st_ino == os.fstat(file.descriptor).st_ino, "one file"
    assert anonymous_bytes() - before < max(0.2 * total, 64 << 20), "a map is not a copy"
