"""A run is resumed only with the model and the data that it was begun with, wherever these lie now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import MambaConfig

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.inputs import resolve_inputs
from pmdflow.data.prompts import make_prompts
from pmdflow.errors import LaunchError
from pmdflow.run.directory import RunDirectory
from pmdflow.run.inputs import algorithm_notes, dry_run, merge, open_inputs, open_prompts
from tests.support.adapter import save_adapter
from tests.support.data import CHAT_TEMPLATE, save_tokenizer, write_jsonl
from tests.support.learner import make_config
from tests.support.paths import TINY
from tests.support.runs import small_config

ROWS = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(20)]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run on a file, in a folder of its own beside the model's."""
    settings = small_config(tmp_path, eval__prompts=4)
    settings["model"] = {"path": str(shutil.copytree(TINY, tmp_path / "model"))}
    settings["data"] = {"task": write_jsonl(tmp_path / "own.jsonl", ROWS), "max_tokens": 120, "group_size": 4}
    return settings


def test_what_an_algorithm_gathers_is_said() -> None:
    name = "tests.support.algorithm:WIDE"
    (note,) = algorithm_notes(make_config("unused", algorithm=name, ranks=2))
    assert "each rank gathers behavior, entropies, entropy_flow" in note and "of 288 tokens" in note
    assert algorithm_notes(make_config("unused", algorithm=name)) == [], "one rank has it all"
    assert algorithm_notes(make_config("unused", algorithm="ucpo", ranks=2)) == [], "its view is local"
    with pytest.raises(LaunchError, match="grpo has no such setting"):
        algorithm_notes(make_config("unused", algorithm="grpo", settings={"size": 1.0}))


def begin(config: dict[str, Any]) -> RunDirectory:
    """What `up` does up to its store: the directory is left as by a run that was killed."""
    inputs = resolve_inputs(Config.model_validate(config), merged=Path("never"))
    with RunDirectory.prepare(inputs.config) as run:
        run.check_inputs(inputs.identity(make_prompts(inputs.config)))
        run.write_meta(inputs.config, {})
        (run.path / "store").mkdir(exist_ok=True)
    return run


def train_on(file: Path) -> None:
    """The same tensors with other values."""
    save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def move(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    config["model"]["path"] = str(shutil.move(config["model"]["path"], folder / "m"))
    config["data"]["task"] = str(shutil.move(config["data"]["task"], folder / "own.jsonl"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config, folder: move(config, folder / "elsewhere"),
        lambda config, folder: config["data"].update(max_prompt_tokens=800),
        lambda config, folder: config["data"].update(reward=[{"function": "a.b:c"}]),
        lambda config, folder: config["eval"].update(every=1, temperature=0.5),
        lambda config, folder: config["run"].update(iterations=9),
    ],
)
def test_what_does_not_change_a_cursors_prompt_may_change(
    config: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any], Path], None]
) -> None:
    begin(config)
    change(config, tmp_path)
    run = begin(config)
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["model"]["path"] == config["model"]["path"]
    assert Path(written["data"]["task"]).is_absolute()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, f: write_jsonl(f / "own.jsonl", ROWS[:-1]),
            r"sources\.own\.rows was 20 and is 19, sources\.own\.sha256 was",
        ),
        (
            lambda c, f: write_jsonl(f / "own.jsonl", [*ROWS[1:], ROWS[0]]),
            r"inputs: sources\.own\.sha256 was '\w+' and is '\w+'\n",
        ),
        (lambda c, f: c["data"].update(system=None, suffix=" Think."), r"data\.suffix was None and is ' Think\.'\n"),
        (
            lambda c, f: c["data"].update(columns={"answer": "answer"}),
            r"data\.columns\.answer was None and is 'answer'",
        ),
        (lambda c, f: c["data"].update(max_tokens=100), r"data\.max_tokens was 120 and is 100"),
        (lambda c, f: c["eval"].update(prompts=5), r"eval\.prompts was 4 and is 5"),
        (lambda c, f: c["eval"].update(sets={"x": {"task": "reasoning_gym/gcd", "prompts": 1}}), r"eval\.sets"),
        (lambda c, f: c["run"].update(seed=9), r"run\.seed is 9, but .* begun with 1"),
        (lambda c, f: (f / "model/generation_config.json").write_text("{}"), r"model\.files\.generation_config\.json"),
        (lambda c, f: train_on(f / "model/model.safetensors"), r"inputs: model\.files\.model\.safetensors \(samples\)"),
    ],
)
def test_what_changes_a_cursors_prompt_is_refused_with_what_changed(
    config: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any], Path], None], message: str
) -> None:
    before = begin(config).recorded_inputs(begin(config).path)
    change(config, tmp_path)
    with pytest.raises(LaunchError, match=message):
        begin(config)
    assert RunDirectory.recorded_inputs(tmp_path / "runs" / "small") == before


