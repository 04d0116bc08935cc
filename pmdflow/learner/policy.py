"""A causal language model as the learner sees it: scores of given tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmdflow.learner.attention import Packed
from pmdflow.learner.context import Context
from pmdflow.learner.routing import Routing
from pmdflow.learner.token_scores import TokenScores, entropy_flow, others, scores_of_logits, token_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the sequences of a micro-batch lie in its tokens; exactly one of the two is set."""

    packed: Packed | None
    """All in one row."""
    attention: Tensor | None
    """Each right-padded in a row of its own: bool [B, W], False at padding."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], *, packed: bool, device: torch.device) -> Layout:
        """The layout of sequences of `lengths` tokens."""
        if packed:
            return cls(packed=Packed.of(lengths, device), attention=None)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return cls(packed=None, attention=mask.to(device))

    def arguments(self) -> dict[str, Any]:
        """What a transformers model takes to attend by this layout."""
        if self.packed is None:
            return {"attention_mask": self.attention, "use_cache": False}
        return {"position_ids": self.packed.position_ids, "packed": self.packed, "use_cache": False}


class _Wanted(NamedTuple):
    """What is asked of the tokens of a micro-batch: arguments of `Policy`, one entry a position."""

    positions: Tensor
    targets: Tensor
    temperatures: Tensor
    at: Tensor | None
    alternatives: Tensor | None
    experts: Tensor | None


class Policy(nn.Module):
    """Log-probs and entropies of given tokens under a causal language model.

    All logits are never held at a time, except for a model that does more to its logits than a linear map: that one
    is called whole.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.context: Context | None = None
        """The ranks that compute a part of each row; they make the same calls."""
        self.routing: Routing | None = None
        """Of a Mixture of Experts whose experts are replayed."""
        self._plain_head = _has_plain_head(model)

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of one sequence [W] by a plain forward pass of the model [W, V], which takes memory for all."""
        logits: Tensor = self.model(input_ids=tokens[None], use_cache=False).logits
        return logits[0]

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        positions: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        *,
        flow: bool = False,
        top: int = 0,
        at: Tensor | None = None,
        alternatives: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> TokenScores:
        """Score `targets` [P] under softmax(logits / temperature).

        Args:
            tokens: [1, W] or [B, W], as `layout` says.
            layout: Where the sequences are.
            positions: Indices into the flattened tokens whose logits predict the targets [P].
            targets: Token ids [P].
            temperatures: [P]
            flow: Whether the entropy flow is wanted, too.
            top: How many of the likeliest tokens are.
            at: Ids of other tokens that are, instead [P, K].
            alternatives: Ids of other tokens whose log-probs are wanted with gradient [P, K].
            experts: Those that its routers take at `positions`, as `routing` has them [P, L, k].
        """
        wanted = _Wanted(positions, targets, temperatures, at, alternatives, experts)
        if self.context is not None:
            return self._in_parts(self.context, tokens, layout, wanted, flow=flow, top=top)
        return self._scored(tokens, layout.arguments(), wanted, flow=flow, top=top)

    def _in_parts(
        self, context: Context, tokens: Tensor, layout: Layout, wanted: _Wanted, *, flow: bool, top: int
    ) -> TokenScores:
        """The same from this rank's part of the row, and the parts of the others."""
        assert layout.packed is not None, "only a packed row is shared"
        width, packed = context.width(tokens.shape[1]), layout.packed.shared(context)
        start = context.rank * width
        own = slice(start, start + width)
        mine = (wanted.positions >= start) & (wanted.positions < start + width)
        row = nn.functional.pad(tokens, (0, context.size * width - tokens.shape[1]))
        arguments = {"position_ids": packed.position_ids[:, own], "packed": packed, "use_cache": False}
        parts: list[Any] = [None if of is None else of[mine] for of in wanted]
        part = _Wanted(*parts)._replace(positions=parts[0] - start)
        found = self._scored(row[:, own], arguments, part, flow=flow, top=top)
        whole: list[Any] = [None if of is None else context.gathered(of, mine) for of in found]
        return TokenScores(*whole)

    def _scored(
        self, tokens: Tensor, arguments: dict[str, Any], wanted: _Wanted, *, flow: bool, top: int
    ) -> TokenScores:
        positions, targets, temperatures, at, alternatives, experts = wanted
        if self.routing is not None:
            self.routing.give(None if experts is None else positions, experts, total=tokens.numel())
        if not self._plain_head:
            logits = self.model(input_ids=tokens, **arguments).logits.flatten(0, 1)[positions]
            return scores_of_logits(logits, targets, temperatures, flow=flow, top=top, at=at, alternatives=alternatives)
        hidden = self.model.get_decoder()(input_ids=tokens, **arguments).last_hidden_state.flatten(0, 1)
        head, chosen = self.model.get_output_embeddings(), hidden[positions]
        scores = token_scores(chosen, head.weight, head.bias, targets, temperatures, alternatives)
        if flow:
            scores = scores._replace(flow=entropy_flow(chosen, head.weight, head.bias, targets, temperatures))
        if top or at is not None:
            ids, own = others(chosen, head.weight, head.bias, temperatures, top=top, at=at)
            scores = scores._replace(top=ids, top_logprobs=own)
        return scores


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the decoder's last hidden state and nothing more.

    Hidden states are given in place of the decoder's and a few random rows in place of the head's, so that no weight of
    the model is looked at: none need be there yet. Logits are large, or a soft cap would be nearly linear.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    plain = False
    if type(head) is nn.Linear and decoder is not None:
        random = torch.Generator().manual_seed(0)
        hidden = 30 * torch.randn(1, 4, head.in_features, generator=random)
        rows = torch.randn(8, head.in_features, generator=random)
        expected = hidden @ rows.T
        given = {head: lambda states: states @ rows.T, decoder: lambda *_, **__: _Given(hidden)}
        try:
            for module, forward in given.items():
                module.forward = forward
            found = model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False).logits
            plain = torch.equal(found, expected)
        except Exception:  # the code of a family may want anything of its decoder; then its head is its own
            plain = False
        finally:
            for module in given:
                del module.forward
    if not plain:
        logger.info("%s does more to its logits than a linear map: its log-probs are not chunked", type(model).__name__)
    return plain


class _Given:
    """A decoder's output that has hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]
