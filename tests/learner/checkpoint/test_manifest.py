"""The manifest that commits a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint import manifest as checkpoint
from pmdflow.learner.checkpoint.manifest import (
    CheckpointFile,
    Manifest,
    commit_checkpoint,
    manifest_at,
    manifests,
    newest_manifest,
    oldest_manifest,
    prune,
)
from tests.support.checkpoint_files import written

torch.set_num_threads(1)


def write_checkpoint(root: Path, iteration: int) -> Manifest:
    manifest = Manifest.new(root, iteration=iteration, version=iteration + 1, lsn=100 * iteration)
    (manifest.writing / "learner").mkdir(parents=True)
    (manifest.writing / "learner" / "shard").write_bytes(bytes([iteration]) * 50)
    (manifest.writing / "meta").write_text("x")
    return commit_checkpoint(root, manifest, written(manifest.writing))


def test_manifest_round_trip(tmp_path):
    root = tmp_path / "checkpoints"
    assert newest_manifest(root) is None
    assert oldest_manifest(root) is None
    for iteration in (2, 9, 10):
        write_checkpoint(root, iteration)
    newest = newest_manifest(root)
    assert (newest.iteration, newest.version, newest.lsn) == (10, 11, 1000)
    assert newest.claims == tuple(range(1, 11))
    assert newest.directory == root / "iteration-000010"
    assert sorted(file.path for file in newest.files) == ["learner/shard", "meta"]
    assert oldest_manifest(root).iteration == 2
    assert manifest_at(root, 9).lsn == 900
    with pytest.raises(PmdflowError, match="2, 9, 10"):
        manifest_at(root, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: made.path.write_bytes(made.path.read_bytes()[:-40]),
        lambda made: made.path.write_text("[]"),
        lambda made: made.path.unlink(),
        lambda made: made.directory.rename(made.writing),
        lambda made: (made.directory / "meta").unlink(),
        lambda made: (made.directory / "learner" / "shard").write_bytes(b"short"),
        lambda made: (made.directory / "learner" / "shard").write_bytes(b"\xff" * 50),
    ],
)
def test_an_incomplete_checkpoint_is_ignored_and_can_be_written_again(tmp_path, damage):
    write_checkpoint(tmp_path, 1)
    damage(write_checkpoint(tmp_path, 2))
    assert newest_manifest(tmp_path).iteration == 1
    leftover = Manifest.new(tmp_path, iteration=2, version=3, lsn=0).writing
    if leftover.exists():
        for path in sorted(leftover.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        leftover.rmdir()
    write_checkpoint(tmp_path, 2)
    assert newest_manifest(tmp_path).iteration == 2


def test_prune_keeps_the_newest_and_removes_orphans(tmp_path):
    for iteration in range(1, 6):
        write_checkpoint(tmp_path, iteration)
    (tmp_path / "iteration-000006.tmp").mkdir()
    (tmp_path / "iteration-000007").mkdir()
    (tmp_path / "iteration-000007.json.tmp").write_text("{")
    (tmp_path / "iteration-000007.json.01ab45ef.tmp").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "iteration-000003" / "meta").unlink()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iteration-000004",
        "iteration-000004.json",
        "iteration-000005",
        "iteration-000005.json",
        "notes.txt",
    ]
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)


def test_commit_refuses_nothing_and_another_root(tmp_path):
    with pytest.raises(ValueError, match="holds no file"):
        commit_checkpoint(tmp_path, Manifest.new(tmp_path, iteration=1, version=1, lsn=1), [])
    with pytest.raises(ValueError, match="not of"):
        commit_checkpoint(tmp_path, Manifest.new(tmp_path / "other", iteration=1, version=1, lsn=1), [])


def test_commit_reads_no_file_and_refuses_what_was_not_written(tmp_path, monkeypatch):
    manifest = Manifest.new(tmp_path, iteration=1, version=1, lsn=1)
    manifest.writing.mkdir()
    (manifest.writing / "shard").write_bytes(b"0123")
    files = written(manifest.writing)
    with pytest.raises(PmdflowError, match="holds shard with 4 bytes, its writer says 5"):
        commit_checkpoint(tmp_path, manifest, [replace(files[0], size=5)])
    with pytest.raises(PmdflowError, match="holds lost with no bytes, its writer says 7"):
        commit_checkpoint(tmp_path, manifest, [*files, CheckpointFile(path="lost", size=7, crc32=0)])
    (manifest.writing / "more").write_bytes(b"")
    with pytest.raises(PmdflowError, match="holds more, which no learner rank says it wrote"):
        commit_checkpoint(tmp_path, manifest, files)
    (manifest.writing / "more").unlink()
    monkeypatch.setattr(checkpoint, "checksum", None)
    commit_checkpoint(tmp_path, manifest, files)
    assert [found.files for found in manifests(tmp_path)] == [tuple(files)]
