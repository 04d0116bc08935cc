"""Old archive parts go, and only such as nothing needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.store.archive import part_iteration, parts
from pmdflow.store.archive.pruning import prune_parts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with ten parts."""
    for number in range(1, 11):
        part = tmp_path / "archive" / f"part-{number:06d}.zarr"
        part.mkdir(parents=True)
        (part / "zarr.json").write_text("{}")
    return tmp_path


def left(run: Path) -> list[int]:
    return [part_iteration(path) for path in parts(run)]


def test_the_newest_are_kept(run: Path) -> None:
    assert prune_parts(run, keep=3, through=10) == [1, 2, 3, 4, 5, 6, 7]
    assert left(run) == [8, 9, 10]
    assert prune_parts(run, keep=3, through=10) == []


def test_what_is_not_evicted_is_kept_however_old(run: Path) -> None:
    assert prune_parts(run, keep=1, through=4) == [1, 2, 3, 4]
    assert left(run) == [5, 6, 7, 8, 9, 10]


def test_fewer_than_are_kept_stay(run: Path) -> None:
    assert prune_parts(run, keep=99, through=10) == []
    assert len(left(run)) == 10


def test_what_a_crash_left_half_deleted_is_no_part_and_goes(run: Path) -> None:
    (run / "archive" / "part-000001.zarr").rename(run / "archive" / "part-000001.zarr.gone")
    assert left(run)[0] == 2
    prune_parts(run, keep=99, through=0)
    assert not list((run / "archive").glob("*.gone"))
