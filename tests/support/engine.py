"""A tiny model, requests to an engine that serves it, and what a plain forward pass says of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pmdflow.rollout.engine import OnNewWeights, Output, Request, RolloutEngine
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from tests.support.numeric import rounding

VOCAB = 384
EOS = 1
LOGPROB_ATOL = 10 * rounding(24 * 256)
"""Largest difference between log-probs of the tiny model by two float32 implementations, on any processor.

They add the same terms in another order: a logit, of size up to 10, comes through some 24 sums of up to 256 terms.
"""
MARGIN = 10 * LOGPROB_ATOL
"""Greedy choices are compared where the best token leads by more: no rounding overturns it."""


def tiny_model(*, seed: int, tied: bool = True) -> PreTrainedModel:
    """A random Qwen3 whose distributions are peaked: log-probs and greedy choices depend on the context."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.08,
    )
    model: PreTrainedModel = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    return model


def make_engine(model_path: str, *, num_slots: int = 8, seed: int = 0) -> TransformersEngine:
    """The transformers engine in this process."""
    return TransformersEngine(
        model_path=model_path, dtype="float32", num_slots=num_slots, threads=1, seed=seed, device="cpu"
    )


def request(id: int, tokens: Any, *, limit: int = 1000, remaining: int = 20, **more: Any) -> Request:
    """A request at temperature 1."""
    return Request(
        id=id, tokens=np.asarray(tokens, np.int32), limit=limit, remaining=remaining, **({"temperature": 1.0} | more)
    )


def prompt(length: int, *, seed: int) -> list[int]:
    """Random tokens without special ones."""
    result: list[int] = np.random.default_rng(seed).integers(2, VOCAB, length).tolist()
    return result


class Record:
    """Collects what an engine gives out, by sequence, with the version under which it was given out."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.versions: dict[int, list[int]] = {}
        self.stops: dict[int, str] = {}

    def take(self, outputs: Sequence[Output], version: int = 0) -> None:
        """Add the outputs of one step."""
        for output in outputs:
            assert output.id not in self.stops, "a stopped sequence generated again"
            assert len(output.tokens) == len(output.logprobs)
            self.tokens.setdefault(output.id, []).extend(output.tokens)
            self.logprobs.setdefault(output.id, []).extend(output.logprobs)
            self.versions.setdefault(output.id, []).extend([version] * len(output.tokens))
            if output.stop is not None:
                self.stops[output.id] = output.stop

    def run(self, engine: RolloutEngine, *, steps: int = 10_000) -> Record:
        """Step until nothing is active."""
        for _ in range(steps):
            if not engine.active():
                break
            self.take(engine.step(), engine.version)
        return self


def swap(engine: RolloutEngine, weights: Mapping[str, torch.Tensor], mode: OnNewWeights) -> list[Output]:
    """Load weights as the next version, as the actor does; returns what the old version had generated."""
    staged = engine.stage(weights)
    outputs = engine.pause()
    engine.load_weights(engine.version + 1, staged, on_new_weights=mode)
    engine.resume()
    return outputs


def full_logprobs(model: Any, prompt: list[int], tokens: list[int], *, temperature: float) -> torch.Tensor:
    """Log-probs of `tokens` after `prompt` by one uncached forward pass."""
    ids = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    scores = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def greedy_reference(model: Any, prompt: list[int], *, tokens: int) -> list[int]:
    """What `generate` of transformers makes of a prompt whose every greedy choice is clear."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    best = torch.stack(output.logits).topk(2).values[:, 0]
    lead = float((best[:, 0] - best[:, 1]).min())
    assert lead > MARGIN, f"the best token leads by {lead:.1e} only: take another prompt"
    result: list[int] = output.sequences[0, len(prompt) :].tolist()
    return result
