"""A checkpoint of a run as a transformers model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from pmdflow.export.held import HeldCheckpoint
from pmdflow.export.options import Dtype
from pmdflow.export.weights import published_adapters, require_same
from pmdflow.export.write import DTYPES, run_config
from pmdflow.learner.lora import published_scale
from pmdflow.weights.lora import merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def load_model(run: Path, iteration: int, dtype: Dtype | None) -> PreTrainedModel:
    """The run's model with the weights of a checkpoint; adapters, which its engines have beside them, are added.

    Args:
        run: Run directory.
        iteration: That of the checkpoint.
        dtype: Type of the weights; None is the one that the run generated with.

    Raises:
        PmdflowError: no such checkpoint, or of another model than the model folder, or this has changed since.
    """
    config = run_config(run)
    lora = config.learner.lora
    with HeldCheckpoint.of(run, iteration) as held:
        model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=DTYPES[dtype or config.model.compute])
        state = model.state_dict(keep_vars=True)
        if lora is None:
            require_same({name: parameter.shape for name, parameter in model.named_parameters()}, held)
            for name in state.keys() & held.shapes.keys():
                state[name].copy_(held.read([name])[name])
        else:
            adapters = held.read(published_adapters(held).values())
            scaled = {
                name: adapters[own] * published_scale(name, lora) for name, own in published_adapters(held).items()
            }
            for name, tensor in merged(scaled, state).items():
                state[name].copy_(tensor)
    loaded: PreTrainedModel = model.eval()
    return loaded
