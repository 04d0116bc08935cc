"""From a file and overrides to a checked configuration: located errors, overrides, origins."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.errors import ConfigError
from pmdflow.config.load import leaves, load
from tests.support.config import MINIMAL, edit, refuse
from tests.support.paths import CONFIGS


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
        "cluster.yaml:6:10: error: `model.dtype` must be 'auto', 'float32' or 'bfloat16', got 'float23' (string)\n"
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
    for seed in ("-1", str(2**32)):  # NumPy takes no more, and says so only in an actor
        assert "run.seed" in str(refuse(cluster_yaml, f"run.seed={seed}"))
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


def test_merged_yaml_keys_keep_their_place(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("run:\n  name: small", "run: &run\n  name: small"))
    with cluster_yaml.open("a") as file:
        file.write("eval:\n  <<: {prompts: 3, every: 4}\n  every: 5\n")
    loaded = load(cluster_yaml)
    assert (loaded.config.eval.prompts, loaded.config.eval.every) == (3, 5)
    assert loaded.origins["eval.prompts"] == "cluster.yaml:16"
    assert loaded.origins["eval.every"] == "cluster.yaml:17"


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


def test_files_that_an_agents_command_names_are_found_from_its_own_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.py").touch()
    (tmp_path / "cluster.yaml").write_text(MINIMAL)
    agents = load(tmp_path / "cluster.yaml", ["agents={command: [python, agent.py, --fast]}"]).config.agents
    assert agents is not None and agents.command == ["python", str(tmp_path / "agent.py"), "--fast"]


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


@pytest.mark.parametrize(
    "module", ["pmdflow.errors", "pmdflow.config.errors", "pmdflow.config.load", "pmdflow.config.try_import"]
)
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
