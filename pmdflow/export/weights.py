"""The tensors of an exported folder, one after another: whole, with adapters merged, or the adapters alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pmdflow.config.schema import LoraConfig
from pmdflow.errors import PmdflowError
from pmdflow.export.held import HeldCheckpoint
from pmdflow.export.layout import Layout
from pmdflow.learner.lora import published_name, published_scale
from pmdflow.weights.lora import DOWN, UP, merged

INDEX = "model.safetensors.index.json"
"""Says which of a folder's files holds which tensor."""

Named = tuple[str, Tensor]


def whole_tensors(layout: Layout, checkpoint: HeldCheckpoint) -> Iterator[Named]:
    """Every tensor that the folder holds, from the checkpoint.

    Raises:
        PmdflowError: the checkpoint is of another model than the folder.
    """
    require_same(layout.shapes, checkpoint)
    for name in layout.pieces:
        yield from layout.store(name, checkpoint.read([name])[name]).items()


def merged_tensors(layout: Layout, checkpoint: HeldCheckpoint, base: BaseWeights, lora: LoraConfig) -> Iterator[Named]:
    """Every tensor that the folder holds, from the model folder that was adapted, with the adapters added.

    They are added in float32 to weights of the exported type; the engines of the run have them beside these.

    Raises:
        PmdflowError: an adapted tensor is stored in pieces, or the adapters are of another model.
    """
    adapters = published_adapters(checkpoint)
    layers = {name.removesuffix(UP) for name in adapters if name.endswith(UP)}
    _require_layers(layers, adapters, layout, checkpoint)
    for source, pieces in layout.pieces.items():
        layer = source.removesuffix(".weight")
        for name, place in pieces.items():
            tensor = base.read(name).to(place.dtype)
            if layer in layers:
                own = {key: adapters[key] for key in (layer + UP, layer + DOWN)}
                update = checkpoint.read(own.values())
                scaled = {key: update[held] * published_scale(key, lora) for key, held in own.items()}
                tensor = merged(scaled, {f"{layer}.weight": tensor})[f"{layer}.weight"]
            yield name, tensor


def adapter_tensors(checkpoint: HeldCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapters by the names of a PEFT folder."""
    adapters = published_adapters(checkpoint)
    held = checkpoint.read(adapters.values())
    return {f"base_model.model.{name}": held[own].to(dtype) for name, own in adapters.items()}


def published_adapters(checkpoint: HeldCheckpoint) -> dict[str, str]:
    """Names in the checkpoint of its adapters' matrices, by the names that these are published under."""
    return {published: name for name in checkpoint.shapes if (published := published_name(name)) is not None}


class BaseWeights:
    """The tensors of a model folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds which tensor.

        Raises:
            PmdflowError: the folder has no safetensors files.
        """
        self._folder = folder
        self._files: dict[str, Path] = {}
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            self._files = {name: folder / file for name, file in weight_map.items()}
            return
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        if not self._files:
            raise PmdflowError(f"{folder} has no .safetensors files to add adapters to", hint="download them to it")

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            PmdflowError: the folder has none of that name.
        """
        if name not in self._files:
            raise PmdflowError(
                f"{self._folder} holds no tensor {name}: its tensors have other names than transformers writes",
                hint="load it with transformers and save it again, or export with --adapter",
            )
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def require_same(shapes: Mapping[str, torch.Size], checkpoint: HeldCheckpoint) -> None:
    """Refuse a checkpoint that lacks one of the model's tensors, or has it in another shape.

    Raises:
        PmdflowError: names them.
    """
    held = checkpoint.shapes
    wrong = sorted(name for name, shape in shapes.items() if held.get(name) != shape)
    if wrong:
        raise PmdflowError(
            f"{checkpoint.manifest.directory} does not hold the tensors of the model folder: {_few(wrong)} missing or "
            "of another shape",
            hint="model.path must be the folder that the run began with",
        )


def _require_layers(
    layers: Iterable[str], adapters: Mapping[str, str], layout: Layout, checkpoint: HeldCheckpoint
) -> None:
    def fits(layer: str) -> bool:
        update = (checkpoint.shapes[adapters[layer + UP]][0], checkpoint.shapes[adapters[layer + DOWN]][1])
        name = f"{layer}.weight"
        return layout.shapes.get(name) == update and len(layout.pieces[name]) == 1

    wrong = sorted(layer for layer in layers if not fits(layer))
    if wrong:
        raise PmdflowError(
            f"adapters of {_few(wrong)} cannot be merged: the model folder has no such tensor, has it in another "
            "shape, or in pieces",
            hint="model.path must be the folder that the run began with; --adapter needs no merge",
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
