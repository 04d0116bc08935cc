"""A run from Python: what was recorded, what was generated, what was learnt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pmdflow
from pmdflow.errors import PmdflowError
from pmdflow.store.archive import parts, read_part
from pmdflow.store.facade import TrajectoryStore
from pmdflow.types import Prompt, Quota, Segment, Stop
from tests.support.paths import ROOT
from tests.support.runs import read_lines
from tests.support.trained_run import TrainedRun


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with TrainedRun(tmp_path_factory.mktemp("run")) as run:
        run.train(3)
    return run.path


def test_importing_it_loads_nothing_heavy_and_its_names_are_there() -> None:
    code = (
        "import sys, pmdflow\n"
        "heavy = {'torch', 'ray', 'numpy', 'transformers', 'pydantic', 'zarr'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert {'up', 'open_run', 'Run'} <= set(dir(pmdflow))\n"
        "pmdflow.open_run\n"
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()\n"
        "assert all(getattr(pmdflow, name).__doc__ for name in pmdflow.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'down'"):
        _ = pmdflow.down  # type: ignore[attr-defined]


def test_metrics_are_the_records_of_the_run(trained: Path) -> None:
    run = pmdflow.open_run(trained)
    written = read_lines(trained / "metrics.jsonl")
    assert run.metrics() == [record for record in written if record["kind"] == "iteration"]
    assert run.metrics("eval") == [record for record in written if record["kind"] == "eval"]
    assert run.metrics("sample") == []
    with pytest.raises(PmdflowError, match=r"(?s)kind 'iterations'.*iteration, eval, sample"):
        run.metrics("iterations")  # type: ignore[arg-type]
    with pytest.raises(PmdflowError, match="has no evaluation set 'sums'"):
        run.metrics("eval", eval_set="sums")
    assert run.config.learner.lr == 1e-2 and not run.is_live


def test_archived_trajectories_are_those_of_the_claims(trained: Path) -> None:
    run = pmdflow.open_run(str(trained))
    found = list(run.trajectories())
    batches = [read_part(path) for path in parts(trained)]
    assert [t.id for t in found] == [int(number) for batch in batches for number in batch.trajectories]
    assert [t.reward for t in found] == [reward for batch in batches for reward in batch.rewards]
    second = list(run.trajectories(2))
    assert {t.iteration for t in second} == {2} and len(second) == len(batches[1].rewards)
    assert np.array_equal(np.concatenate([np.concatenate((t.prompt, t.tokens)) for t in second]), batches[1].tokens)
    assert all(len(t.prompt) == length for t, length in zip(second, batches[1].prompt_lengths, strict=True))
    for t in second:
        assert t.mask is not None and t.state == "archived" and t.stop is not Stop.NONE
        assert len(t.tokens) == len(t.logprobs) == len(t.versions) == len(t.mask)
        assert (t.versions >= 0).all() and set(t.components) == {"correct", "a:format"}
    assert isinstance(run.tokenizer.decode(second[0].tokens), str)


def test_groups_hold_their_members(trained: Path) -> None:
    groups = list(pmdflow.open_run(trained).groups(3))
    batch = read_part(parts(trained)[2])
    assert [group.id for group in groups] == sorted(set(batch.groups.tolist()))
    for group in groups:
        assert group.iteration == 3 and {t.prompt_id for t in group.trajectories} == {group.prompt_id}
        assert np.array_equal(group.rewards, batch.rewards[batch.groups == group.id])


def test_what_the_store_of_a_live_run_holds_follows_beside_its_writer(trained: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    (live / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    (live / "archive").symlink_to(trained / "archive")
    store = TrajectoryStore(live / "store", groups_per_iteration=1, lookahead=3, max_staleness=4)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=4, tokens=100, tokens_per_segment=None))
    run = pmdflow.open_run(live)
    archived = len(list(run.trajectories()))
    prompt = Prompt(id="p0", text="1+1=", tokens=np.array([5, 6], np.int32))
    group = store.admit("train-0", prompt, group_size=2, max_tokens=8, cursor=0)
    first, second = store.lease("worker", version=0, max_leases=2, timeout_s=0.0)
    store.admit("eval-0", prompt, group_size=1, max_tokens=8, kind="eval")
    tokens, logprobs = np.array([7, 8, 9], np.int32), np.array([-1.0, -2.0, -3.0], np.float32)
    for lease, stop in ((first, "stop"), (second, None)):
        segment = Segment(
            trajectory=lease.trajectory, epoch=lease.epoch, offset=0, version=0, temperature=1.0, tokens=tokens,
            logprobs=logprobs, next_version=0, stop=stop,
        )  # fmt: skip
        store.append([segment])
    store.score(first.trajectory, 0, "scored", 0.5, {"correct": 0.5})
    by_id = {t.id: t for t in list(run.trajectories())[archived:]}
    assert by_id.keys() == {first.trajectory, second.trajectory}
    done, partial = by_id[first.trajectory], by_id[second.trajectory]
    assert (done.state, done.reward, done.components, done.stop) == ("scored", 0.5, {"correct": 0.5}, Stop.STOP)
    assert (partial.state, partial.reward, partial.stop, partial.iteration) == ("idle", None, Stop.NONE, None)
    for t in (done, partial):
        assert t.group == group and t.prompt_id == "p0" and t.mask is None
        assert t.prompt.tolist() == [5, 6] and t.tokens.tolist() == [7, 8, 9] and t.versions.tolist() == [0, 0, 0]
        assert t.logprobs.tolist() == [-1.0, -2.0, -3.0]
    last = list(run.groups())[-1]
    assert last.id == group and len(last.trajectories) == 2 and last.rewards.tolist() == [0.5]
    store.close()


def test_a_checkpoint_is_a_model_and_a_folder(trained: Path, tmp_path: Path) -> None:
    run = pmdflow.open_run(trained)
    assert (run.checkpoint().iteration, run.checkpoint(2).version) == (3, 2)
    checkpoint = run.checkpoint(2)
    checkpoint.export(tmp_path / "out")
    same_logits(checkpoint.model(), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert checkpoint.model(dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(PmdflowError, match="kept iterations: 1, 2, 3"):
        run.checkpoint(7)
    with pytest.raises(PmdflowError, match="is no run directory"):
        pmdflow.open_run(tmp_path)


def test_a_checkpoint_of_adapters_is_the_merged_model(tmp_path: Path) -> None:
    with TrainedRun(tmp_path, model__dtype="bfloat16", learner__lora={"rank": 4}) as trained:
        trained.train()
    checkpoint = pmdflow.open_run(trained.path).checkpoint()
    checkpoint.export(tmp_path / "out")
    same_logits(checkpoint.model(), AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))


def same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other.eval()(input_ids=ids).logits)
