"""The shipped configurations and their schema."""

import json

import pytest

from pmdflow.config.gpus import planned_gpus
from pmdflow.config.installed import require_imports
from pmdflow.config.load import Loaded, load
from pmdflow.config.plan import make_plan
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from tests.support.paths import CONFIGS

EXAMPLES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def example(name: str) -> Loaded:
    return load(CONFIGS / f"{name}.yaml")


def test_every_mode_and_engine_has_an_example() -> None:
    assert set(EXAMPLES) >= {"quickstart", "quickstart-vllm", "synchronous", "k15", "calculator", "gpu", "cluster"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_examples_are_valid(name: str) -> None:
    loaded = example(name)
    assert loaded.config.run.name == name
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    config = settle(loaded.config, gpus=planned_gpus(loaded.config))
    assert make_plan(config, model=None).notes == ()


def test_what_shipped_examples_name_can_be_imported() -> None:
    different = {}
    for name in EXAMPLES:
        loaded = example(name)
        reward = tuple(function.function for function in loaded.config.reward.functions)
        different[reward, loaded.config.environment is None, loaded.config.learner.algorithm] = loaded
    for loaded in different.values():
        require_imports(loaded)
    assert len(different) >= 2


def test_examples_are_the_three_modes() -> None:
    quickstart, synchronous, k15 = (example(name).config for name in ("quickstart", "synchronous", "k15"))
    assert quickstart.scheduler.lookahead >= 1 and quickstart.rollout.tokens_per_segment is None
    assert (synchronous.scheduler.lookahead, synchronous.rollout.tokens_per_segment) == (0, None)
    assert (k15.scheduler.lookahead, k15.scheduler.max_staleness) == (0, None)
    assert k15.rollout.tokens_per_segment
    assert quickstart.data == synchronous.data == k15.data


def test_the_committed_json_schema_is_current() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == Config.model_json_schema()


def test_every_key_is_documented() -> None:
    for name, section in Config.model_json_schema()["$defs"].items():
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key}"
