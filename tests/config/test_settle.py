"""One file on 0 to 8 GPUs: what `auto` becomes there, that it fits, and what is refused."""

from __future__ import annotations

import pytest

from pmdflow.config import settle as settle_module
from pmdflow.config.gpus import Gpus, planned_gpus
from pmdflow.config.load import load
from pmdflow.config.memory import Footprint, MemoryPlan, plan_memory
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.errors import LaunchError
from tests.support.footprints import FOOTPRINTS
from tests.support.paths import CONFIGS

RECIPES = ("math", "code", "tool", "lora", "long2short", "gpu", "gpu8", "cluster")


def gpus(count: int, each: float = 80) -> Gpus:
    return Gpus(count=count, bytes_each=int(each * 2**30), source="of a test")


def written(name: str, *overrides: str) -> tuple[Config, Footprint]:
    """A recipe as it is written, and the size of the model that it names."""
    config = load(CONFIGS / f"{name}.yaml", overrides).config
    return config, FOOTPRINTS[config.model.path]


def plan(name: str, has: Gpus, *overrides: str) -> tuple[Config, MemoryPlan]:
    """A recipe settled on these GPUs."""
    config, model = written(name, *overrides)
    settled = settle(config, gpus=has, model=model)
    return settled, plan_memory(settled, model, gpus=has)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_on_the_gpus_that_it_is_for(name: str) -> None:
    config, _ = written(name)
    stated = planned_gpus(config) if config.cluster.gpus else None
    has = stated or gpus(8 if name == "gpu8" else 1)
    settled, memory = plan(name, has)
    assert memory.problems == ()
    assert settled.model.dtype == "bfloat16"
    engines, ranks = settled.rollout.num_actors, settled.learner.num_ranks
    assert memory.shared or engines + ranks == has.count or name == "cluster"


@pytest.mark.parametrize(
    ("count", "split", "shared"),
    [
        (1, (1, 1), True), (2, (1, 1), False), (3, (2, 1), False), (4, (3, 1), False), (5, (4, 1), False),
        (6, (5, 1), False), (7, (6, 1), False), (8, (6, 2), False),
    ],
)  # fmt: skip
def test_the_same_file_uses_every_gpu_of_one_to_eight(count: int, split: tuple[int, int], shared: bool) -> None:
    settled, memory = plan("gpu", gpus(count))
    assert (settled.rollout.actors, settled.learner.ranks) == split
    assert (memory.problems, memory.shared) == ((), shared)
    assert settled.rollout.memory_share == 0.9 or shared


def test_ranks_are_as_many_as_the_states_of_the_model_need() -> None:
    two, memory = plan("gpu8", gpus(2))  # 4B in one rank would take 77 of 80 GiB
    assert (two.learner.ranks, memory.shared, memory.problems) == (2, True, ())
    big, memory = plan("cluster", gpus(32), "rollout.actors=auto", "learner.ranks=auto", "rollout.tensor_parallel=2")
    assert (big.learner.ranks, big.rollout.actors, memory.problems) == (8, 12, ())
    config, _ = written("gpu8")
    settled = settle(config, gpus=gpus(16), model=FOOTPRINTS["Qwen/Qwen3-32B"])
    assert settled.learner.num_ranks > 8 and settled.learner.activation_checkpointing is True


def test_layers_are_computed_again_only_where_a_rank_does_not_fit_otherwise() -> None:
    assert plan("code", gpus(2, each=96))[0].learner.activation_checkpointing is False
    assert plan("code", gpus(2, each=48))[0].learner.activation_checkpointing is True
    assert plan("code", gpus(2, each=48), "learner.activation_checkpointing=false")[1].problems


def test_what_a_file_states_stands() -> None:
    settled, _ = plan("gpu8", gpus(8), "rollout.actors=4", "rollout.memory_share=0.7", "model.dtype=float32")
    assert (settled.rollout.actors, settled.learner.ranks) == (4, 4)
    assert (settled.rollout.memory_share, settled.model.dtype) == (0.7, "float32")
    assert plan("gpu8", gpus(8), "learner.ranks=5")[0].rollout.actors == 3
    assert plan("gpu8", gpus(8), "learner.replicas=3")[0].learner.num_ranks % 3 == 0
    shared = plan("gpu8", gpus(16), "learner.replicas=3", "learner.context_parallel=2")[0]
    assert shared.learner.num_ranks % 6 == 0 and shared.rollout.num_actors == 16 - shared.learner.num_ranks


