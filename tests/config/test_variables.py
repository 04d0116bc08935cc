"""Variables of the environment in a configuration: looked up where they are used, and shown nowhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from pmdflow.config.errors import ConfigError
from pmdflow.config.installed import require_variables
from pmdflow.config.load import load
from pmdflow.config.plan import make_plan, render_dry_run
from pmdflow.config.schema import EnvironmentConfig, RewardConfig
from pmdflow.config.settle import settle
from pmdflow.config.variables import hide, resolve
from pmdflow.environments.protocol import load_environment
from pmdflow.reward.rubric import load_rubric
from pmdflow.run.directory import RunDirectory

SECRET = "sk-very-secret"
MODULE = """
def score(*, completion, api_key):
    if completion == "fail":
        raise ValueError(f"{api_key} was refused")
    return float(api_key == "sk-very-secret")

class Shop:
    def __init__(self, key):
        if key == "sk-very-secret-bad":
            raise TypeError(f"{key} is no key")
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "variable_shop.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "variable_shop", raising=False)
    monkeypatch.setenv("SHOP_KEY", SECRET)


def test_they_are_found_however_deep_and_hidden_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)
    written = {"a": ["x ${SHOP_KEY}", 1], "b": {"c": "$SHOP_KEY ${ SHOP_KEY }"}}
    assert resolve(written) == {"a": [f"x {SECRET}", 1], "b": {"c": "$SHOP_KEY ${ SHOP_KEY }"}}
    assert hide(f"401 for {SECRET}", written) == "401 for ${SHOP_KEY}"
    with pytest.raises(ValueError, match="variable SHOP_KYE is not set here"):
        resolve("${SHOP_KYE}")


def test_a_value_is_hidden_in_every_form_that_messages_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'a/b+c"d\\e\nf g'
    monkeypatch.setenv("SHOP_KEY", secret)
    forms = [secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret), quote(secret, ""), quote_plus(secret)]
    for form in forms:
        assert hide(f"401: key={form}&x", "${SHOP_KEY}") == "401: key=${SHOP_KEY}&x", form


@pytest.mark.usefixtures("shop")
def test_a_reward_gets_the_value_and_its_errors_show_the_name() -> None:
    config = RewardConfig.model_validate(
        {"functions": [{"function": "variable_shop:score", "args": {"api_key": "${SHOP_KEY}"}}]}
    )
    rubric = load_rubric(config)
    assert rubric(completion="x").reward == 1.0
    assert rubric(completion="fail").message == "variable_shop.score: ValueError: ${SHOP_KEY} was refused"
    assert SECRET not in config.model_dump_json()


@pytest.mark.usefixtures("shop")
def test_an_environment_gets_the_value_and_its_errors_show_the_name() -> None:
    load_environment(EnvironmentConfig(factory="variable_shop:Shop", args={"key": "${SHOP_KEY}"}))()
    with pytest.raises(ValueError, match=r"\$\{SHOP_KEY\}-bad is no key") as caught:
        load_environment(EnvironmentConfig(factory="variable_shop:Shop", args={"key": "${SHOP_KEY}-bad"}))
    assert SECRET not in str(caught.value)


def test_what_a_run_writes_and_shows_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_yaml: Path
) -> None:
    monkeypatch.setenv("SHOP_KEY", SECRET)
    loaded = load(cluster_yaml, ['reward.functions.0.args={api_key: "${SHOP_KEY}"}', f"run.dir={tmp_path}"])
    require_variables(loaded)
    report = render_dry_run(loaded, make_plan(settle(loaded.config, gpus=None), model=None))
    assert "${SHOP_KEY}" in report and SECRET not in report
    with RunDirectory.prepare(loaded.config) as run:
        written = (run.path / "config.yaml").read_text()
    assert "${SHOP_KEY}" in written and SECRET not in written


def test_unset_ones_and_places_where_none_are_looked_up_are_refused_before_anything_starts(cluster_yaml: Path) -> None:
    overrides = ['reward.functions.0.args={key: "${SHOP_KYE}"}', "run.dir=${SCRATCH}/runs", "data.suffix=${x}$"]
    with pytest.raises(ConfigError) as caught:
        require_variables(load(cluster_yaml, overrides))
    said = str(caught.value)
    assert "SHOP_KYE is not set" in said and "export SHOP_KYE=" in said
    assert "`run.dir`: the environment variable SCRATCH is looked up only in args" in said
    assert "suffix" not in said
