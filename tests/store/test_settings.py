"""The settings of the store: one declaration for everybody who opens one."""

from __future__ import annotations

import inspect

import pytest

from pmdflow import _rust_buffer
from pmdflow.config.load import load
from pmdflow.config.settle import settle
from pmdflow.run.actors import store_settings
from pmdflow.store import StoreSettings, TrajectoryStore
from tests.support.paths import CONFIGS


def test_they_are_those_of_the_native_store() -> None:
    parameters = inspect.signature(_rust_buffer.TrajectoryStore).parameters
    native = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    required = {name for name in native if parameters[name].default is inspect.Parameter.empty}
    assert (native - {"read_only"}, required) == (set(StoreSettings.__annotations__), StoreSettings.__required_keys__)


def test_a_configuration_gives_settings_that_open_a_store() -> None:
    config = load(CONFIGS / "quickstart.yaml", ["store.sync_interval_s=0.25"]).config
    settings = store_settings(settle(config, gpus=None))
    assert settings["sync_interval_s"] == 0.25
    TrajectoryStore(None, **settings).close()


def test_another_name_is_refused() -> None:
    with pytest.raises(TypeError, match="commit_interval_s"):
        TrajectoryStore(None, groups_per_iteration=1, lookahead=0, max_staleness=None, commit_interval_s=1.0)  # type: ignore[call-arg]
