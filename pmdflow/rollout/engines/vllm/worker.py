"""What runs inside vLLM's worker processes: new weights from shared memory, ending with the actor, telling failures.

vLLM imports this module in each worker (`worker_extension_cls`) before the model is loaded, which registers the
transfer engine in time.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from pmdflow.rollout.engines.vllm.adapters import begin_adapters, replace_adapters
from pmdflow.rollout.engines.vllm.failures import tell_failures

BACKEND = "pmdflow-file"
"""Name of the transfer engine in vLLM's factory."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where one version's weights are."""

    path: str
    """A safetensors file that this process can map, by the names of the Hugging Face checkpoint."""


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a safetensors file, mapped into memory, as vLLM loads a checkpoint: fused, sharded and packed anew."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Expect a checkpoint; layers are processed as soon as they are complete."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, str]) -> None:
        """Load the file; unlike the base class, without an accelerator to wait for when there is none."""
        if self.device.type == "cpu":
            self.receive_weights(self.parse_update_info(update_info))
        else:
            super().update_weights(update_info)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load every tensor of the file.

        Raises:
            ValueError: the file leaves a parameter of the model as it was.
        """
        parameters = {name for name, _ in self.model.named_parameters()}
        if getattr(self.model_config.hf_config, "tie_word_embeddings", False):
            parameters.discard("lm_head.weight")
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            loaded = self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        if loaded is not None and not loaded >= parameters:
            raise ValueError(f"the published weights lack {sorted(parameters - loaded)}; publish the whole state dict")

    def finish_weight_update(self) -> None:
        """Process what is left.

        Raises:
            ValueError: vLLM's code of this family has passed by a parameter, which would stay that of an older version.
        """
        if kept := self._kept():
            raise ValueError(f"vLLM takes no new weights for {len(kept)} of its parameters, {kept[0]} among them")
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # A head tied to the embedding is not in the file; vLLM 0.32 would keep its packed copy of the old weights.
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing is held."""

    def _kept(self) -> list[str]:
        """Parameters that stand in a layer which waits for more, and were not loaded themselves."""
        kept = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer) or self._is_tied(layer):
                continue  # it is loaded whole; has only scales of quantized caches; is the embedding
            loaded = {own for own, _ in info.loaded_weights}
            kept += [f"{name}.{own}" for own in dict(layer.named_parameters(recurse=False)) if own not in loaded]
        return kept

    def _is_tied(self, layer: object) -> bool:
        tied: bool = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        return tied and isinstance(layer, ParallelLMHead)


class WorkerExtension:
    """Mixed into vLLM's worker; its methods are called by `collective_rpc`."""

    model_runner: Any

    def begin_adapters(self) -> None:
        """See `begin_adapters`."""
        begin_adapters(self.model_runner.lora_manager)

    def replace_adapters(self, path: str) -> None:
        """See `replace_adapters`."""
        replace_adapters(self.model_runner.lora_manager, path)

    def end_with(self, pid: int) -> int:
        """End this process when process `pid` ends, however it does: a killed actor cannot shut its engine down.

        Returns:
            The id of this process.
        """
        owner = os.pidfd_open(pid)

        def watch() -> None:
            select.select([owner], [], [])
            os._exit(1)

        threading.Thread(target=watch, name="end-with-actor", daemon=True).start()
        return os.getpid()


def _pack_experts_again() -> None:
    """Let experts be packed for the CPU's kernel at each loading.

    vLLM 0.32 packs them at the first alone, and its kernel would read those of a later version as if they were packed.
    """
    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def set_up_and_pack(method: Any, layer: Any, *weights: Any, **named: Any) -> None:
        is_loaded_again = method.moe_kernel is not None
        set_up(method, layer, *weights, **named)
        if is_loaded_again:
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up_and_pack


WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
tell_failures()
if current_platform.is_cpu():
    _pack_experts_again()
# It warns at each update of layers without weights in the file: what must be there is checked above.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
