"""Who goes on with which trajectories, asked without a look at a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.store import TrajectoryStore
from tests.support.filled_store import admit, lease_all, ready_store, segment


def test_epochs_of_live_trajectories_are_told_and_no_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready_store(tmp_path) as store:
        admit(store)
        first, second = lease_all(store)
        store.append([segment(first, 3)])
        store.fork(first.trajectory, first.epoch, 1)
        monkeypatch.setattr(TrajectoryStore, "trajectory", None)
        for file in tmp_path.glob("*.log"):
            file.unlink()  # it holds them open, and what is not read is not missed
        found = store.epochs([first.trajectory, second.trajectory, 77])
    assert found == {first.trajectory: first.epoch + 1, second.trajectory: second.epoch}
