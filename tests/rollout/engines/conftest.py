"""The tiny model of the engines' tests, as a folder and as the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.engine import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model(seed=0)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, model: Any) -> str:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model.save_pretrained(path)
    return str(path)
