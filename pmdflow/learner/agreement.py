"""A self-check at start: a learner and an engine score a few tokens, alone and in company, as the plain model does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pmdflow.learner.policy import Layout, Policy
from pmdflow.weights.probe import TOKENS

LENGTHS = (9, 5)
FLOAT32_NATS = 1e-3
"""Two float32 implementations of a model differ by less, and what sees a wrong token by far more."""


def probe_tokens(model: Any) -> list[list[int]]:
    """Short sequences of tokens that a model has."""
    vocab = model.get_input_embeddings().weight.shape[0]
    return [[(7 * index + 3 * row + 1) % vocab for index in range(length)] for row, length in enumerate(LENGTHS)]


def tokens_of(model: Any) -> list[int]:
    """A sequence for `pmdflow.weights.probe`, of at most `TOKENS` tokens after its first."""
    vocab = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS + 1
    return [(7 * index + 1) % vocab for index in range(min(positions, TOKENS + 1))]


@torch.no_grad()
def plain_scores(
    model: Any, sequences: Sequence[Sequence[int]], logits: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Log-probs of each sequence's tokens after its first, by a forward pass of it alone with its family's attention.

    The model's weights are used in place; its attention function is put back. `logits` is how to call a model that may
    not be called by itself, as it is a part of a sharded one.
    """
    device = model.get_input_embeddings().weight.device
    with _own_attention(model):
        call = logits or (lambda row: model(input_ids=row[None], use_cache=False).logits[0])
        return [scores_of(call(torch.tensor(tokens, device=device))[:-1], tokens) for tokens in sequences]


def scores_of(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-probs of the last tokens of a sequence under as many logits."""
    targets = torch.tensor(tokens[-len(logits) :], device=logits.device)
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@torch.no_grad()
def check_policy(policy: Policy, *, packing: bool, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a model whose log-probs change with what comes later or shares its micro-batch.

    Every rank that shards the policy must call: all is computed before anything is judged.

    Args:
        policy: Sharded, or whole.
        packing: Whether sequences share a row.
        dtype: What it computes in.

    Raises:
        ValueError: names the family and the difference.
    """
    model, sequences = policy.model, probe_tokens(policy.model)
    plain = plain_scores(model, sequences, policy.logits)
    cut = [] if packing else plain_scores(model, [sequences[0][: LENGTHS[1]]], policy.logits)
    companies = {"alone": [0], "in company": [0, 1]}
    found = {
        name: _learner_scores(policy, [sequences[i] for i in them], packing=packing) for name, them in companies.items()
    }
    for short in cut:  # in packed rows nothing sees later tokens
        require_agreement(
            short,
            plain[0][: len(short)],
            what="a sequence that is cut short",
            model=model,
            dtype=dtype,
            remedy="it does not predict the next token: choose a causal language model",
        )
    for name, them in companies.items():
        require_agreement(
            found[name],
            torch.cat([plain[index] for index in them]),
            what=f"the learner ({'packed' if packing else 'padded'} rows, {name})",
            model=model,
            dtype=dtype,
            remedy=remedy(packing=packing),
        )


def _learner_scores(policy: Policy, sequences: Sequence[Sequence[int]], *, packing: bool) -> Tensor:
    device = policy.model.get_input_embeddings().weight.device
    rows = [torch.tensor(tokens, device=device) for tokens in sequences]
    lengths = tuple(map(len, rows))
    tokens = torch.cat(rows)[None] if packing else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = [sum(lengths[:row]) if packing else row * max(lengths) for row in range(len(rows))]
    positions = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)]).to(device)
    targets = torch.cat([row[1:] for row in rows])
    layout = Layout.of(lengths, packed=packing, device=device)
    scores: Tensor = policy(tokens, layout, positions, targets, torch.ones(len(targets), device=device)).logprobs
    return scores


def remedy(*, packing: bool) -> str:
    """What to do where a learner cannot compute a model."""
    return "set learner.packing to false, or choose another model" if packing else "choose another model"


def require_agreement(
    got: Tensor, expected: Tensor, *, what: str, model: Any, remedy: str, dtype: torch.dtype | None = None
) -> None:
    """Refuse log-probs that differ from the plain model's by more than rounding in `dtype`, by default the model's.

    In half precision an expert may be chosen by a rounding, which changes a few tokens much: there the median counts.

    Raises:
        ValueError: names who differs, by how much, the family and the remedy.
    """
    differences, dtype = (got - expected).abs(), dtype or model.dtype
    half, limit = dtype != torch.float32, rounding(expected, model, dtype)
    judged = differences.median() if half else differences.max()
    if not judged <= limit:  # NaN is refused too
        raise ValueError(
            f"{what} and a plain forward pass of a {model.config.model_type} give log-probs that differ by up to "
            f"{float(differences.max()):.2g} nats, {limit:.2g} would be rounding; {remedy}"
        )


def rounding(expected: Tensor, model: Any, dtype: torch.dtype) -> float:
    """Nats that rounding in `dtype` may make of the log-probs `expected`."""
    if dtype == torch.float32:
        return FLOAT32_NATS
    # each layer rounds what it adds twice, by half a unit of a log-prob's size
    layers, size = model.config.get_text_config().num_hidden_layers, float(expected.abs().max())
    return max(FLOAT32_NATS, torch.finfo(dtype).eps * size * math.sqrt(2 * layers))


@contextmanager
def failures_named(model: Any, *, what: str, remedy: str) -> Iterator[None]:
    """Whatever a model's code raises becomes a refusal of its family.

    Raises:
        ValueError: names the family, the error and the remedy.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # the code of a family that knows nothing of ours can fail in any way
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{what} cannot compute a {model.config.model_type} ({reason}); {remedy}") from error


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
