"""Published versions out of checkpoints: for a rollout actor that comes when nobody has them in memory any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pmdflow.errors import WeightsLost
from pmdflow.learner.checkpoint.manifest import Manifest, manifests, newest_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from pmdflow.config.schema import Config
    from pmdflow.weights.file import NamedTensors


class StoredVersions:
    """The versions whose weights a run's checkpoints hold.

    Example:
        >>> stored = StoredVersions(config, run_dir)          # doctest: +SKIP
        >>> WeightsFile.write(stored.tensors(10)).digest       # doctest: +SKIP
        '3f2a...'                                              # that of the file which the learner published
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Look in the run directory when asked."""
        self._config = config
        self._root = run_dir / "checkpoints"

    def newest(self, *, before: int) -> int | None:
        """The newest version before another that a checkpoint holds, of which every byte is summed; None: none does."""
        found = newest_manifest(self._root, before=before)
        return None if found is None else found.version

    def tensors(self, version: int) -> NamedTensors | None:
        """What the learner published as `version`, read tensor by tensor; None if no checkpoint is of it.

        Going through the values raises WeightsLost where the checkpoint is pruned meanwhile.
        """
        held = [manifest for manifest in manifests(self._root) if manifest.version == version]
        return _published(held[-1], self._config) if held else None


def _published(manifest: Manifest, config: Config) -> NamedTensors:
    from torch.distributed.checkpoint.api import CheckpointException
    from transformers import AutoConfig

    from pmdflow.learner.checkpoint.weights import Published
    from pmdflow.learner.fsdp import DTYPES
    from pmdflow.weights.file import NamedTensors, aligned

    def values() -> Iterator[Tensor]:
        for name in names:
            try:
                yield published.read(name).to(wanted[name])
            except (OSError, CheckpointException) as error:
                raise WeightsLost(f"checkpoint {manifest.directory} cannot be read any more: {error}") from error

    tied = bool(AutoConfig.from_pretrained(config.model.path).get_text_config().tie_word_embeddings)
    try:
        published = Published(manifest.directory, lora=config.learner.lora, tied=tied)
    except (OSError, CheckpointException) as error:
        raise WeightsLost(f"checkpoint {manifest.directory} cannot be read any more: {error}") from error
    half = DTYPES[config.model.compute]
    wanted = {name: half if dtype.is_floating_point else dtype for name, (dtype, _) in published.specs.items()}
    names = aligned(wanted)
    specs = {name: (wanted[name], published.specs[name][1]) for name in names}
    return NamedTensors(specs=specs, values=values())
