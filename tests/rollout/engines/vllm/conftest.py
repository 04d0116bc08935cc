"""One vLLM engine for the tests of this folder: it takes long to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engine import swap

if TYPE_CHECKING:
    from pmdflow.rollout.engines.vllm.engine import VllmEngine
    from pmdflow.rollout.engines.vllm.settings import VllmSettings


@pytest.fixture(scope="session")
def settings(model_path: str) -> VllmSettings:
    from pmdflow.rollout.engines.vllm.settings import VllmSettings

    return VllmSettings(model_path=model_path, max_length=512, slots=24)


@pytest.fixture(scope="session")
def started(settings: VllmSettings) -> Iterator[VllmEngine]:
    from pmdflow.rollout.engines.vllm.engine import VllmEngine

    engine = VllmEngine(settings, seed=0)
    yield engine
    engine.close()


@pytest.fixture
def engine(started: VllmEngine, model: Any) -> Iterator[VllmEngine]:
    """The engine, empty and with the weights of `model`."""
    swap(started, model.state_dict(), "keep_kv")
    yield started
    for id in list(started._sequences):
        started.abort(id)
