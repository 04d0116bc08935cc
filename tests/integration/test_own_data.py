"""A run on one's own model and data: by Hub id and from parquet, killed whole, the network gone, begun again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from pmdflow.config.load import load_run
from pmdflow.data.prompts import make_prompts
from pmdflow.learner.checkpoint.manifest import newest_manifest
from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import parts, read_part
from pmdflow.types import TrainBatch
from tests.support.data import write_jsonl, write_parquet
from tests.support.hub import Hub
from tests.support.paths import TINY
from tests.support.runs import Up, ledger_of, pmdflow, small_config

DEADLINE_S = 300.0
"""Beyond the usual: it starts twice, and the second time it reads everything again."""
REWARD = """
def score(*, completion, prompt, metadata):
    return float(completion.strip().startswith(metadata["answer"]))
"""

PROMPT_IDS = """
import json, sys
from pmdflow.config.load import load
from pmdflow.data.prompts import make_prompts
prompts = make_prompts(load(sys.argv[1]).config)
print(json.dumps([prompts.prompt(cursor).id for cursor in range(int(sys.argv[2]))]))
"""
"""A process of its own: the Hub's client reads its environment when it is imported."""


def sums(name: str, n: int) -> list[dict[str, str]]:
    return [{"question": f"{name} {i} + 1 =", "answer": str(i + 1)} for i in range(n)]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_mixture_resumed_after_kill_9_without_a_network_repeats_no_prompt_and_skips_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_reward.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    parquet.write_table(pyarrow.Table.from_pylist(sums("hub", 9)), tmp_path / "hub.parquet")
    columns = {"prompt": "question"}
    config = small_config(tmp_path, run__iterations=6, eval__prompts=4, scheduler__max_staleness=None)
    config["reward"] = {"functions": [{"function": "own_reward:score"}]}
    config["model"] = {"path": "org/tiny"}
    local = write_parquet(tmp_path / "own.parquet", sums("own", 8), row_group_size=3)
    config["data"] = {
        "task": [{"task": local, "columns": columns, "weight": 2}, {"task": "hf:org/sums", "columns": columns}],
        "group_size": 4,
        "max_tokens": 60,
    }
    with Hub(tmp_path / "home") as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        hub.push("org/tiny", files)
        data = {"README.md": b"# sums", "data/train-0.parquet": (tmp_path / "hub.parquet").read_bytes()}
        hub.push("org/sums", data, kind="datasets")
        up = Up(tmp_path, config)
        up.wait_for(lambda: len(up.iterations()) >= 3, "the third iteration", DEADLINE_S)
        up.kill_everything()
        claimed = uncovered_claims(up.run)
        assert claimed
        hub.push("org/tiny", {**files, "generation_config.json": b"{}"})  # a resumed run stays on what it began with

    again = Up(tmp_path, config)
    assert again.wait(DEADLINE_S) == 0, again.output
    assert any(event["kind"] == "resume" for event in again.events())
    assert [int(path.name[5:11]) for path in parts(again.run)] == [1, 2, 3, 4, 5, 6]
    assert_made_again(again.run, claimed)
    assert_each_cursor_once(again.run)
    ledger = ledger_of(again.iterations()[-1])
    assert ledger.pop("generated") == sum(ledger.values())


def uncovered_claims(run: Path) -> dict[int, TrainBatch]:
    """The claims of a dead run that no checkpoint covers."""
    manifest, store = newest_manifest(run / "checkpoints"), TrajectoryStore.read(run / "store")
    covered = 0 if manifest is None else manifest.iteration
    return {number: store.read_claim(number) for number in store.claims() if number > covered}


def assert_made_again(run: Path, claimed: dict[int, TrainBatch]) -> None:
    """They were trained again as they were: the same groups in the same order, the same version and masks."""
    again = {part.iteration: part for part in map(read_part, parts(run)) if part.iteration in claimed}
    assert again.keys() == claimed.keys()
    for iteration, was in claimed.items():
        assert again[iteration].version == was.version
        for name in ("tokens", "versions", "mask", "groups", "trajectories", "rewards"):
            np.testing.assert_array_equal(getattr(again[iteration], name), getattr(was, name), err_msg=name)


