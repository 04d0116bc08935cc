"""Weights through Ray's object store: one copy a node, shared memory on each."""

from __future__ import annotations

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError
from torch.utils.dlpack import from_dlpack

from pmdflow.errors import WaitTimeout, WeightsLost
from pmdflow.weights.transport import Weights, WeightsHandle


class ObjectStoreTransport:
    """Puts the weights as NumPy arrays, which Ray hands to readers without a copy."""

    def publish(self, version: int, weights: Weights) -> WeightsHandle:
        """Put all tensors as one object; it lives as long as the handle does."""
        # NumPy has no bfloat16: its bits travel as int16 beside the name of the type.
        arrays = {
            name: (str(tensor.dtype).removeprefix("torch."), tensor.contiguous().view(torch.int16).numpy())
            if tensor.dtype == torch.bfloat16
            else (str(tensor.dtype).removeprefix("torch."), tensor.contiguous().numpy())
            for name, tensor in weights.items()
        }
        return WeightsHandle(version=version, location=ray.put(arrays))

    def fetch(self, handle: WeightsHandle, *, timeout_s: float) -> Weights:
        """Views of the shared memory, which lives as long as they do; never write to them."""
        try:
            arrays = ray.get(handle.location, timeout=timeout_s)
        except GetTimeoutError as error:
            raise WaitTimeout(f"weights of version {handle.version} did not arrive within {timeout_s:g} s") from error
        except ObjectLostError as error:
            raise WeightsLost(f"weights of version {handle.version} died with the learner that made them") from error
        # DLPack carries what is read-only without a copy; `from_numpy` warns of it.
        return {name: from_dlpack(array).view(getattr(torch, dtype)) for name, (dtype, array) in arrays.items()}
