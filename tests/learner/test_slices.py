"""Ranks that read their own rows of a model folder have the weights of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from pmdflow.learner.slices import Part, load_part
from tests.support.families import FAMILIES, write_family
from tests.support.learner import make_config, two_claims
from tests.support.ranks import Ranks

RANKS = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    ranks = Ranks(RANKS)
    yield ranks
    ranks.kill()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_each_part_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    write_family(family, tmp_path, tie_word_embeddings=family in {"qwen3", "gemma2"})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    buffers = dict(whole.named_buffers())
    for rank in range(3):
        part = Part(rank=rank, ranks=3)
        model = load_part(tmp_path, part)
        found = dict(model.named_parameters())  # by its first name alone if it is tied
        assert found.keys() == dict(whole.named_parameters()).keys()
        for name, expected in whole.named_parameters():
            assert torch.equal(found[name][part.rows(len(expected))], expected[part.rows(len(expected))]), name
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("hidden", "intermediate", "most"),
    [(256, 960, 2.0), pytest.param(1024, 1600, 1.5, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])],
)
def test_ranks_that_load_a_model_grow_by_little_more_than_it(
    pool: Ranks, model_path: str, tmp_path: Path, hidden: int, intermediate: int, most: float
) -> None:
    """A rank has three of 36 layers whole in the self-check; beside a small model, what is no tensor counts too."""
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 36, "vocab_size": 256}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "head_dim": 64}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads, tie_word_embeddings=True))
    model.to_empty(device="cpu").init_weights()
    model.save_pretrained(tmp_path)
    size = model.num_parameters() * 4
    grown = pool.loading(make_config(str(tmp_path), ranks=RANKS), after=model_path)
    print(f"\n{size / 2**20:.0f} MiB on {RANKS} ranks: {[round(RANKS * one / size, 2) for one in grown]} of a share")
    assert sum(grown) <= most * size


def test_other_weights_beside_those_of_the_model_are_nobodys(model_path: str, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    averaged = {name: tensor + 1 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(averaged, tmp_path / "model_ema.safetensors")
    part = Part(rank=1, ranks=2)
    for name, parameter in load_part(tmp_path, part).named_parameters():
        rows = part.rows(len(parameter))
        assert torch.equal(parameter[rows], whole.get_parameter(name)[rows])


def test_pickled_weights_are_read_by_parts_too(model_path: str, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    whole.config.save_pretrained(tmp_path)
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    part = Part(rank=1, ranks=2)
    for name, parameter in load_part(tmp_path, part).named_parameters():
        rows = part.rows(len(parameter))
        assert torch.equal(parameter[rows], whole.get_parameter(name)[rows])


def test_what_sharded_ranks_publish_first_is_the_folder(pool: Ranks, tmp_path: Path) -> None:
    write_family("qwen3_moe", tmp_path, vocab_size=128)
    first, _ = two_claims()
    (rank, *_) = pool.train(make_config(str(tmp_path), ranks=3, lr=1e-30), [first])
    assert rank.weights is not None
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert rank.weights.keys() == expected.keys()
    assert all((expected[name].numpy() == found).all() for name, found in rank.weights.items())
