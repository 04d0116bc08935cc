"""`pmdflow eval`: estimators and intervals, what it takes as checkpoint and task, and what it writes."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.recorded import RENAMED
from pmdflow.data.prompts import make_prompts, read_prompts
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import LaunchError
from pmdflow.evaluate.checkpoint import Checkpoint, _is_tied, find_checkpoint
from pmdflow.evaluate.command import EvalOptions, eval_config, evaluate_checkpoint
from pmdflow.evaluate.results import pass_at_k, print_table, summarize
from pmdflow.evaluate.task import Sample
from pmdflow.metrics.confidence import bootstrap_mean, wilson
from tests.support.data import make_config, same, write_jsonl
from tests.support.paths import ROOT

MODEL = ROOT / "configs" / "tiny-arithmetic"
TASK = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=7), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_pass(outcomes: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(outcomes)))
    draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
    expected = sum(draws) / len(draws)
    assert pass_at_k(attempts=len(outcomes), passed=sum(outcomes), k=k) == pytest.approx(expected)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = rng.random((300, 40)) < 0.3
    covered = [low <= 0.3 <= high for low, high in (wilson(float(d.mean()), 40) for d in draws)]
    assert 0.9 <= np.mean(covered) <= 1.0
    covered = [low <= 0.3 <= high for low, high in (bootstrap_mean(d.astype(float)[:40]) for d in draws[:40])]
    assert np.mean(covered) >= 0.85
    assert wilson(1.0, 20)[0] == pytest.approx(0.8389, abs=1e-3)
    assert wilson(0.0, 0) == (0.0, 1.0)


def sample(reward: float | None) -> Sample:
    return Sample(
        completion="", tokens=5, observed=0, stop="stop", reward=reward, outcome="scored" if reward is not None else ""
    )


def test_an_attempt_that_was_not_scored_is_in_no_estimate() -> None:
    results = [[sample(1.0), sample(0.0)], [sample(None), sample(1.0)], [sample(None), sample(None)]]
    summary = summarize(results, ks=[1, 2], pass_reward=1.0)
    assert summary["avg"]["mean"] == pytest.approx(0.75) and summary["avg"]["prompts"] == 2
    assert summary["pass"]["1"]["mean"] == pytest.approx(0.75)
    assert summary["pass"]["2"] | {"low": 0, "high": 0} == {"mean": 1.0, "low": 0, "high": 0, "prompts": 1}
    assert summary["infra_failures"] == 3
    for answers, words in ((results, "NOT SCORED: 3 of 6 attempts, so the estimates are of the others"),
                           (results[2:], "NOT SCORED: 2 of 2 attempts, so there is no estimate")):  # fmt: skip
        answers[-1][0].message = "the judge [died]"
        console = Console(file=io.StringIO(), width=200)
        shown = summarize(answers[-1:] + answers[:-1], ks=[1], pass_reward=1.0)
        print_table({**shown, "samples": 2, "checkpoint": "c", "task": "t", "tokens_per_s": 1.0}, console)
        assert f"{words}; the first: the judge [died]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stored", "used"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "bfloat16"}, "bfloat16"), ({}, "float32"),
        ({"dtype": "float16"}, "float32"), ({"dtype": None}, "float32"),
    ],
)  # fmt: skip
def test_a_bare_folder_is_computed_in_its_own_type(stored: dict[str, str | None], used: str, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    values = json.loads((MODEL / "config.json").read_text())
    values = {key: value for key, value in values.items() if "dtype" not in key} | stored
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    checkpoint = find_checkpoint(tmp_path / "model")
    assert eval_config(checkpoint, "reasoning_gym/chain_sum", EvalOptions()).model.dtype == used
    assert eval_config(checkpoint, TASK, EvalOptions()).model.dtype == "float32"  # the configuration says so


def test_a_folder_on_a_configuration_and_the_files_it_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["eval", str(MODEL), TASK, "--prompts", "4", "-n", "3", "--k", "1", "--k", "3", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "avg@3" in done.output and "pass@3" in done.output
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert summary["attempts"] == 12 and set(summary["pass"]) == {"1", "3"}
    rewards = np.array([[s["reward"] for s in row["samples"]] for row in rows])
    assert rewards.shape == (4, 3)
    assert summary["avg"]["mean"] == pytest.approx(rewards.mean())
    assert summary["pass"]["3"]["mean"] == pytest.approx((rewards >= 1).any(axis=1).mean())
    assert summary["avg"]["low"] <= summary["avg"]["mean"] <= summary["avg"]["high"]
    assert all("answer:" in s["completion"] for row in rows for s in row["samples"] if s["reward"])


def test_an_answer_of_a_bare_model_has_half_of_its_positions() -> None:
    config = eval_config(find_checkpoint(MODEL), "reasoning_gym/chain_sum", EvalOptions())
    assert config.data.max_tokens == 512  # of 1,024
    assert eval_config(find_checkpoint(MODEL), TASK, EvalOptions()).data.max_tokens == 448


def test_whether_a_head_is_tied_is_the_familys_default_where_a_folder_does_not_say_it(tmp_path: Path) -> None:
    for model, tied in (("llama", False), ("gemma3_text", True)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
        assert _is_tied(str(tmp_path)) is tied


def length(*, completion: str, prompt: str, metadata: Any) -> float:
    return float(len(completion))


def test_a_task_file_with_overrides_of_its_own(tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    rows = [
        {"prompt": "1 + 2 =", "sampling": {"max_tokens": 3, "temperature": 0}},
        {"prompt": "1 + 2 =", "sampling": {"stop": ["answer"], "temperature": 0}},
        {"prompt": "1 + 2 =", "sampling": {"min_tokens": 30, "max_tokens": 31}},
    ]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvalOptions(samples=2, reward=[f"{__name__}:length"], max_tokens=64, out=tmp_path / "out")
    assert evaluate_checkpoint(MODEL, str(task), options) == 0
    found = [json.loads(line)["samples"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [s["tokens"] for s in found[0]] == [3, 3] and found[0][0]["stop"] == "length"
    assert all(s["completion"].endswith("answer") and s["stop"] == "stop" for s in found[1])
    assert all(s["tokens"] >= 31 for s in found[2])
    assert found[1][0]["reward"] == len(found[1][0]["completion"])


def broken(*, completion: str, prompt: str, metadata: Any) -> float:
    raise RuntimeError("the judge is away")


def test_an_evaluation_in_which_nothing_was_scored_says_why_and_does_not_succeed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = EvalOptions(samples=1, prompts=2, max_tokens=2, reward=[f"{__name__}:broken"], out=tmp_path / "out")
    assert evaluate_checkpoint(MODEL, "reasoning_gym/chain_sum", options) == 1
    assert "NOT SCORED: 2 of 2 attempts, so there is no estimate; the first: " in (said := capsys.readouterr().out)
    assert "the judge is away" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["avg"] is None


def fails_once(*, completion: str, prompt: str, metadata: Any) -> float:
    """Of each prompt, the first call fails."""
    name = Path(os.environ["SEEN_PROMPTS"]) / str(abs(hash(prompt)))
    if not name.exists():
        name.touch()
        raise RuntimeError("the judge is away")
    return 1.0


def test_an_answer_whose_scoring_fails_is_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("SEEN_PROMPTS", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    options = EvalOptions(samples=2, prompts=3, max_tokens=2, reward=[f"{__name__}:fails_once"], out=tmp_path / "out")
    assert evaluate_checkpoint(MODEL, "reasoning_gym/chain_sum", options) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["attempts"], summary["infra_failures"], summary["avg"]["mean"]) == (6, 0, 1.0)
    assert len(list((tmp_path / "seen").iterdir())) == 3


@pytest.mark.parametrize(
    ("checkpoint", "task", "message"),
    [
        ("nowhere", TASK, "is no directory"),
        ("empty", TASK, "holds neither a run"),
        (str(MODEL), "reasoning_gym/chain_sums", "chain_sum"),
        (str(MODEL), "task.txt", "give a .jsonl or .parquet file"),
        (str(MODEL), "missing.jsonl", "--reward MODULE:NAME"),
    ],
)
def test_wrong_paths_and_tasks_are_named(checkpoint: str, task: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LaunchError, match=message):
        evaluate_checkpoint(tmp_path / checkpoint, task, EvalOptions(out=tmp_path / "out", prompts=2))


def test_the_configuration_of_an_older_run_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "data.most_tokens", "data.max_tokens")
    text = Path(TASK).read_text().replace("max_tokens: 448", "most_tokens: 448")
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "run.lock").touch()
    config = eval_config(find_checkpoint(MODEL), str(tmp_path / "config.yaml"), EvalOptions())
    assert config.data.max_tokens == 448


def test_wrong_k_and_length_are_named() -> None:
    with pytest.raises(LaunchError, match="raise --samples"):
        evaluate_checkpoint(MODEL, TASK, EvalOptions(samples=2, ks=[3]))
    with pytest.raises(LaunchError, match=r"eval.min_tokens \(9\) is above"):
        eval_config(find_checkpoint(MODEL), TASK, EvalOptions(min_tokens=9, max_tokens=4))


def test_an_environment_is_part_of_the_task(tmp_path: Path) -> None:
    folder = ROOT / "configs" / "tiny-calculator"
    options = EvalOptions(samples=4, prompts=4, out=tmp_path / "out")
    assert evaluate_checkpoint(folder, str(ROOT / "configs" / "calculator.yaml"), options) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    called = [s for row in rows for s in row["samples"] if s["observed"]]
    assert called and np.mean([s["reward"] for s in called]) > 0.5
    assert all("] = " in s["completion"] for s in called)


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"prompt": "{} + 1 ="}, {"suffix": " Think."}),
        ({"question": "{} + 1 =", "truth": "x"}, {"columns": {"prompt": "question", "answer": "truth"}}),
    ],
)
def test_the_file_of_a_run_is_read_as_the_run_trains_on_it(
    row: dict[str, str], data: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{name: text.format(number) for name, text in row.items()} for number in range(4)]
    task = write_jsonl(tmp_path / "own.jsonl", rows)
    run = make_config(str(MODEL), task, held_out=1, **data)
    checkpoint = Checkpoint(model=str(MODEL), directory=None, version=0, name="own", run=run)
    evaluated = {prompt.id: prompt for prompt in read_prompts(eval_config(checkpoint, task, EvalOptions()))}
    trained = [make_prompts(run).prompt(cursor) for cursor in range(3)]
    assert len(evaluated) == 4
    assert all(same(evaluated[prompt.id], prompt) for prompt in trained)


def test_sources_and_evaluation_sets_of_a_run_are_read_as_it_reads_them(tmp_path: Path) -> None:
    one, held, other = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{column: f"{number} + 1 =", "answer": "x"} for number in range(4)])
        for name, column in (("one", "question"), ("held", "asked"), ("other", "prompt"))
    )
    judge = [{"function": "math:sqrt"}]
    run = make_config(
        str(MODEL),
        [{"task": one, "columns": {"prompt": "question"}, "reward": judge}, {"task": "reasoning_gym/gcd"}],
        held_out=2,
        sets={"held": {"task": held, "columns": {"prompt": "asked"}}},
        suffix=" Think.",
    )
    run = run.model_copy(update={"reward": run.reward.model_copy(update={"timeout_s": 77.0})})
    checkpoint = Checkpoint(model=str(MODEL), directory=None, version=0, name="own", run=run)
    configs = {task: eval_config(checkpoint, task, EvalOptions()) for task in (one, held)}
    configs[other] = eval_config(checkpoint, other, EvalOptions(reward=["math:exp"]))
    words = {
        task: load_tokenizer(str(MODEL)).decode(read_prompts(config)[0].tokens) for task, config in configs.items()
    }
    assert set(words.values()) == {"0 + 1 = Think.\n"}
    used = [(config.own_rewards.get("") or config.reward.functions)[0].function for config in configs.values()]
    assert used == ["math:sqrt", "pmdflow.reward.reasoning_gym:score", "math:exp"]
    assert {config.reward.timeout_s for config in configs.values()} == {77.0}


@pytest.mark.parametrize("mixed", [False, True])
def test_rewards_of_the_command_line_come_before_those_of_sources(mixed: bool, tmp_path: Path) -> None:
    own = {"reward": [{"function": "pmdflow.reward.math:score"}]}
    task = write_jsonl(tmp_path / "own.jsonl", [{"prompt": f"{number} + 1 ="} for number in range(4)])
    sources = [{"task": task, "name": name, **own} for name in "ab"] if mixed else task
    run = make_config(str(MODEL), sources, held_out=0, **({} if mixed else own))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    options = EvalOptions(reward=["math:sqrt"])
    checkpoint = Checkpoint(model=str(MODEL), directory=None, version=0, name="own", run=run)
    config = eval_config(checkpoint, str(tmp_path / "task.yaml"), options)
    assert [given.function for given in config.reward.functions] == ["math:sqrt"] and not config.own_rewards
    assert eval_config(checkpoint, str(tmp_path / "task.yaml"), EvalOptions()).own_rewards


def test_the_file_of_a_run_is_known_from_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run records the place, and whoever evaluates it writes another path to it, and a reward that lies beside."""
    write_jsonl(tmp_path / "own.jsonl", [{"question": f"{number} + 1 ="} for number in range(4)])
    (tmp_path / "judged_there.py").write_text("def score(*, completion):\n    return 1.0\n")
    run = make_config(str(MODEL), str(tmp_path / "own.jsonl"), columns={"prompt": "question"})
    checkpoint = Checkpoint(model=str(MODEL), directory=None, version=0, name="own", run=run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = eval_config(checkpoint, "../own.jsonl", EvalOptions())
    assert config.data.columns == run.data.columns and config.reward.functions == run.reward.functions
    config = eval_config(checkpoint, "../own.jsonl", EvalOptions(reward=["judged_there:score"]))
    assert Path(config.reward.functions[0].function.split(":")[0]).resolve() == tmp_path.resolve()
    with pytest.raises(LaunchError, match="does not say how an answer is judged"):
        eval_config(checkpoint, "../other.jsonl", EvalOptions())
