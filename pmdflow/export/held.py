"""A committed checkpoint, read tensor by tensor, also beside the run that goes on and prunes it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader

from pmdflow.errors import PmdflowError
from pmdflow.learner.checkpoint.manifest import Manifest, checksum, manifest_at, manifests
from pmdflow.learner.checkpoint.weights import policy_entries, read_policy

_LOOKS = 10
"""Looks at a directory whose checkpoints are pruned between the look and the opening of their files."""
_PAUSE_S = 0.05


class HeldCheckpoint:
    """The policy in a checkpoint of any number of ranks. Its files are open: pruning does not take them away.

    Example:
        >>> with HeldCheckpoint.of(Path("runs/quickstart")) as checkpoint:         # doctest: +SKIP
        ...     embedding = checkpoint.read(["model.embed_tokens.weight"])
    """

    def __init__(self, manifest: Manifest) -> None:
        """Open every file of `manifest` and read it once, to sum it.

        Raises:
            OSError: a file cannot be read, or was pruned meanwhile.
            PmdflowError: a file does not hold what the manifest says.
        """
        self.manifest = manifest
        with ExitStack() as opening:
            files = {
                file.path: opening.enter_context(open(manifest.directory / file.path, "rb")) for file in manifest.files
            }
            for file in manifest.files:  # when all are held: summing takes long
                path, size = manifest.directory / file.path, os.fstat(files[file.path].fileno()).st_size
                if size != file.size:
                    raise PmdflowError(f"{path} has {size} bytes, its manifest says {file.size}")
                if checksum(files[file.path]) != file.crc32:
                    raise PmdflowError(f"{path} has other bytes than were written (its manifest has their checksum)")
            self._open = opening.pop_all()
        self._reader = FileSystemReader(manifest.directory)
        self._reader.fs = _OpenFiles(files)
        self._entries = policy_entries(self._reader)

    @classmethod
    def of(cls, run: Path, iteration: int | None = None) -> HeldCheckpoint:
        """Hold the checkpoint of `iteration`, or the newest one that is whole.

        Raises:
            PmdflowError: the run has no such checkpoint, and the message lists those that it keeps; or it is damaged.
        """
        root = run / "checkpoints"
        for _ in range(_LOOKS):
            known = [manifest for manifest in manifests(root) if iteration in (None, manifest.iteration)]
            if iteration is not None and not known:
                known = [manifest_at(root, iteration)]  # says which there are
            problems: list[str] = []
            for manifest in reversed(known):
                try:
                    return cls(manifest)
                except (OSError, PmdflowError) as error:
                    problems.append(str(error))
                if manifest not in manifests(root):
                    break  # pruned, or written again
            else:
                if known:
                    raise _damaged(run, known, problems[0])
            time.sleep(_PAUSE_S)
        raise PmdflowError(f"{run} has no checkpoint yet", hint="wait for one (learner.checkpoint_every)")

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every tensor, by its name in the language model (of an adapter: in peft's)."""
        return {name: entry.size for name, entry in self._entries.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors on the CPU, in the type that they were written in."""
        return read_policy(self._reader, self._entries, names)

    def __enter__(self) -> Self:
        """Its files are open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the files."""
        self._open.close()


def _damaged(run: Path, checkpoints: Sequence[Manifest], problem: str) -> PmdflowError:
    numbers = ", ".join(str(manifest.iteration) for manifest in checkpoints)
    if len(checkpoints) > 1:
        what = f"none of its checkpoints (iterations {numbers}) is whole"
    else:
        what = f"its checkpoint of iteration {numbers} is damaged"
    return PmdflowError(f"{run}: {what}: {problem}", hint="bring the files back from a copy, or take another iteration")


class _OpenFiles(FileSystem):
    """Reads files that are open already, whatever has become of their names."""

    def __init__(self, files: Mapping[str, BinaryIO]) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        file = self._files[Path(path).name]
        file.seek(0)
        yield cast(io.IOBase, file)
