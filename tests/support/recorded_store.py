"""Writes the store of `tests/fixtures/store-format4.tar.xz`: every kind of record, some behind a snapshot.

Run once, by the program whose format it keeps: `uv run python -m tests.support.recorded_store DIRECTORY`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.store import TrajectoryStore, encode_segments
from tests.support.filled_store import PROMPT, admit, complete, lease_all, open_store, quota, segment


def fill(directory: Path) -> TrajectoryStore:
    """A store with a trained and evicted claim, an undone one, groups of every state, and losses of every reason."""
    store = open_store(directory, max_staleness=1, max_attempts=1, straggler=(2, 5.0), file_bytes=4096, durability="os")
    store.publish(0)
    store.set_quota(quota(tokens_per_segment=40))
    for iteration in (1, 2, 3):
        version = iteration - 1
        admit(store, version, max_tokens=50)
        complete(store, count=30, version=version)
        assert store.claim(iteration, version, 0.0).status == "claimed"
        store.publish(iteration, iteration, {"filter": [2 * version], "veto": [2 * version + 1]} if version else None)
        store.set_quota(quota(iteration))
    store.commit(2)
    store.evict(1)
    store.uncommit(2)
    admit(store, 3, size=3)  # one member is late
    for lease, stop in zip(lease_all(store, version=3, now_s=1.0), ("stop", "stop", None), strict=True):
        store.append([segment(lease, 4, version=3, stop=stop)], now_s=1.0)
    for item in store.unscored(9, 60.0, 0.0, now_s=1.0):
        store.score(item.trajectory, 0, "scored", 0.5, {"right": 0.5, "short": 1.0}, now_s=1.0)
    assert store.unscored(9, 60.0, 0.0, now_s=9.0) == []
    store.take_late()
    admit(store, 4)
    store.discard(admit(store, 5), "its answer is wrong")
    first, second = lease_all(store, version=3)
    columns = {"experts": np.arange(10, dtype=np.int16).reshape(5, 2)}
    store.append(encode_segments([segment(first, 5, version=3)], extra=[columns]))
    store.append([segment(second, 3, version=3, stop="stop")])
    store.admit("eval-0", PROMPT, kind="eval", group_size=1, max_tokens=9)
    store.admit("eval-gone", PROMPT, kind="eval", group_size=1, max_tokens=9)
    store.drop_eval("eval-gone")
    return store


def told(store: TrajectoryStore) -> dict[str, Any]:
    """All that it says of itself, as JSON has it."""
    trajectories = [number for group in store.groups() for number in group["trajectories"]]
    views = {number: _plain(store.trajectory(number)) for number in trajectories}
    told = {
        "counts": asdict(store.counts()) | {"bytes": 0, "lsn": 0, "durable_lsn": 0},
        "ledger": store.ledger(),
        "claims": store.claims(),
        "groups": list(store.groups()),
        "trajectories": views,
    }
    values: dict[str, Any] = json.loads(json.dumps(told, default=lambda array: array.tolist()))
    return values


def _plain(view: dict[str, Any]) -> dict[str, Any]:
    """A trajectory as it was told before there were forks, if it has none."""
    return {key: value for key, value in view.items() if key != "forks" or value}


def main(directory: Path) -> None:
    """Write the store, and beside it what it tells."""
    fill(directory / "store").close()
    store = TrajectoryStore.read(directory / "store")
    (directory / "told.json").write_text(json.dumps(told(store), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
