"""Reward actors in Ray, on two nodes, with the real store: what they score, are given and say."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from pmdflow.config.schema import Config
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import PmdflowError
from pmdflow.metrics.report import ActorReport
from pmdflow.run.actors import LoopMaker, start_store
from pmdflow.run.placement import place_rewards
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import EvalResult
from pmdflow.store.client import StoreHandle, call
from pmdflow.store.segments import encode_segments
from pmdflow.types import Prompt, Quota, Segment
from tests.support.reward import FUNCTIONS, save_tokenizer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "graders.py").write_text(FUNCTIONS)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def make_config(directory: Path, function: str = "graders:obey", **reward: Any) -> Config:
    model = save_tokenizer(directory / "model", "<think>", "</think>")
    return Config.model_validate(
        {
            "run": {"name": "test", "dir": str(directory), "iterations": 1},
            "model": {"path": model, "dtype": "float32"},
            "rollout": {"engine": "transformers", "actors": 1},
            "learner": {"ranks": 1},
            "data": {"task": "reasoning_gym/gcd", "max_tokens": 200},
            "reward": {"functions": [{"function": function}], "timeout_s": 1.0, "max_attempts": 2, **reward},
            "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 100},
        }
    )


def generate(store: StoreHandle, config: Config, completions: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Admit an evaluation prompt a completion, and have it generated."""
    tokenizer = load_tokenizer(config.model.path)
    tokens = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in completions]
    prompts = [
        Prompt(id=f"p{number}", text=f"What is {number}?", tokens=np.array([2, 3, 4], np.int32), metadata=metadata)
        for number in range(len(completions))
    ]
    admitted = [(f"eval-{number:03d}", None, prompt) for number, prompt in enumerate(prompts)]
    ray.get(call(store, StoreActor.publish, 0, None, {}))
    ray.get(call(store, StoreActor.set_quota, Quota(version=0, groups=9, tokens=10**6, tokens_per_segment=None)))
    assert len(ray.get(call(store, StoreActor.admit, admitted, "eval", 1, 200))) == len(completions)
    leases = ray.get(call(store, StoreActor.lease, "worker", 0, len(completions), 10.0))
    assert len(leases) == len(completions)
    segments = [
        Segment(
            trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=0, temperature=1.0, next_version=0,
            tokens=np.array(given, np.int32), logprobs=np.zeros(len(given), np.float32), stop="stop",
        )
        for lease in leases
        for given in [tokens[int(str(lease.text).removeprefix("What is ").removesuffix("?"))]]
    ]  # fmt: skip
    ray.get(call(store, StoreActor.append, encode_segments(segments)))


def results(store: StoreHandle) -> list[float | None]:
    deadline = time.monotonic() + 120
    found: list[EvalResult] | None = None
    while found is None:
        assert time.monotonic() < deadline, "not scored in time"
        found = ray.get(call(store, StoreActor.eval_results, "eval-", 5.0))
    return [result.reward for result in sorted(found, key=lambda result: result.request_id)]


