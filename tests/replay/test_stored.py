"""Training from stored rollouts alone, judging them anew, and two settings side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.load import load_run
from pmdflow.data.prompts import make_prompts
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.errors import LaunchError, PmdflowError
from pmdflow.learner.checkpoint.manifest import newest_manifest
from pmdflow.metrics.history import iterations
from pmdflow.replay import training
from pmdflow.replay.comparison import pairs_of
from pmdflow.replay.rescoring import Rescorer, rewards_differ
from pmdflow.replay.training import train_on_stored
from pmdflow.store.archive import parts, read_part
from pmdflow.types import TrainBatch
from tests.support.fixture_run import make_batch
from tests.support.learner import write_teacher
from tests.support.paths import TINY
from tests.support.runs import Up
from tests.support.trained_run import TrainedRun

torch.set_num_threads(1)
OTHER = "reward.functions=[{function: tests.support.lengths:longer}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations on made claims."""
    with TrainedRun(tmp_path_factory.mktemp("stored"), learner__checkpoint_every=1) as trained:
        trained.train(2)
    return trained.path


def losses(run: Path) -> list[list[float]]:
    return [record["learner/step_losses"] for _, record in sorted(iterations(run).items())]


def test_training_from_stored_rollouts(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train_on_stored(run, out, ["run.iterations=1", "learner.importance_weights=none"]) == 0
    assert losses(out) == losses(run)[:1], "the same claim and weights"
    assert newest_manifest(out / "checkpoints") is not None
    source = json.loads((out / "provenance.json").read_text())
    assert source["run"] == str(run) and [name for name, _ in source["parts"]] == [path.name for path in parts(run)]
    corrected = training._settings(run, out, [], iterations=2)
    assert corrected.learner.importance_weights == "token", "other weights generated what is trained on"
    assert corrected.run.iterations == 2 and corrected.run.name == "out"


@pytest.mark.nightly
def test_training_from_stored_rollouts_is_resumed_and_ends_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["learner.algorithm=grpo", "run.iterations=3", "learner.checkpoint_every=1"]
    once, again = tmp_path / "once", tmp_path / "again"
    assert train_on_stored(run, once, settings) == 0
    commit = training.commit_checkpoint

    def killed(root, manifest, files):  # type: ignore[no-untyped-def]
        if manifest.iteration == 2:
            raise KeyboardInterrupt
        return commit(root, manifest, files)

    monkeypatch.setattr(training, "commit_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_on_stored(run, again, settings)
    monkeypatch.undo()
    assert train_on_stored(run, again, settings) == 0
    assert losses(again) == losses(once) and len(losses(once)) == 3
    contents = [newest_manifest(out / "checkpoints") for out in (once, again)]
    assert contents[0] and contents[1] and contents[0].iteration == contents[1].iteration == 3
    assert [read_part(path).groups[0] for path in parts(once)] == [1000, 2000, 1000], "again from the first"
    with pytest.raises(LaunchError, match="was begun with other settings"):
        train_on_stored(run, once, [*settings, "learner.tau=0.3"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run's model with other weights in its last layer."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), TINY, by=0.1)


def test_a_teacher_teaches_from_stored_rollouts_as_it_does_online(tmp_path: Path, teacher: str) -> None:
    with TrainedRun(tmp_path / "online", learner__algorithm="opd", learner__teacher=teacher) as online:
        online.train(1)
    taught = ["learner.algorithm=opd", f"learner.teacher={teacher}", "learner.importance_weights=none"]
    out = tmp_path / "offline"
    assert train_on_stored(online.path, out, ["run.iterations=1", *taught]) == 0
    ((_, first),), ((_, other),) = iterations(online.path).items(), iterations(out).items()
    keys = ("learner/step_losses", "learner/grad_norm", "learner/credit_teacher_kl", "learner/teacher_tokens")
    assert [first[key] for key in keys] == [other[key] for key in keys], "bit for bit"
    assert first["learner/teacher_tokens"] == len(read_part(parts(online.path)[0]).tokens)
    assert any(first["learner/step_losses"])


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_real_kill_of_training_from_stored_rollouts_ends_the_same(run: Path, tmp_path: Path) -> None:
    settings = ["--set", "learner.algorithm=grpo", "--set", "run.iterations=30", "--set", "learner.checkpoint_every=1"]

    def begin(out: Path) -> Up:
        return Up.of(["replay", str(run), "--train", str(out), *settings], tmp_path, run=out)

    killed = begin(tmp_path / "again")
    killed.wait_for(lambda: killed.reached(2), "iteration 2")
    killed.kill_everything()
    assert not killed.reached(30)
    once, resumed = begin(tmp_path / "once"), begin(tmp_path / "again")
    for command in (once, resumed):
        assert command.wait() == 0, command.output
    assert losses(resumed.run) == losses(once.run) and len(losses(once.run)) == 30


def test_what_generated_its_rollouts_is_not_trained_over(run: Path, tmp_path: Path) -> None:
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(LaunchError, match="generated its rollouts"):
        train_on_stored(run, run, [])
    assert (run / "config.yaml").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(PmdflowError, match="holds no claim"):
        train_on_stored(tmp_path / "empty", tmp_path / "out", [])


@pytest.fixture
def answered(run: Path) -> TrainBatch:
    """A claim whose prompts are the run's, answered with its right answers and with nothing."""
    config, batch = load_run(run).config, make_batch(1, groups=2, size=2)
    tokenizer, prompts = load_tokenizer(config.model.path), make_prompts(config)
    rows, lengths = [], []
    chosen = [prompts.prompt(5), prompts.prompt(9)]
    for prompt in chosen:
        for text in (f"answer: {prompt.metadata['answer']}", "answer: -7"):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append([*prompt.tokens.tolist(), *own])
            lengths.append(len(prompt.tokens))
    total, flat = sum(map(len, rows)), ("logprobs", "versions", "temperatures", "mask")
    return replace(
        batch,
        tokens=np.concatenate(rows).astype(np.int32),
        cu_seqlens=np.cumsum([0, *map(len, rows)]),
        prompt_lengths=np.array(lengths, np.int32),
        prompt_ids=tuple(prompt.id for prompt in chosen for _ in range(2)),
        **{name: np.zeros(total, getattr(batch, name).dtype) for name in flat},
    )


def test_claims_are_judged_by_other_functions(run: Path, answered: TrainBatch) -> None:
    recorded, config = load_run(run).config, load_run(run, [OTHER]).config
    assert rewards_differ(config, recorded) and not rewards_differ(recorded, recorded)
    with Rescorer(config, prompt_ids=answered.prompt_ids, last_group=1) as rescorer:
        judged = rescorer.judge(answered)
    lengths = np.diff(answered.cu_seqlens) - answered.prompt_lengths
    assert (judged.rewards > 0).all() and (np.diff(judged.rewards[np.argsort(lengths)]) >= 0).all()
    assert list(judged.components) == ["lengths.longer"]
    with Rescorer(recorded, prompt_ids=answered.prompt_ids, last_group=1) as rescorer:
        assert rescorer.judge(answered).rewards.tolist() == [1.0, 0.0, 1.0, 0.0]
    broken = load_run(run, [OTHER.replace("longer", "fails")]).config
    with (
        Rescorer(broken, prompt_ids=answered.prompt_ids, last_group=1) as rescorer,
        pytest.raises(PmdflowError, match=r"trajectory \d+ of iteration 1 cannot be judged: .*the judge is away"),
    ):
        rescorer.judge(answered)
    with pytest.raises(PmdflowError, match="1 prompts of the stored rollouts are not among"):
        Rescorer(recorded, prompt_ids=["x"], last_group=1)


def test_two_settings_on_the_same_rollouts(run: Path) -> None:
    same, other = (pairs_of(run, [], second, start=0) for second in ([], ["learner.algorithm=boltzmann_pmd"]))
    assert [pair.iteration for pair in same] == [1, 2]
    for pair in same:
        assert pair.cosine == pytest.approx(1) and pair.correlation == pytest.approx(1)
        assert pair.first.loss == pair.second.loss and pair.first.ess_share == 1
    for pair, first in zip(other, same, strict=True):
        assert pair.first.loss == pytest.approx(first.first.loss), "B leaves no trace in A"
        assert pair.second.ess_share < 1 and pair.cosine < 0.9999
    with pytest.raises(PmdflowError, match="differ in model"):
        pairs_of(run, [], ["model.dtype=bfloat16"], start=0)


def test_the_commands(run: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.html"
    arguments = ["replay", str(run), "--set", "learner.tau=0.5", "--against", "learner.algorithm=grpo"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(plot)], catch_exceptions=False)
    assert done.exit_code == 0 and "cosine" in done.output and "plotly" in plot.read_text()
    with pytest.raises(PmdflowError, match="three different things"):
        CliRunner().invoke(app, [*arguments, "--verify"], catch_exceptions=False)
