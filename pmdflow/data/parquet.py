"""Rows of `.parquet` files, held as one Arrow table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 4096
"""Rows that are Python objects at a time."""


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
        from pyarrow import parquet

        self.paths = tuple(paths)
        tables: list[pyarrow.Table] = []
        for path in self.paths:
            try:
                tables.append(parquet.read_table(path, partitioning=None))
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"data.task: cannot read {path}: {error}") from error
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