def test_actors_on_two_nodes_score_what_the_store_hands_them(cluster: Cluster, tmp_path: Path) -> None:
    """What functions are given is as in the data, and as generated."""
    told = tmp_path / "told.jsonl"
    functions = [{"function": "graders:obey"}, {"function": "graders:tell", "weight": 100.0}]
    config = make_config(tmp_path, functions=functions, actors=2)
    store = start_store(config, tmp_path)
    metadata = {"told": str(told), "messages": [{"role": "user", "content": "What is it?"}]}
    generate(store, config, [*map(str, range(40)), "invalid", "raise", "sleep", "<think>40</think>"], metadata)
    loops = LoopMaker(config, tmp_path, store, [{}]).all()[1:]
    assert [loop.name for loop in loops] == ["reward-0", "reward-1"]
    actors, runs = zip(*(loop.start(None, "") for loop in loops), strict=True)
    assert results(store) == [*(100.0 + number for number in range(40)), 0.0, None, None, 140.0]
    asked = {place["scheduling_strategy"].node_id for place in place_rewards(config)}
    assert asked == {node["NodeID"] for node in ray.nodes()}  # a wish: Ray may put both on one
    ray.get([actor.stop.remote() for actor in actors], timeout=20)
    ray.get(list(runs), timeout=20)
    reports = ray.get([actor.drain.remote() for actor in actors], timeout=20)
    spans = [span for report in reports for span in report.spans]
    assert {span["actor"] for span in spans} == {"reward-0", "reward-1"}
    assert {span["name"] for span in spans} == {"start", "wait_unscored", "score"}
    total = {kind: sum(span["attrs"].get(kind, 0) for span in spans) for kind in ("scored", "invalid", "infra_failure")}
    assert total == {"scored": 41, "invalid": 1, "infra_failure": 4}  # two, tried twice each
    messages = [text for span in spans for text in span["attrs"].get("messages", [])]
    assert any("timed out after 1 s" in text for text in messages)
    events = [event for report in reports for event in report.events]
    assert all(event.kind == "scoring_failed" for event in events)
    assert any("failed scorings: " in event.message for event in events)
    assert ray.get([actor.drain.remote() for actor in actors], timeout=20) == [ActorReport(spans=[], events=[])] * 2
    ray.get(call(store, StoreActor.close), timeout=20)
    tokenizer = load_tokenizer(config.model.path)
    (given,) = [told for told in map(json.loads, told.read_text().splitlines()) if told["completion"] == "40"]
    assert given == {
        "completion": "40", "raw_completion": "<think>40</think><eos>", "stop": "stop", "prompt": "What is 43?",
        "messages": metadata["messages"], "metadata": metadata, "timeout_s": 1.0, "rewards": {},
        "token_ids": [*tokenizer("<think>40</think>")["input_ids"], tokenizer.eos_token_id],
    }  # fmt: skip


def test_of_two_answers_to_one_attempt_the_first_stands(cluster: Cluster, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    store = start_store(config, tmp_path)
    generate(store, config, ["a", "b"], {})
    handed = [item for _ in range(2) for item in ray.get(call(store, StoreActor.unscored, 2, 0.0, 10.0))]
    first, second = handed[:2]
    assert [(item.trajectory, item.attempt) for item in handed[2:]] == [(first.trajectory, 0), (second.trajectory, 0)]
    answers = [
        (first.trajectory, 0, "scored", 1.0, {}), (second.trajectory, 0, "infra_failure", 0.0, {}),
        (first.trajectory, 0, "scored", 2.0, {}), (second.trajectory, 0, "scored", 2.0, {}),
    ]  # fmt: skip
    for answer in answers:
        ray.get(call(store, StoreActor.score, [answer]))
    (again,) = ray.get(call(store, StoreActor.unscored, 2, 60.0, 10.0))
    assert (again.trajectory, again.attempt) == (second.trajectory, 1)
    ray.get(call(store, StoreActor.score, [(again.trajectory, 1, "scored", 3.0, {}), answers[3]]))
    assert results(store) == [1.0, 3.0]
    ray.get(call(store, StoreActor.close), timeout=20)


def test_an_actor_says_why_it_cannot_score(cluster: Cluster, tmp_path: Path) -> None:
    store = start_store(make_config(tmp_path), tmp_path)
    _, loop = LoopMaker(make_config(tmp_path, "graders:obay"), tmp_path, store, [{}]).all()
    with pytest.raises(ValueError, match="did you mean 'obey'"):
        ray.get(loop.start(None, "")[1], timeout=120)
    config = make_config(tmp_path, max_failures_in_a_row=3)
    generate(store, config, ["raise", "none", "raise"], {})
    _, loop = LoopMaker(config, tmp_path, store, [{}]).all()
    with pytest.raises(
        PmdflowError,
        match=r"3 scorings in a row failed (?s:.*)the first: graders.obey: (?s:.*)mend what the reward functions name",
    ):
        ray.get(loop.start(None, "")[1], timeout=120)
    ray.get(call(store, StoreActor.close), timeout=20)