def test_the_prompt_limit_of_a_run_that_leaves_long_prompts_out_stays(config: dict[str, Any]) -> None:
    config["data"] |= {"skip_long_prompts": True, "max_prompt_tokens": 100}
    begin(config)
    config["data"]["max_prompt_tokens"] = 200
    with pytest.raises(LaunchError, match=r"data\.max_prompt_tokens was 100 and is 200"):
        begin(config)


def test_a_run_begun_before_inputs_were_recorded_is_compared_by_its_settings(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(config)
    (run.path / "meta.json").unlink()
    old = {"task": "own.jsonl", "args": {}, "max_tokens": 120, "group_size": 4, "max_prompt_tokens": 4096}
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    (run.path / "config.yaml").write_text(yaml.safe_dump({**written, "model": {"path": "model"}, "data": old}))
    monkeypatch.chdir(tmp_path)
    begin(config)
    (run.path / "meta.json").unlink()
    config["data"]["group_size"] = 5
    with pytest.raises(LaunchError, match=r"data is .*'group_size': 5.*begun with .*'group_size': 4"):
        begin(config)


def test_a_torn_meta_json_is_as_none(config: dict[str, Any]) -> None:
    run = begin(config)
    (run.path / "meta.json").write_text(json.dumps({"inputs": {"data": {}}})[:9])
    begin(config)


def test_whatever_is_wrong_with_model_or_data_is_a_launch_error(config: dict[str, Any], tmp_path: Path) -> None:
    inputs = open_inputs(Config.model_validate(config))
    (tmp_path / "own.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(LaunchError, match=r"own\.jsonl:1: prompt is ''"):
        open_prompts(inputs.config, on_skip=print)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(LaunchError, match="it has no weights"):
        open_inputs(Config.model_validate(config))


@pytest.mark.parametrize("weights", [True, False])
def test_a_recurrent_family_is_refused_by_name_before_anything_starts(config: dict[str, Any], weights: bool) -> None:
    MambaConfig(vocab_size=1000).save_pretrained(config["model"]["path"])
    with pytest.raises(LaunchError, match="a mamba has a recurrent state: sequences cannot share a row") as refused:
        open_inputs(Config.model_validate(config), weights=weights)
    assert "the transformers engine cannot cache it; set rollout.engine to vllm" in str(refused.value)


def test_heads_that_ranks_cannot_share_are_refused_before_anything_starts(config: dict[str, Any]) -> None:
    config["learner"] |= {"ranks": 16, "context_parallel": 16}
    with pytest.raises(LaunchError, match=r"learner\.context_parallel is 16, but a qwen3 with \d+ heads") as refused:
        open_inputs(Config.model_validate(config), weights=False)
    assert "a divisor of" in str(refused.value)


def test_a_run_that_noted_no_samples_of_its_weights_goes_on(config: dict[str, Any]) -> None:
    meta = begin(config).path / "meta.json"
    noted = json.loads(meta.read_text())
    del noted["inputs"]["model"]["files"]["model.safetensors (samples)"]
    meta.write_text(json.dumps(noted))
    assert begin(config).path == meta.parent


def test_an_adapter_that_a_failed_start_merged_is_no_other_adapters_model(
    config: dict[str, Any], tmp_path: Path
) -> None:
    def merged(seed: int) -> tuple[int, dict[str, Any]]:
        """When the weights were written, and one of them."""
        config["model"]["path"] = str(save_adapter(tmp_path / f"adapter-{seed}", seed=seed))
        inputs = open_inputs(Config.model_validate(config))
        with RunDirectory.prepare(inputs.config) as run:
            merge(inputs, run)
        weights = Path(inputs.config.model.path) / "model.safetensors"
        return weights.stat().st_mtime_ns, load_file(weights)

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(tensor.equal(other[name]) for name, tensor in one.items())

    (written, first), (_, second) = merged(1), merged(2)
    assert not same(first, second)
    written, again = merged(1)
    assert same(first, again)
    assert merged(1)[0] == written, "its own is taken as it is"
    store = tmp_path / "runs" / "small" / "store"
    store.mkdir()
    assert merged(1)[0] == written
    with pytest.raises(LaunchError, match="small was begun with another adapter") as refused:
        merged(2)
    assert refused.value.hint == "resume with those, or choose another run.name"
    (store.parent / "model" / "merged_from.json").unlink()
    assert merged(1)[0] == written, "an earlier release's"


def test_a_dry_run_words_prompts_with_the_adapters_own_tokenizer(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    config["model"]["path"], config["data"]["system"] = str(adapter), "Think."
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("pmdflow.run.inputs.ADVICE_S", 0.1)
    with pytest.raises(LaunchError, match=rf"{TINY}', which has no chat template for data\.system"):
        dry_run(load(tmp_path / "small.yaml"))
    save_tokenizer(adapter, chat_template=CHAT_TEMPLATE)
    assert "nothing was started" in dry_run(load(tmp_path / "small.yaml"))
    save_tokenizer(adapter, chat_template="{{ raise_exception('no turns') }}")
    with pytest.raises(LaunchError, match=rf"{adapter}': its chat template fails"):
        dry_run(load(tmp_path / "small.yaml"))
