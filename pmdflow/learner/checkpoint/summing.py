"""Files of a checkpoint that are summed while they are written: nobody reads them back for that."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from pmdflow.learner.checkpoint.manifest import CheckpointFile


class SummingWriter(FileSystemWriter):
    """Writes what this rank has of a checkpoint, and knows size and checksum of its files when they are whole."""

    def __init__(self, directory: str) -> None:
        """Write to `directory`, which need not exist."""
        super().__init__(directory)
        self.fs = self._files = _SummingFiles()

    def written(self) -> tuple[CheckpointFile, ...]:
        """The files, with their names in the directory; complete when the save is done."""
        root = Path(self.path)
        return tuple(
            CheckpointFile(path=path.relative_to(root).as_posix(), size=size, crc32=crc32)
            for path, (size, crc32) in sorted(self._files.sums.items())
        )


class _SummingFiles(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[Path, tuple[int, int]] = {}
        """Size and checksum of each file that was written."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            summing = _Summing(stream)
            yield summing
            self.sums[Path(path)] = summing.size, summing.crc32

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path)] = self.sums.pop(Path(path))


class _Summing(io.RawIOBase):
    """Passes on what is written in order; whoever wants to go back cannot."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        count: int = self._stream.write(data)
        self.size, self.crc32 = self.size + count, zlib.crc32(data, self.crc32)  # long ones without Python's lock
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self.flush()  # it is asked for to sync what was written
        number: int = self._stream.fileno()
        return number

    def writable(self) -> bool:
        return True
