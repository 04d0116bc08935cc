"""Which experts a Mixture of Experts takes: recorded where tokens are generated, taken again where they are trained.

A router's choice is its `torch.topk` over the experts: that call is listened to, or answered from what was recorded.
The weights of the experts are then those of the present logits at the recorded ids, with gradient.

Source: router replay as in arXiv:2605.08639 (its first half), Rollout Routing Replay arXiv:2510.11370.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EXPERTS = "experts"
"""The column: the number of each expert plus one, of each layer with a router; 0 where nothing is recorded. It is of
the forward pass that gave the logits which the token was drawn from."""
_TOPK = (torch.topk, torch.Tensor.topk)


class Routing:
    """The routers of a model, L of them with k choices each. The forward pass between two calls is the one meant."""

    def __init__(self, model: nn.Module) -> None:
        """Take hold of the routers.

        Raises:
            ValueError: it has none that choose by `torch.topk` over their experts; names the family.
        """
        routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
        self._routers: list[Any] = [router for router in routers if hasattr(router, "top_k")]
        kinds = {(int(router.top_k), len(router.weight)) for router in self._routers}
        if len(kinds) != 1:
            family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise ValueError(
                f"a {family} has {len(self._routers)} routers that are known, of {len(kinds)} kinds: its experts can "
                "be neither recorded nor replayed; set learner.router_replay to false"
            )
        ((self.choices, self.num_experts),) = kinds
        self._taken: list[Tensor | None] = [None] * len(self._routers)
        self._given: Tensor | None = None
        for layer, router in enumerate(self._routers):
            router.forward = self._wrapped(layer, router.forward)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self._routers)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Of the column."""
        return np.uint8 if self.num_experts < 255 else np.uint16

    def taken(self) -> Tensor:
        """What was chosen in the last forward pass, plus one, for each of its N positions [N, L, k]."""
        found = [taken for taken in self._taken if taken is not None]
        if len(found) != self.num_layers:
            raise ValueError(
                f"{len(found)} of {self.num_layers} routers chose by torch.topk over {self.num_experts} experts: this "
                "family's cannot be recorded; set learner.router_replay to false"
            )
        return torch.stack(found, dim=1) + 1

    def give(self, positions: Tensor | None, experts: Tensor | None, *, total: int) -> None:
        """What the next forward passes are to choose, also where they are computed again in the backward pass.

        Args:
            positions: Where, among the `total` positions of the batch [P]; None: nothing is given.
            experts: The column [P, L, k].
            total: N.

        Raises:
            ValueError: the column is of another model.
        """
        if positions is None or experts is None:
            self._given = None
            return
        if experts.shape[1:] != (self.num_layers, self.choices):
            raise ValueError(
                f"the column {EXPERTS!r} has {tuple(experts.shape[1:])} experts a token, the model "
                f"{(self.num_layers, self.choices)}: it was recorded by another one; set learner.router_replay to false"
            )
        given = torch.zeros((total, self.num_layers, self.choices), dtype=torch.int64, device=positions.device)
        given[positions] = experts.long()
        self._given = given

    def _wrapped(self, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def route(*args: Any, **kwargs: Any) -> Any:
            with _Choice(self, layer):
                return forward(*args, **kwargs)

        return route

    def choose(self, layer: int, scores: Tensor, values: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Values and ids [N, k] that a router goes on with, of all `scores` [N, E] and its own choice."""
        given = self._given
        if given is None:
            self._taken[layer] = own.detach()
            return values, own
        recorded = given[:, layer]
        ids = torch.where(recorded > 0, recorded - 1, own)
        return scores.gather(-1, ids), ids


class _Choice(TorchFunctionMode):
    def __init__(self, routing: Routing, layer: int) -> None:
        super().__init__()
        self._routing, self._layer = routing, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func not in _TOPK or args[0].shape[-1] != self._routing.num_experts:
            return answer
        values, ids = answer
        if ids.shape[-1] != self._routing.choices:
            return answer
        return self._routing.choose(self._layer, args[0], values, ids)
