"""Rows of `.parquet` files, held as one Arrow table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 4096
"""Rows that are Python objects at a time."""
CHUNK = 1 << 16
"""Rows that are decoded at a time, and lie together in memory."""


class ParquetRows:
    """Rows of one or several `.parquet` files of one schema. See `Rows`.

    They are decoded once: a row in the middle of a parquet file costs its whole row group, and training asks for one
    row at a time in no order.

    Example:
        >>> rows = ParquetRows([Path("train-00000-of-00001.parquet")])
        >>> len(rows), rows[0], rows.where(0)
        (7473, {'question': 'Natalia sold ...', 'answer': '... #### 72'}, 'train-00000-of-00001.parquet:1')
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Decode the files.

        Raises:
            ValueError: a file cannot be read, or is of another schema than the first.
        """
        import pyarrow

        self.paths = tuple(paths)
        tables: list[pyarrow.Table] = []
        for path in self.paths:
            try:
                tables.append(_read(path))
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"data.task: cannot read {path}: {error}") from error
        pyarrow.default_memory_pool().release_unused()  # what decoding took beside the tables
        try:
            self._table: Any = pyarrow.concat_tables(tables, promote_options="permissive")
        except pyarrow.ArrowException as error:
            names = ", ".join(map(str, self.paths))
            raise ValueError(f"data.task: {names} do not have the same columns: {error}") from error
        self._counts = [table.num_rows for table in tables]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()

    def where(self, index: int) -> str:
        """`file:row`."""
        for path, rows in zip(self.paths, self._counts, strict=True):
            if index < rows:
                return f"{path}:{index + 1}"
            index -= rows
        raise IndexError(index)

    def number(self, index: int) -> int:
        """The row among all."""
        return index + 1


def _read(path: Path) -> Any:
    """Decode a file piece by piece: a whole column chunk at a time takes as much again."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        batches = file.iter_batches(batch_size=CHUNK, use_threads=False)
        return pyarrow.Table.from_batches(list(batches), file.schema_arrow)
