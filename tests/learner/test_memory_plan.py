"""The planned memory of a rank beside what torch's own tracker counts on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from pmdflow.config.memory import CONTEXT_BYTES, Footprint, rank_need
from pmdflow.learner import footprint as footprint_module
from pmdflow.learner import policy as policy_module
from pmdflow.learner.attention import ATTENTION, Packed
from pmdflow.learner.footprint import measure_apart, measure_footprint
from pmdflow.learner.fsdp import apart, shard
from pmdflow.learner.policy import Layout, Policy
from tests.support.footprints import FOOTPRINTS, SHAPES
from tests.support.learner import make_config

TOKENS = 16384
SMALL = Qwen3Config(
    vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
EXPERTS = Qwen3MoeConfig(
    vocab_size=32768, hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, head_dim=128, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=False,
)  # fmt: skip
nightly = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def tracked_peak(model_config: Any, *, ranks: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most bytes that a rank holds over two micro-batches and an optimizer step, twice, after torch's tracker."""
    monkeypatch.setattr(policy_module, "_has_plain_head", lambda model: True)  # it compares values: there are none
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))  # FSDP asks a GPU for its streams
    with FakeTensorMode():
        policy = Policy(AutoModelForCausalLM.from_config(model_config, attn_implementation=ATTENTION).eval())
        layers = apart(policy.model)
        for layer in layers if checkpointing else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        shard(policy, layers, dtype=torch.bfloat16, cpu_offload=False, mesh=mesh)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, foreach=True)
        tracker = FSDPMemTracker(policy, optimizer)
        tracker.track_inputs(())
        row, starts = torch.zeros(1, TOKENS, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
        layout = Layout(packed=Packed(lengths=(TOKENS // 4,) * 4, cu_seqlens=starts, position_ids=row), attention=None)
        with tracker:
            for _ in range(2):
                for _ in range(2):
                    policy(row, layout, row[0], row[0], torch.ones(TOKENS)).logprobs.sum().backward()
                    tracker.reset_mod_stats()  # its peak stays
                optimizer.step()
                optimizer.zero_grad()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return int(peak["Total"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("model", "ranks"),
    [
        pytest.param(SMALL, 4, id="small"),
        pytest.param(EXPERTS, 4, id="experts"),
        pytest.param(SHAPES["Qwen/Qwen3-8B"], 8, id="8B", marks=nightly),
        pytest.param(SHAPES["Qwen/Qwen3-32B"], 16, id="32B", marks=nightly),
    ],
)
def test_a_rank_holds_what_was_planned(
    model: Any, ranks: int, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    footprint = measure_footprint(tmp_path, dtype="bfloat16", packing=True)
    given = make_config(
        str(tmp_path), ranks=ranks, tokens_per_microbatch=TOKENS, activation_checkpointing=checkpointing
    )
    config = given.model_copy(update={"model": given.model.model_copy(update={"dtype": "bfloat16"})})
    need = rank_need(config, footprint, on_gpu=True)
    planned = need.total - CONTEXT_BYTES
    peak = tracked_peak(model, ranks=ranks, checkpointing=checkpointing, monkeypatch=monkeypatch)
    print(f"planned {planned / 2**30:.2f} GiB, tracked {peak / 2**30:.2f} GiB: {planned / peak:.3f}", need.parts)
    assert planned == pytest.approx(peak, rel=0.15)


def test_a_process_of_its_own_measures_the_same(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    arguments = {"dtype": "bfloat16", "packing": True}
    assert measure_apart(tmp_path, **arguments) == measure_footprint(tmp_path, **arguments)
    with pytest.raises(ValueError, match="could not be measured"):
        measure_apart(tmp_path / "nothing", **arguments)


def test_what_cannot_be_measured_is_said_to_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SMALL.save_pretrained(tmp_path)

    def fails(*given: Any, **more: Any) -> int:
        raise RuntimeError("it needs values")

    monkeypatch.setattr(footprint_module, "_kept_bytes", fails)
    footprint = measure_footprint(tmp_path, dtype="bfloat16", packing=True)
    assert footprint.activation_bytes is None
    assert rank_need(make_config(str(tmp_path)), footprint, on_gpu=True).unknown == ("activations",)


def test_experts_are_measured_by_those_that_a_token_has(tmp_path: Path) -> None:
    def measured(**sizes: int) -> Footprint:
        small = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1024, "moe_intermediate_size": 512}
        Qwen3MoeConfig(num_hidden_layers=2, **small, **sizes).save_pretrained(tmp_path)
        return measure_footprint(tmp_path, dtype="bfloat16", packing=True)

    few, many = (measured(num_experts=number, num_experts_per_tok=2) for number in (8, 32))
    assert few.activation_bytes is not None and many.num_parameters > 2 * few.num_parameters
    assert many.activation_bytes == pytest.approx(few.activation_bytes, rel=0.1)
    more = measured(num_experts=8, num_experts_per_tok=4)
    assert more.activation_bytes > 1.3 * few.activation_bytes


def test_a_frozen_teacher_is_in_the_plan_of_a_rank(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    model = measure_footprint(tmp_path, dtype="bfloat16", packing=True)
    config = make_config(str(tmp_path), algorithm="opd", teacher=str(tmp_path), ranks=4)
    assert rank_need(config, model, on_gpu=True).unknown == ("teacher",)
    taught = rank_need(config, replace(model, teacher=model), on_gpu=True)
    assert taught.unknown == ()
    assert taught.parts["teacher"] == taught.parts["master weights"] == model.num_parameters
    giant = replace(model, num_parameters=10**10, root_parameters=10**9, layer_parameters=10**9)
    assert rank_need(config, replace(model, teacher=giant), on_gpu=True).parts["gathered weights"] > 5e9


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-0.5B-Instruct", *(pytest.param(name, marks=nightly) for name in SHAPES)]
)
def test_the_models_of_the_recipes_are_as_large_as_their_tests_say(name: str, tmp_path: Path) -> None:
    SHAPES[name].save_pretrained(tmp_path)
    assert measure_footprint(tmp_path, dtype="bfloat16", packing=True) == FOOTPRINTS[name]