def assert_each_cursor_once(run: Path) -> None:
    """What was trained and what waits are the prompts of the first cursors, each once for each time it was drawn."""
    store = TrajectoryStore(run / "store", groups_per_iteration=4, lookahead=1, max_staleness=None)
    waiting = [group for group in store.groups() if group["iteration"] is None and group["kind"] == "train"]
    cursors = store.counts().next_cursor
    evicted = sum(count for place, count in store.ledger().items() if place.startswith("evicted_"))
    store.close()
    assert evicted == 0  # it is unbounded in staleness
    trained = Counter(name for path in parts(run) for name in read_part(path).prompt_ids)
    assert all(count % 4 == 0 for count in trained.values())
    found = Counter({name: count // 4 for name, count in trained.items()})
    found.update(group["prompt_id"] for group in waiting)
    command = [sys.executable, "-c", PROMPT_IDS, str(run / "config.yaml"), str(cursors)]
    ids = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert found == Counter(json.loads(ids))
    assert cursors > 20
    assert max(found.values()) > 1  # the sources have been gone through


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_rates_of_success_are_those_of_what_was_trained_although_the_run_was_killed(tmp_path: Path) -> None:
    (tmp_path / "own_reward.py").write_text(
        "def score(*, completion, metadata):\n    return float(metadata['answer'] == 'always' or len(completion) % 2)\n"
    )
    rows = [{"prompt": f"{i} + 1 =", "answer": "always" if i % 2 else "by luck"} for i in range(14)]
    config = small_config(tmp_path, run__iterations=5, eval__prompts=2, scheduler__max_staleness=None)
    config["reward"] = {"functions": [{"function": "own_reward:score"}]}
    config["data"] = {"task": write_jsonl(tmp_path / "own.jsonl", rows), "group_size": 4, "max_tokens": 24}
    config["data"]["curriculum"] = {"decay": 0.25}
    up = Up(tmp_path, config)
    up.wait_for(lambda: len(up.iterations()) >= 2, "the second iteration", DEADLINE_S)
    up.kill_everything()
    again = Up(tmp_path, config)
    assert again.wait(DEADLINE_S) == 0, again.output
    prompts = make_prompts(load_run(again.run).config)
    ids = {prompts.sources[0].at(row).id: row for row in range(12)}
    expected: dict[int, float] = {}
    for part in map(read_part, parts(again.run)):
        for group in dict.fromkeys(part.groups.tolist()):
            mine = part.groups == group
            key = ids[next(name for name, own in zip(part.prompt_ids, mine, strict=True) if own)]
            success = float((part.rewards[mine] >= 1.0).mean())
            expected[key] = 0.25 * expected[key] + 0.75 * success if key in expected else success
    with TrajectoryStore.read(again.run / "store") as store:
        found = store.successes()
    assert found.number == 5
    assert dict(zip(found.keys.tolist(), found.rates.tolist(), strict=True)) == pytest.approx(expected)
    last = again.iterations()[-1]
    assert last["data/prompts_tried"] >= 4
    assert 0.0 < last["data/success_rate_mean"] <= 1.0


@pytest.mark.timeout(300)
def test_a_dry_run_judges_model_and_data_and_downloads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)
    config["model"] = {"path": "org/tiny"}
    rows = [{"prompt": f"{i} + 1 =" + "x" * (400 if i == 7 else 0)} for i in range(10)]
    config["data"] = {"task": write_jsonl(tmp_path / "own.jsonl", rows), "max_tokens": 120, "group_size": 4}
    config["data"] |= {"max_prompt_tokens": 300, "skip_long_prompts": True}
    config["eval"]["prompts"] = 2
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(config))
    with Hub(tmp_path / "home") as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        hub.push("org/tiny", TINY)
        done = pmdflow("up", str(file), "--dry-run")
        assert done.returncode == 0, done.stderr
        assert hub.asked("model.safetensors") == []
    assert "own  10 prompts, 7 to train on, 2 held out" in done.stdout
    assert "1 of 10 prompts are longer than data.max_prompt_tokens; the longest" in done.stdout
    assert "the weights of org/tiny are downloaded by `up`" in done.stdout
    assert not (tmp_path / "runs").exists()
