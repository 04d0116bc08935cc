"""A causal language model as the learner sees it: scores of given tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmdflow.learner.attention import Packed
from pmdflow.learner.context import Context
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
        self._plain_head = _has_plain_head(model)

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
        """
        if self.context is not None:
            return self._in_parts(
                self.context, tokens, layout, positions, targets, temperatures, flow=flow, top=top, at=at
            )
        return self._scored(tokens, layout.arguments(), positions, targets, temperatures, flow=flow, top=top, at=at)

    def _in_parts(
        self,
        context: Context,
        tokens: Tensor,
        layout: Layout,
        positions: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        *,
        flow: bool,
        top: int,
        at: Tensor | None,
    ) -> TokenScores:
        """The same from this rank's part of the row, and the parts of the others."""
        assert layout.packed is not None, "only a packed row is shared"
        width, packed = context.width(tokens.shape[1]), layout.packed.shared(context)
        start = context.rank * width
        own = slice(start, start + width)
        mine = (positions >= start) & (positions < start + width)
        row = nn.functional.pad(tokens, (0, context.size * width - tokens.shape[1]))
        arguments = {"position_ids": packed.position_ids[:, own], "packed": packed, "use_cache": False}
        found = self._scored(
            row[:, own],
            arguments,
            positions[mine] - start,
            targets[mine],
            temperatures[mine],
            flow=flow,
            top=top,
            at=None if at is None else at[mine],
        )
        whole: list[Any] = [None if part is None else context.gathered(part, mine) for part in found]
        return TokenScores(*whole)

    def _scored(
        self,
        tokens: Tensor,
        arguments: dict[str, Any],
        positions: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        *,
        flow: bool,
        top: int,
        at: Tensor | None,
    ) -> TokenScores:
        if not self._plain_head:
            logits = self.model(input_ids=tokens, **arguments).logits.flatten(0, 1)[positions]
            return scores_of_logits(logits, targets, temperatures, flow=flow, top=top, at=at)
        hidden = self.model.get_decoder()(input_ids=tokens, **arguments).last_hidden_state.flatten(0, 1)
        head, chosen = self.model.get_output_embeddings(), hidden[positions]
        scores = token_scores(chosen, head.weight, head.bias, targets, temperatures)
        if flow:
            scores = scores._replace(flow=entropy_flow(chosen, head.weight, head.bias, targets, temperatures))
        if top or at is not None:
            ids, own = others(chosen, head.weight, head.bias, temperatures, top=top, at=at)
            scores = scores._replace(top=ids, top_logprobs=own)
        return scores


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the decoder's last hidden state and nothing more."""
    # Distinct tokens, compared bit for bit: a padding token's hidden state may be 0, and a soft cap is nearly linear
    # where logits are small. A false alarm costs memory only.
    tokens = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and torch.equal(head(hidden), model(input_ids=tokens, use_cache=False).logits)
    if not plain:
        logger.info("%s does more to its logits than a linear map: its log-probs are not chunked", type(model).__name__)
    return plain
