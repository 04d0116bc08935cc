"""The reward actor, in Ray."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pmdflow.types import Stop, Unscored
from tests.data.test_data import make_config as make_run_config
from tests.support.reward import FUNCTIONS, make_config, save_tokenizer


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "graders.py").write_text(FUNCTIONS)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def make_store(unscored: list[Unscored]) -> Any:
    """An actor with the store's two methods: it hands out again whatever has no score yet, and keeps the scores."""

    @ray.remote(num_cpus=0, max_concurrency=4)
    class Store:
        def __init__(self) -> None:
            self.answers: list[Any] = []
            self.enough = threading.Event()

        def unscored(self, max_items: int, ttl_s: float, timeout_s: float) -> list[Unscored]:
            known = {(trajectory, attempt) for trajectory, attempt, *_ in self.answers}
            items = [item for item in unscored if (item.trajectory, item.attempt) not in known][:max_items]
            if not items:
                time.sleep(timeout_s)
            return items

        def score(self, scores: list[Any]) -> None:
            self.answers += scores
            if len(self.answers) >= len(unscored):
                self.enough.set()

        def scores(self) -> list[Any]:
            assert self.enough.wait(timeout=60)
            return self.answers

    return Store.remote()


@pytest.mark.usefixtures("ray_cluster")
def test_actor_scores_each_attempt_once_and_stops_within_seconds(tmp_path: Path) -> None:
    from pmdflow.reward.actor import RewardActor

    model = save_tokenizer(tmp_path / "model")
    config = make_run_config(model, "reasoning_gym/gcd").model_copy(update={"reward": make_config(timeout_s=1.0)})
    completions = ["1.5", "invalid", "sleep", "2"]
    store = make_store([unscored(number, text) for number, text in enumerate(completions)])
    actor = ray.remote(RewardActor).options(num_cpus=0, max_concurrency=4).remote(config=config, store=store)
    run = actor.run.remote()
    answer = store.scores.remote()
    ray.get(ray.wait([answer, run], timeout=90)[0][0])  # raises what ended `run`, if it did
    scores = ray.get(answer, timeout=90)
    assert sorted(scores)[:2] == [
        (0, 5, "scored", 1.5, {"graders.obey": 1.5}),
        (1, 5, "invalid", 0.0, {"graders.obey": 0.0}),
    ]
    assert sorted(scores)[2:] == [(2, 5, "infra_failure", 0.0, {}), (3, 5, "scored", 2.0, {"graders.obey": 2.0})]
    ray.get(actor.stop.remote(), timeout=10)
    ray.get(run, timeout=10)
    spans = ray.get(actor.drain.remote(), timeout=10).spans
    assert {span["name"] for span in spans} == {"start", "wait_unscored", "score"}
    total = {kind: sum(span["attrs"].get(kind, 0) for span in spans) for kind in ("scored", "invalid", "infra_failure")}
    assert total == {"scored": 2, "invalid": 1, "infra_failure": 1}
    (message,) = [text for span in spans for text in span["attrs"].get("messages", [])]
    assert "timed out after 1 s" in message
    assert ray.get(actor.drain.remote(), timeout=10).spans == []


@pytest.mark.usefixtures("ray_cluster")
def test_actor_says_why_its_rubric_cannot_be_loaded(tmp_path: Path) -> None:
    from pmdflow.reward.actor import RewardActor

    config = make_run_config(save_tokenizer(tmp_path / "model"), "reasoning_gym/gcd")
    config = config.model_copy(update={"reward": make_config("graders:obay")})
    actor = ray.remote(RewardActor).options(num_cpus=0).remote(config=config, store=None)
    with pytest.raises(ValueError, match="did you mean 'obey'"):
        ray.get(actor.run.remote(), timeout=90)


def unscored(trajectory: int, completion: str) -> Unscored:
    """A trajectory whose tokens, with an end-of-sequence token, are the bytes of `completion`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = [2 + alphabet.index(character) for character in completion]
    return Unscored(
        trajectory=trajectory,
        group=0,
        kind="train",
        attempt=5,
        prompt_id="p",
        metadata={},
        prompt=np.asarray([2], dtype=np.int32),
        tokens=np.asarray([*ids, 1], dtype=np.int32),
        observed=np.zeros(len(ids) + 1, dtype=np.uint8),
        stop=Stop.STOP,
    )
