"""How a folder comes about: whole or not at all, in bounded memory, and beside a run that prunes."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pmdflow.errors import PmdflowError
from pmdflow.export.folder import new_folder
from pmdflow.export.held import HeldCheckpoint
from pmdflow.export.options import ExportOptions
from pmdflow.export.write import export
from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, manifests, newest_manifest, prune
from tests.support.checkpoint_files import written
from tests.support.paths import ROOT
from tests.support.trained_run import MIB, TrainedRun, synthetic_run

EXPORT = """
import sys
from pathlib import Path
from pmdflow.export.options import ExportOptions
from pmdflow.export.write import export

def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

*runs, out = map(Path, sys.argv[1:])
for number, run in enumerate(runs):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    export(run, out / str(number), ExportOptions(dtype="bfloat16", shard_bytes=16 << 20))
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("large"), num_layers=24, hidden_size=512)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("small"), num_layers=1, hidden_size=32)


def test_memory_is_bounded_by_a_file_and_a_tensor_not_by_the_model(large: Path, small: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(small), str(large), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with HeldCheckpoint.of(large) as checkpoint:
        sizes = [4 * shape.numel() for shape in checkpoint.shapes.values()]
    # A file's tensors; of the tensor that is being read the place and the piece of the checkpoint, and its copy.
    bound = 16 * MIB + 3 * max(sizes) + 32 * MIB  # and what is imported on the way
    grown = int(done.stdout)
    print(f"\n{sum(sizes) / MIB:.0f} MiB of weights: {grown / MIB:.1f} MiB of memory, bound {bound / MIB:.1f} MiB")
    assert sum(sizes) > 4 * bound
    assert grown <= bound
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 8


def test_a_killed_export_leaves_nothing_that_looks_whole(large: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", EXPORT, str(large), str(tmp_path)], cwd=ROOT)
    partial, deadline = tmp_path / ".0.pmdflow-partial", time.monotonic() + 100
    while not list(partial.glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    (partial / "left-over.txt").write_text("by the one that was killed")
    export(large, tmp_path / "0", ExportOptions(dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert not (tmp_path / "0" / "left-over.txt").exists()


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(large: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(PmdflowError, match=r"(?s)model-00001-of-.*hint: free space"):
            export(large, tmp_path / "out", ExportOptions(shard_bytes=16 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("empty", [False, True])
def test_two_exports_to_one_folder_do_not_mix(empty: bool, tmp_path: Path) -> None:
    if empty:
        (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as first:
        (first / "a").write_text("a")
        with pytest.raises(PmdflowError, match="another export is writing"), new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "a").read_text() == "a"
    with pytest.raises(PmdflowError, match="is not an empty folder"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".", "link", "../out"])
def test_an_empty_folder_is_filled_and_never_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    before = out.stat().st_ino  # a mount, or where a shell stands, cannot be another
    monkeypatch.chdir(tmp_path if name == "link" else out)
    with pytest.raises(PmdflowError, match="half: No such file"), new_folder(Path(name)) as folder:
        (folder / "no" / "half").write_text("half")
    assert not any(out.iterdir())
    (out / ".pmdflow-partial").mkdir()
    (out / ".pmdflow-partial" / "half").write_text("of one that was killed")
    with new_folder(Path(name)) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "templates").mkdir()
        assert not (out / "config.json").exists()
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "templates"]
    assert out.stat().st_ino == before and (tmp_path / "link").is_symlink()
    with pytest.raises(PmdflowError, match="is not an empty folder"), new_folder(Path(name)):
        pass


def test_what_makes_a_folder_a_model_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    rename = Path.rename

    def note(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note)
    with new_folder(tmp_path) as folder:
        for name in ("README.md", "adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("")
    assert renamed == ["README.md", "model.safetensors", "tokenizer.json", "adapter_config.json", "config.json"]


def test_a_folder_that_is_somebodys_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_checkpoint_that_is_pruned_while_it_is_held_is_read_to_its_end(tmp_path: Path) -> None:
    with TrainedRun(tmp_path) as run:
        run.train()
        with HeldCheckpoint.of(run.path, 1) as before:
            expected = before.read(before.shapes)
        with HeldCheckpoint.of(run.path, 1) as held:
            run.train(keep=1)
            assert not held.manifest.directory.exists()
            found = held.read(held.shapes)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(PmdflowError, match="kept iterations: 2"):
        HeldCheckpoint.of(run.path, 1)


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(small: Path, tmp_path: Path) -> None:
    root, first = tmp_path / "checkpoints", small / "checkpoints" / "iteration-000001"
    for number in (1, 2, 3):
        manifest = Manifest.new(root, iteration=number, version=number, lsn=0)
        shutil.copytree(first, manifest.writing)
        commit_checkpoint(root, manifest, written(manifest.writing))
    newest = [max(manifest.directory.iterdir(), key=lambda path: path.stat().st_size) for manifest in manifests(root)]
    flip(newest[2])
    newest[1].unlink()
    with HeldCheckpoint.of(tmp_path) as held:
        assert held.manifest == newest_manifest(root) and held.manifest.iteration == 1
    with pytest.raises(PmdflowError, match=r"checkpoint of iteration 3 is damaged: .*iteration-000003.* other bytes"):
        HeldCheckpoint.of(tmp_path, 3)
    with pytest.raises(PmdflowError, match=r"checkpoint of iteration 2 is damaged: .*iteration-000002"):
        HeldCheckpoint.of(tmp_path, 2)
    newest[0].write_bytes(b"short")
    with pytest.raises(PmdflowError, match=r"none of its checkpoints \(iterations 1, 2, 3\) is whole: .*000003"):
        HeldCheckpoint.of(tmp_path)
    shutil.rmtree(root)
    with pytest.raises(PmdflowError, match="has no checkpoint yet"):
        HeldCheckpoint.of(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def test_the_newest_checkpoint_is_found_whole_however_fast_they_are_pruned(small: Path, tmp_path: Path) -> None:
    root, first = tmp_path / "checkpoints", small / "checkpoints" / "iteration-000001"
    root.mkdir()
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            manifest = Manifest.new(root, iteration=number, version=number, lsn=0)
            shutil.copytree(first, manifest.writing)
            commit_checkpoint(root, manifest, written(manifest.writing))
            prune(root, 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline, seen = time.monotonic() + 30, set()
        while len(seen) < 10:
            assert time.monotonic() < deadline
            with HeldCheckpoint.of(tmp_path) as held:
                seen.add(held.manifest.iteration)
                assert held.read(["model.norm.weight"])["model.norm.weight"].shape == (32,)
    finally:
        over.set()
        writer.join()
