"""What tests of agents share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from tests.support.agent_world import World, clear
from tests.support.chat_model import FORGETFUL, chat_model
from tests.support.engine import make_engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"": chat_model(folder / "model"), "forgetful": chat_model(folder / "forgetful", FORGETFUL)}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> TransformersEngine:
    torch.set_num_threads(1)
    return make_engine(str(folders[""]))


@pytest.fixture
def world(tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]) -> Iterator[World]:
    world = World(tmp_path, engine, folders[""])
    yield world
    clear(engine)
    world.store.close()