def test_a_machine_without_a_gpu_has_one_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = written("math")
    monkeypatch.setattr(settle_module, "find_spec", lambda name: None)
    settled = settle(
        config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "auto"})}), gpus=None
    )
    assert (settled.rollout.actors, settled.learner.ranks, settled.rollout.engine) == (1, 1, "transformers")
    assert (settled.model.dtype, settled.rollout.memory_share) == ("float32", 0.5)
    memory = plan_memory(settled, model, gpus=None, host_bytes=4 << 30)
    assert "of this machine's 4 GiB" in memory.problems[0] and "cluster.gpus" in memory.problems[0]


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    _, memory = plan("cluster", gpus(32), "learner.activation_checkpointing=false")
    (problem,) = memory.problems
    assert "it would fit with learner.activation_checkpointing=true" in problem and "GPU has 80 GiB" in problem
    _, memory = plan("gpu", gpus(1, each=4))
    assert memory.problems
    long = ("data.max_tokens=131000", "learner.tokens_per_microbatch=133000", "rollout.actors=4", "learner.ranks=4")
    _, memory = plan("gpu8", gpus(8, each=48), *long, "rollout.memory_share=0.9")
    assert "it would fit with learner.context_parallel=2" in memory.problems[0]
    _, memory = plan("cluster", gpus(32, each=16))
    assert "raise rollout.tensor_parallel" in memory.problems[0]
    _, memory = plan("gpu8", gpus(2), "rollout.engine=transformers", "rollout.slots=128")
    assert "set rollout.engine to vllm" in memory.problems[0]


@pytest.mark.parametrize(
    ("name", "words"), [("rollout.actors=9", "need 11 GPUs, there are 8"), ("learner.ranks=9", "9")]
)
def test_more_engines_or_ranks_than_gpus_are_refused(name: str, words: str) -> None:
    config, model = written("gpu8", "learner.ranks=2", name)
    settled = settle(config, gpus=gpus(8), model=model)
    with pytest.raises(LaunchError, match=words) as caught:
        plan_memory(settled, model, gpus=gpus(8))
    assert "auto" in str(caught.value)


COLOCATED = ("cluster.colocate=true", "scheduler.lookahead=0")


def test_what_does_not_fit_beside_an_engine_fits_in_turn_with_it() -> None:
    (problem,) = plan("gpu8", gpus(1, each=96), "rollout.memory_share=0.3")[1].problems
    assert "beside the engine's" in problem
    settled, memory = plan("gpu8", gpus(1, each=96), *COLOCATED)
    assert (settled.rollout.num_actors, settled.learner.num_ranks, settled.rollout.memory_share) == (1, 1, 0.9)
    assert memory.problems == () and memory.in_turn
    weights = memory.engine.parts["weights"]
    states = memory.rank.parts["master weights"] + memory.rank.parts["moments"]
    assert memory.host.parts["sleeping engines"] == weights > 8e9
    assert memory.host.parts["sleeping learner"] == states > 40e9
    assert "sleeping engines" not in plan("gpu8", gpus(2))[1].host.parts


@pytest.mark.parametrize(
    ("count", "more", "split"), [(4, (), 4), (1, ("learner.ranks=1",), 1), (0, ("rollout.actors=2",), 2)]
)
def test_taking_turns_each_device_has_an_engine_and_a_rank(count: int, more: tuple[str, ...], split: int) -> None:
    config, model = written("gpu", *COLOCATED, *more)
    settled = settle(config, gpus=gpus(count) if count else None, model=model)
    assert (settled.rollout.actors, settled.learner.ranks) == (split, split)


def test_taking_turns_with_more_gpus_than_pairs_is_refused() -> None:
    config, model = written("gpu", *COLOCATED, "learner.ranks=1")
    settled = settle(config, gpus=gpus(2), model=model)
    with pytest.raises(LaunchError, match="each of 2 GPUs has an engine and a learner rank in turn") as caught:
        plan_memory(settled, model, gpus=gpus(2))
    assert "set both to auto, or to 2" in str(caught.value)
    config, model = written("gpu", *COLOCATED, "learner.context_parallel=2")
    with pytest.raises(LaunchError, match=r"learner\.ranks is 3, which learner\.replicas"):
        plan_memory(settle(config, gpus=gpus(3), model=model), model, gpus=gpus(3))
