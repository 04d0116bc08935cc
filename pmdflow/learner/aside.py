"""Tensors put aside on the host, so that another process can use the memory of their device."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Aside:
    """Tensors whose bytes are on the host and whose own memory is released; every name and view of them stays.

    The host memory, pinned for an accelerator, is used again each time.

    Example:
        >>> aside, weight = Aside(), torch.ones(4)
        >>> aside.put([weight])
        >>> weight.untyped_storage().nbytes()
        0
        >>> aside.take_back()
        >>> weight
        tensor([1., 1., 1., 1.])
    """

    def __init__(self) -> None:
        """Nothing is aside."""
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        """The bytes of each storage, on its device and on the host."""

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Copy the whole storage of each tensor to the host and release it; what is aside already stays there."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # other streams may still read them
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if not local.untyped_storage().resizable():
                tensor.data = tensor.detach().clone()  # it lies in the mapping of a file
                local = tensor
            storage = local.detach().untyped_storage()
            if storage._cdata in found:
                continue
            size, earlier = storage.nbytes(), self._copies.get(storage._cdata)
            if size == 0:
                if earlier is not None:
                    found[storage._cdata] = earlier
                continue
            own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            host = earlier[1] if earlier is not None and len(earlier[1]) == size else None
            if host is None:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=own.is_cuda)
            host.copy_(own)
            found[storage._cdata] = (own, host)
            storage.resize_(0)
        self._copies = found
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def take_back(self) -> None:
        """Give every tensor its memory and its bytes again; those that have them are left alone."""
        for own, host in self._copies.values():
            storage = own.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(len(host))
                own.copy_(host)
