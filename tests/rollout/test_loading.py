"""What an engine serves after a loading is what the learner published, or the engine is given up at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pmdflow.errors import EngineDied
from pmdflow.learner.learner import Learner
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.loading import Loader
from pmdflow.weights.file import WeightsFile
from pmdflow.weights.probe import LoadCheck, Probe
from tests.support.learner import make_batch, make_config, write_model

Start = Callable[..., Any]


def test_the_first_probe_of_an_engine_that_had_other_weights_than_its_folders_asks_for_no_change() -> None:
    scores = np.array([-1.5, -2.5])
    probe = Probe(tokens=(1, 2, 3), scores=scores, initial=scores + 1, limit=0.01, by_median=False)
    check = LoadCheck(scores, is_known=False)  # a checkpoint's, which the learner publishes again
    assert check.problem(probe, list(scores)) is None
    later = replace(probe, scores=scores - 1)
    assert "none changed with the weights" in str(check.problem(later, list(scores)))
    assert check.problem(later, list(scores - 1)) is None


class Published:
    """A learner that trains an iteration and publishes, as often as it is asked."""

    def __init__(self, path: str, *, dtype: str, **learner: Any) -> None:
        self.learner = Learner(config=make_config(path, dtype=dtype, **learner), rank=0)
        self.learner.setup(self.learner.address())
        self.version = 0

    def publish(self, *, train: bool = True) -> tuple[int, WeightsFile, Any]:
        if train:
            self.learner.train(make_batch(seed=self.version))
        self.version += 1
        file = self.learner.publish(lambda tensors, _: WeightsFile.write(tensors))
        assert file is not None
        return self.version, file, self.learner.probe()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def learner_of(path: str) -> Iterator[Start]:
    made: list[Published] = []

    def make(**options: Any) -> Published:
        made.append(Published(path, **{"dtype": "float32", **options}))
        return made[-1]

    yield make
    for one in made:
        one.learner.close()
    torch.use_deterministic_algorithms(False)


def engine_of(path: str, dtype: Any = "float32") -> TransformersEngine:
    return TransformersEngine(model_path=path, dtype=dtype, num_slots=2, threads=1, seed=0, device="cpu")


def take(loader: Loader, version: int, file: WeightsFile, probe: Any) -> None:
    loader.expect(probe)
    loader.load(version, file, probe)


@pytest.mark.parametrize(("dtype", "lr"), [("float32", 1e-3), ("float32", 1e-6), ("bfloat16", 1e-3)])
def test_what_is_served_is_what_was_published(path: str, learner_of: Start, dtype: str, lr: float) -> None:
    published, engine = learner_of(dtype=dtype, lr=lr), engine_of(path, dtype)
    loader = Loader(engine, mode="keep_kv")
    take(loader, *published.publish(train=False))  # those of the folder
    for _ in range(3):
        version, file, probe = published.publish()
        take(loader, version, file, probe)
        assert engine.version == version
        assert len(probe.scores) == 63, "the model has 64 positions"
        assert np.abs(np.array(engine.score(probe.tokens)) - probe.scores).max() < 0.05
    take(loader, *published.publish(train=False))  # the same weights under another number


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_that_is_dropped_is_noticed_at_once(
    path: str, learner_of: Start, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, engine = learner_of(dtype=dtype), engine_of(path, dtype)
    loader = Loader(engine, mode="keep_kv")
    take(loader, *published.publish())
    with monkeypatch.context() as broken:
        broken.setattr(type(engine._model), "load", lambda *_: None)
        with pytest.raises(EngineDied, match=r"version 2 .* none changed with the weights"):
            take(loader, *published.publish())
    take(loader, *published.publish())


def test_the_first_load_is_proved_too_and_a_change_below_rounding_is_one(
    path: str, learner_of: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    published, engine = learner_of(lr=1e-6), engine_of(path)
    monkeypatch.setattr(type(engine._model), "load", lambda *_: None)
    with pytest.raises(EngineDied, match=r"version 1 .* none changed with the weights"):
        take(Loader(engine, mode="keep_kv"), *published.publish())


def test_a_load_of_a_part_or_of_another_version_is_noticed(path: str, learner_of: Start) -> None:
    published, engine = learner_of(lr=3e-2), engine_of(path)
    loader = Loader(engine, mode="keep_kv")
    _, older, _ = published.publish()
    version, file, probe = published.publish()
    half = {name: file[name] if index % 2 else older[name] for index, name in enumerate(file)}
    for wrong in (half, older):
        with pytest.raises(EngineDied, match="off by"):
            take(loader, version, wrong, probe)
    take(loader, version, file, probe)
    with pytest.raises(EngineDied, match="off by nan"):
        take(loader, version, file, replace(probe, scores=np.full(63, np.nan)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_never_binds_is_noticed_at_once(path: str, learner_of: Start, dtype: str) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    published, engine = learner_of(dtype=dtype, lora=lora, lr=1e-2), engine_of(path, dtype)
    loader = Loader(engine, mode="keep_kv")
    version, file, probe = published.publish()
    engine.load_weights(0, {name: 0 * tensor for name, tensor in file.items()}, on_new_weights="keep_kv")
    use_adapters(engine, False)  # they are loaded, and nothing computes with them
    with pytest.raises(EngineDied, match=r"version 1 .* none changed with the weights"):
        take(loader, version, file, probe)
    use_adapters(engine, True)
    take(loader, version, file, probe)
    take(loader, *published.publish())
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in file.items()}
    with pytest.raises(
        ValueError, match=r"version 3 do not fit .* unexpected \['model.layers.0.self_attn.query.lora_A"
    ):
        take(loader, version + 2, renamed, probe)
    with pytest.raises(ValueError, match=r"\['model.layers.0.self_attn.query', .* Qwen3ForCausalLM has no such linear"):
        take(Loader(engine_of(path, dtype), mode="keep_kv"), version, renamed, probe)


def use_adapters(engine: TransformersEngine, enabled: bool) -> None:
    """Let layers compute with their adapters, or as if they had none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in engine._model._model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)


def test_an_engine_that_nobody_asked_or_that_has_no_model_is_believed(path: str, learner_of: Start) -> None:
    published, engine = learner_of(), engine_of(path)
    version, file, _ = published.publish()
    take(Loader(engine, mode="keep_kv"), version, file, None)
    assert engine.version == 1
