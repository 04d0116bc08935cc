"""`metrics.sinks`: names or mappings, and what is wrong with them, where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pmdflow.config.errors import ConfigError
from pmdflow.config.load import load
from pmdflow.config.sinks import SinkConfig
from tests.support.runs import small_config


def load_with(directory: Path, *sinks: Any) -> list[SinkConfig]:
    file = directory / "small.yaml"
    file.write_text(yaml.safe_dump(small_config(directory) | {"metrics": {"sinks": list(sinks)}}))
    return load(file).config.metrics.sinks


def test_a_name_is_a_mapping_without_settings_and_both_are_read_back(tmp_path: Path) -> None:
    sinks = load_with(tmp_path, "tensorboard", {"name": "wandb", "mode": "offline"}, {"name": "prometheus", "port": 9})
    assert [(sink.name, sink.mode, sink.port) for sink in sinks] == [
        ("tensorboard", None, 9464),
        ("wandb", "offline", 9464),
        ("prometheus", None, 9),
    ]
    assert load_with(tmp_path, *[sink.model_dump(mode="json") for sink in sinks]) == sinks


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (["wandbb"], "did you mean `wandb`"),
        ([{"name": "wandb", "projekt": "x"}], "did you mean `project`"),
        ([{"project": "x"}], "`metrics.sinks.0.name` is missing"),
        ([{"name": "prometheus", "port": 99999}], "`metrics.sinks.0.port` must be at most 65535"),
        ([{"name": "trackio", "port": 9}], "sets port of trackio, which has none: it belongs to prometheus"),
        ([{"name": "tensorboard", "project": "x"}], "it belongs to wandb and trackio"),
        (["trackio", "wandb", "trackio"], "names trackio 2 times"),
        ([3], "`metrics.sinks.0` must be a mapping"),
    ],
)
def test_mistakes_are_named_where_they_are(sinks: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_with(tmp_path, *sinks)
    assert message in str(error.value) and "small.yaml:" in str(error.value)
