"""Mixtures and evaluation sets in a configuration file: errors where they are written, files found, imports tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.config.errors import ConfigError, ConfigIssue
from pmdflow.config.installed import require_imports
from pmdflow.config.load import load

FILE = """run: {name: own, iterations: 1}
model: {path: m}
data:
  max_tokens: 16
  system: All.
  task:
    - {task: own.jsonl, weight: 3, suffix: " Think."}
    - task: hf:org/sums@v1
      system: Own.
eval:
  sets:
    held: {task: held.parquet, samples: 4}
reward: {functions: [{function: "math:sqrt"}]}
scheduler: {groups_per_iteration: 4, tokens_per_iteration: 100}
"""


def write(folder: Path, *replacements: tuple[str, str]) -> Path:
    text = FILE
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "own.yaml").write_text(text)
    return folder / "own.yaml"


def refuse(path: Path) -> ConfigIssue:
    with pytest.raises(ConfigError) as refused:
        load(path)
    (issue,) = refused.value.issues
    return issue


def test_sources_take_what_they_lack_from_the_mixture(tmp_path: Path) -> None:
    first, second = load(write(tmp_path)).config.data.sources
    assert (first.label, first.weight, first.system, first.suffix) == ("own", 3.0, "All.", " Think.")
    assert (second.label, second.weight, second.system, second.suffix) == ("sums", 1.0, "Own.", None)


@pytest.mark.parametrize(
    ("change", "line", "message", "hint"),
    [
        (("weight: 3", "weigth: 3"), 7, "unknown key `data.task.0.weigth`", "did you mean `weight`?"),
        (("weight: 3", "weight: 0"), 7, "`data.task.0.weight` must be above 0.0, got 0", "Share of the draws"),
        (("own.jsonl", "own.csv"), 7, "`data.task.0.task` is malformed: 'own.csv'", "What `data.task` takes"),
        (("samples: 4", "sample: 4"), 12, "unknown key `eval.sets.held.sample`", "did you mean `samples`?"),
        (("samples: 4", "samples: 2, k: [4]"), 12, "eval.sets.held.k is [4]", "raise samples"),
    ],
)
def test_a_mistake_in_a_source_is_located(
    tmp_path: Path, change: tuple[str, str], line: int, message: str, hint: str
) -> None:
    issue = refuse(write(tmp_path, change))
    assert message in issue.message
    assert hint in str(issue.hint)
    assert issue.place.line == line


def test_a_task_that_is_neither_a_text_nor_a_list_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    write(tmp_path)
    (before, _), (_, after) = (FILE.split(mark) for mark in ("  task:\n", "      system: Own.\n"))
    path.write_text(f"{before}  task: 7\n{after}")
    assert refuse(path).message == "`data.task` must be a string, got 7 (integer)"


def test_files_of_sources_and_sets_are_found_beside_the_configuration(tmp_path: Path) -> None:
    for name in ("own.jsonl", "held.parquet"):
        (tmp_path / name).touch()
    config = load(write(tmp_path)).config
    assert config.data.sources[0].task == str(tmp_path / "own.jsonl")
    assert config.data.sources[1].task == "hf:org/sums@v1"
    assert config.eval.sets["held"].task == str(tmp_path / "held.parquet")


def test_rewards_of_sources_and_sets_are_imported_before_anything_starts(tmp_path: Path) -> None:
    reward = 'reward: [{function: "math:%s"}]'
    path = write(
        tmp_path,
        ("weight: 3", "weight: 3, " + reward % "sqr"),
        ("samples: 4", "samples: 4, " + reward % "co"),
    )
    with pytest.raises(ConfigError) as refused:
        require_imports(load(path))
    assert [issue.message.partition(":")[0] for issue in refused.value.issues] == [
        "`data.task.0.reward.0.function`",
        "`eval.sets.held.reward.0.function`",
    ]
    assert [issue.place.line for issue in refused.value.issues] == [7, 12]
