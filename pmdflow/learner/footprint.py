"""How much memory a model needs, measured on tensors without memory: from config.json alone, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from pmdflow.config.memory import Footprint
from pmdflow.learner.attention import ATTENTION, Packed
from pmdflow.learner.fsdp import DTYPES, apart
from pmdflow.learner.layers import heads

MEASURE_TIMEOUT_S = 120.0
SHORT, LONG = 256, 512
"""Tokens of two forward passes: what one keeps more than the other is what a token costs."""


def measure_footprint(folder: Path | str, *, dtype: str, packing: bool) -> Footprint:
    """Measure the model of a Hugging Face folder, of which only config.json is read.

    Raises:
        Exception: whatever a family's code raises for its configuration.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    attention = ATTENTION if packing else None
    with FakeTensorMode(), torch.device("cuda"), _capable():  # the kernels of a GPU, of which none is needed
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
        layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in apart(model)]
        whole = sum(parameter.numel() for parameter in model.parameters())
        try:
            longer, shorter = (_kept_bytes(model, tokens, packing=packing) for tokens in (LONG, SHORT))
            activations = (longer - shorter) / (LONG - SHORT)
        except Exception:  # a family may do what needs values
            activations = None
    kv_heads = getattr(text, "num_key_value_heads", None)
    return Footprint(
        num_parameters=whole,
        layer_parameters=max(layers, default=0),
        root_parameters=whole - sum(layers),
        head_parameters=text.vocab_size * text.hidden_size,
        num_layers=len(layers),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        kv_numbers_per_token=sum(2 * (kv_heads or number) * size for number, size in heads(config)),
        activation_bytes=activations,
    )


def measure_apart(folder: Path | str, *, dtype: str, packing: bool) -> Footprint:
    """The same in a process that sees no GPU: tensors without memory would make a CUDA context, which stays.

    Raises:
        ValueError: the model's code failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pmdflow.learner.footprint", str(folder), dtype, str(int(packing))],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=MEASURE_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{folder} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _capable() -> Iterator[None]:
    """Experts ask the GPU whether it has grouped matrix products, which every GPU that trains them has."""
    ask = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = ask


def _kept_bytes(model: Any, tokens: int, *, packing: bool) -> int:
    """What the decoder keeps for its backward pass on one sequence, its own weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no other gets its address
        return tensor

    row = torch.zeros(1, tokens, dtype=torch.int64)
    starts = torch.zeros(2, dtype=torch.int32)
    packed = Packed(lengths=(tokens,), cu_seqlens=starts, position_ids=row)
    arguments = {"position_ids": row, **({"packed": packed} if packing else {})}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(input_ids=row, use_cache=False, **arguments)
    return sum(size for size, _ in kept.values())


if __name__ == "__main__":
    measured = measure_footprint(sys.argv[1], dtype=sys.argv[2], packing=sys.argv[3] == "1")
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")
