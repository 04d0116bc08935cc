"""A run leaves as folders that transformers and PEFT load, equal to what its own evaluation uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.data.fingerprint import fingerprint
from pmdflow.errors import PmdflowError
from pmdflow.export.model import load_model
from pmdflow.export.options import ExportOptions
from pmdflow.export.write import export
from pmdflow.learner.checkpoint.manifest import manifest_at
from pmdflow.learner.checkpoint.weights import checkpoint_weights
from tests.support.paths import ROOT, TINY
from tests.support.trained_run import TrainedRun, random_model

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    with TrainedRun(tmp_path_factory.mktemp("whole")) as run:
        run.train(3)
    return run


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    with TrainedRun(tmp_path_factory.mktemp("adapted"), learner__lora=LORA) as run:
        run.train(2)
    return run


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(60).view(2, 30) % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=ids).logits


def answers(checkpoint: Path, task: Path, directory: Path, *, tokens: int = 48) -> list[tuple[str, str, int, str]]:
    """Prompt, completion, length and stop of what `pmdflow eval` answers greedily to held-out prompts."""
    out = directory / f"eval-{checkpoint.name}"
    arguments = ["eval", str(checkpoint), str(task), "--prompts", "4", "-n", "1", "--temperature", "0"]
    done = CliRunner().invoke(app, [*arguments, "--max-tokens", str(tokens), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [(row["prompt"], s["completion"], s["tokens"], s["stop"]) for row in rows for s in row["samples"]]


def test_weights_and_logits_are_those_of_the_checkpoint(whole: TrainedRun, tmp_path: Path) -> None:
    export(whole.path, tmp_path / "out", ExportOptions())
    exported = load(tmp_path / "out")
    state = exported.state_dict()
    expected = checkpoint_weights(manifest_at(whole.path / "checkpoints", 3).directory, lora=None, tied=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert expected.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    initial = load(TINY)
    assert not torch.equal(logits(initial), logits(exported))
    initial.load_state_dict(expected, strict=False)
    assert torch.equal(logits(initial), logits(exported))


def test_an_earlier_iteration_in_another_type_and_several_files(whole: TrainedRun, tmp_path: Path) -> None:
    export(whole.path, tmp_path / "out", ExportOptions(iteration=1, dtype="bfloat16", shard_bytes=200_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4 and set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "out" / name).stat().st_size < 200_000 + 20_000 for name in files)
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    expected = checkpoint_weights(manifest_at(whole.path / "checkpoints", 1).directory, lora=None, tied=True)
    assert all(torch.equal(model.state_dict()[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_greedy_answers_are_those_of_the_runs_own_evaluation(whole: TrainedRun, tmp_path: Path) -> None:
    export(whole.path, tmp_path / "out", ExportOptions())
    evaluated = answers(whole.path, whole.path / "config.yaml", tmp_path)
    assert answers(tmp_path / "out", whole.path / "config.yaml", tmp_path) == evaluated
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, completion, tokens, _ in evaluated:
        ids = tokenizer(prompt + "\n", return_tensors="pt", add_special_tokens=False)
        generated = model.generate(**ids, do_sample=False, max_new_tokens=48)[0, ids["input_ids"].shape[1] :]
        assert len(generated) == tokens
        assert tokenizer.decode(generated, skip_special_tokens=True) == completion


def test_merged_adapters_answer_as_the_engine_does_that_has_them_beside_the_weights(
    adapted: TrainedRun, tmp_path: Path
) -> None:
    export(adapted.path, tmp_path / "out", ExportOptions())
    merged, base = load(tmp_path / "out"), load(TINY)
    changed = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, merged.state_dict()[name])]
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    task = adapted.path / "config.yaml"
    assert answers(tmp_path / "out", task, tmp_path, tokens=8) == answers(adapted.path, task, tmp_path, tokens=8)


def test_adapters_alone_in_peft_compute_what_the_merged_weights_compute(adapted: TrainedRun, tmp_path: Path) -> None:
    export(adapted.path, tmp_path / "adapter", ExportOptions(adapter=True))
    export(adapted.path, tmp_path / "merged", ExportOptions(dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = logits(load(tmp_path / "merged"))
    # Two ways to add 4 + 128 products of float32: a few roundings of the largest logit apart.
    assert (logits(model) - merged).abs().max() <= 64 * torch.finfo(torch.float32).eps * merged.abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == TINY and config["r"] == 4 and config["lora_alpha"] == 8


def test_a_mixture_of_experts_is_stored_as_its_family_is(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=316,
        max_position_embeddings=256, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    folder = random_model(tmp_path / "model", config, tokenizer=TINY)
    with TrainedRun(tmp_path, model__path=str(folder)) as run:
        run.train()
        export(run.path, tmp_path / "out", ExportOptions(shard_bytes=20_000))
        expected = checkpoint_weights(manifest_at(run.path / "checkpoints", 1).directory, lora=None, tied=False)
    stored = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert stored.keys() == load_file(folder / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    model = load(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_refusals_name_what_is_wrong_and_leave_nothing(whole: TrainedRun, adapted: TrainedRun, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    cases = [
        (whole.path, full, ExportOptions(), "is not an empty folder"),
        (whole.path, tmp_path / "a", ExportOptions(iteration=9), "kept iterations: 1, 2, 3"),
        (whole.path, tmp_path / "b", ExportOptions(adapter=True), "leave out --adapter"),
        (adapted.path, tmp_path / "d", ExportOptions(adapter=True, push="me/sums"), "push --merged"),
        (tmp_path / "nowhere", tmp_path / "c", ExportOptions(), "is no run directory"),
    ]
    for run, out, options, message in cases:
        with pytest.raises(PmdflowError, match=message):
            export(run, out, options)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_checkpoint_of_another_model_is_refused_by_name(whole: TrainedRun, tmp_path: Path) -> None:
    config = (whole.path / "config.yaml").read_text()
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text(config.replace(str(TINY), str(ROOT / "configs" / "tiny-calculator")))
    (other / "checkpoints").symlink_to(whole.path / "checkpoints")
    with pytest.raises(
        PmdflowError, match=r"does not hold the tensors of the model folder: model\.embed_tokens\.weight"
    ):
        export(other, tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()


def test_a_model_folder_that_changed_since_is_refused_by_the_file(adapted: TrainedRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    run = Path(shutil.copytree(adapted.path, tmp_path / "run"))
    config, meta = (run / "config.yaml").read_text(), json.loads((run / "meta.json").read_text())
    (run / "config.yaml").write_text(config.replace(str(TINY), str(base)))
    (run / "meta.json").write_text(json.dumps({**meta, "inputs": {"model": {"files": fingerprint(base)}}}))
    load_model(run, 2, None)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    for read in (lambda: export(run, tmp_path / "out", ExportOptions()), lambda: load_model(run, 2, None)):
        with pytest.raises(
            PmdflowError, match=rf"begun with {base}, whose model\.safetensors changed since"
        ) as refused:
            read()
        assert refused.value.hint == "put back what was there; or export with --adapter, which needs no weights of it"
    export(run, tmp_path / "adapter", ExportOptions(adapter=True))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(PmdflowError, match=r"whose chat_template\.jinja changed since"):
        export(run, tmp_path / "other", ExportOptions(adapter=True))
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_the_command_says_what_it_wrote(whole: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["export", str(whole.path), ".", "--iteration", "2"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert f"weights of iteration 2 (version 2) in float32, {len(list(tmp_path.iterdir()))} files" in done.output
