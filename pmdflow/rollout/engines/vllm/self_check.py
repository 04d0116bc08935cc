"""The vLLM engine's self-check at start: what it generates and continues has the plain model's log-probs.

So it has after a loading of weights or adapters too, which takes another way through vLLM than a start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pmdflow.config.schema import LoraConfig
from pmdflow.learner.agreement import failures_named, plain_scores, probe_tokens, require_agreement
from pmdflow.learner.lora import add_random
from pmdflow.rollout.engine import Request, RolloutEngine

_STEPS = 4
"""Tokens generated after a probe, in two requests: the second finds the first's prefix cached, or computes it."""
_REMEDY = "set rollout.engine to transformers, or choose another model"


def check_served(
    engine: RolloutEngine,
    *,
    model_path: str,
    dtype: Literal["float32", "bfloat16"],
    max_length: int,
    temperature: float,
    lora: LoraConfig | None = None,
) -> None:
    """Refuse a model that vLLM scores otherwise than transformers does, alone or in company, started or loaded anew.

    The plain model is on the CPU meanwhile: for as long, a copy of the weights, as each new version is one.

    Args:
        engine: One that holds nothing and has the weights of the folder.
        model_path: The folder.
        dtype: Type of weights and computation.
        max_length: Positions of the engine.
        temperature: 0 where nothing may be sampled, else 1.
        lora: Of the adapters that it takes; None: it takes whole weights.

    Raises:
        ValueError: names the family and the difference.
    """
    plain: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
    steps = min(_STEPS, max_length - 1)
    probes = [tokens[: max_length - steps] for tokens in probe_tokens(plain)]

    def check(name: str, count: int) -> None:
        whole, got = _generate(engine, probes[:count], steps=steps, temperature=temperature)
        scores = plain_scores(plain, whole)
        expected = torch.cat([score[len(probe) - 1 :] for score, probe in zip(scores, probes, strict=False)])
        require_agreement(got, expected, what=f"the vLLM engine ({name})", model=plain, remedy=_REMEDY)

    def load(weights: Mapping[str, Tensor]) -> None:
        engine.pause()
        engine.load_weights(engine.version, engine.stage(weights), on_new_weights="reprefill")
        engine.resume()

    with failures_named(plain, what="the vLLM engine", remedy=_REMEDY):
        check("alone", 1)
        if engine.num_slots > 1:
            check("in company", 2)
        if lora is None:
            load(plain.state_dict())
            check("loaded anew", 1)
            return
        adapters = add_random(plain, lora)
        load(adapters)
        check("adapted", 1)
        load({name: torch.zeros_like(tensor) for name, tensor in adapters.items()})


def _generate(
    engine: RolloutEngine, probes: list[list[int]], *, steps: int, temperature: float
) -> tuple[list[list[int]], Tensor]:
    """Each probe with what was generated after it, and the log-probs of that, one after another."""
    whole = [list(tokens) for tokens in probes]
    logprobs: list[list[float]] = [[] for _ in probes]
    for id, tokens in enumerate(probes):
        asked = np.array(tokens, np.int32)
        engine.add(Request(id=id, tokens=asked, limit=1, remaining=steps, temperature=temperature))
    held = set(range(len(probes)))
    while held:
        while engine.active():
            for output in engine.step():
                whole[output.id] += output.tokens
                logprobs[output.id] += output.logprobs
                if output.stop is not None:
                    held.remove(output.id)
        for id in held:
            engine.extend(id, steps)
    return whole, torch.tensor([logprob for one in logprobs for logprob in one])
