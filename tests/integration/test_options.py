"""A real run with every option of the algorithms at once: what is masked, penalized and scheduled stays accounted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pmdflow.metrics.ledger import OUTSIDE_SUM
from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask, Stop, TrainBatch
from tests.support.runs import Up, small_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Up:
    directory = tmp_path_factory.mktemp("options")
    supervised = directory / "supervised.jsonl"
    supervised.write_text(
        "".join(json.dumps({"prompt": f"{n} + 1 = ?", "completion": f"{n + 1}"}) + "\n" for n in (1, 2))
    )
    loops = {"ngram": 1, "copies": 2, "min_tokens": 2}
    config = small_config(
        directory, run__iterations=3, rollout__repetition=loops, rollout__final_temperature=0.5,
        rollout__temperature_iterations=2, eval__prompts=0, scheduler__groups_per_iteration=6,
    )  # fmt: skip
    config["scheduler"]["straggler"] = {"members": 3, "wait_s": 0.0}
    config["reward"] |= {"repetition_penalty": 0.25, "cut_reward": -0.5, "length_weight": 0.1}
    config["learner"] |= {
        "algorithm": "boltzmann_pmd", "keep_groups_below": 0.6, "importance_weights": "token", "veto": True,
        "entropy_weight": 0.01, "ptx_data": str(supervised),
    }  # fmt: skip
    up = Up(directory, config)
    assert up.wait() == 0, up.output
    return up


@pytest.fixture(scope="module")
def batches(finished: Up) -> list[TrainBatch]:
    return [read_part(path) for path in parts(finished.run)]


def test_filtered_tokens_are_masked_in_the_ledger_and_the_sum_is_exact(finished: Up, batches: list[TrainBatch]) -> None:
    records = finished.iterations()
    last = {key.removeprefix("ledger/"): value for key, value in records[-1].items() if key.startswith("ledger/")}
    for outside in OUTSIDE_SUM:
        last.pop(outside)
    assert last.pop("generated") == sum(last.values())
    for place, flag in (("trained", Mask.TRAINED), ("masked_filter", Mask.FILTER), ("masked_veto", Mask.VETO)):
        assert last[place] == sum(int(((batch.mask & flag) != 0).sum()) for batch in batches)
    assert last["trained"] == sum(record["learner/trained_tokens"] for record in records)
    filtered = 0
    for batch in batches:
        rewards = np.where(batch.stops == Stop.LENGTH, -0.5, batch.rewards - 0.25 * (batch.stops == Stop.REPETITION))
        means = {group: rewards[batch.groups == group].mean() for group in np.unique(batch.groups)}
        dropped = np.repeat([means[group] >= 0.6 for group in batch.groups], np.diff(batch.cu_seqlens))
        filtered += int((dropped & ((batch.mask & Mask.TRAINABLE) != 0)).sum())
    assert last["masked_filter"] == filtered


def test_groups_are_trained_without_late_members_who_are_events(finished: Up, batches: list[TrainBatch]) -> None:
    for batch in batches:
        assert np.unique(batch.groups, return_counts=True)[1].tolist() == [3] * 6
    lines = (finished.run / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "late_members"]
    assert {event["members"] for event in events} == {1}
    last = finished.iterations()[-1]
    assert last["store/trajectories_late"] > 0
    assert sum(event["tokens"] for event in events) > 0


def test_the_temperature_follows_the_version(batches: list[TrainBatch]) -> None:
    schedule = {0: 1.0, 1: 0.75, 2: 0.5}
    seen = set()
    for batch in batches:
        generated = (batch.mask & Mask.GENERATED) != 0
        for version in np.unique(batch.versions[generated]).tolist():
            own = np.unique(batch.temperatures[generated & (batch.versions == version)])
            # A running lease keeps the temperature that it began with, which is that of an earlier version.
            assert set(own.tolist()) <= {schedule[earlier] for earlier in range(version + 1)}
            seen |= set(own.tolist())
    assert len(seen) >= 2


def test_every_option_is_in_the_metrics(finished: Up) -> None:
    for record in finished.iterations():
        assert record["reward/length_weight"] == 0.1
        assert 0 < record["learner/importance_ess_share"] <= 1
        assert record["learner/ptx_loss"] > 0
        assert record["learner/entropy"] > 0
        assert record["learner/tokens_per_s"] > 0
