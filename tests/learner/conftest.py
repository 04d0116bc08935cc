"""The tiny random model, and learners of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pmdflow.config.schema import Config
from pmdflow.learner.learner import Learner
from tests.support.learner import write_model

torch.set_num_threads(1)

Start = Callable[[Config], Learner]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its folder."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Make a learner that leaves its process group when the test ends; only one lives at a time."""
    open_learners: list[Learner] = []

    def close_all() -> None:
        for learner in open_learners:
            learner.close()
        open_learners.clear()

    def make(config: Config) -> Learner:
        close_all()
        learner = Learner(config=config, rank=0)
        learner.setup(learner.address())
        open_learners.append(learner)
        return learner

    yield make
    close_all()
    torch.use_deterministic_algorithms(False)
