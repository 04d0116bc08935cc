"""Extra columns: what a user keeps beside tokens and log-probs, a value a token or one a trajectory, of any shape.

In the log a column is bytes and the text of its dtype, before which stands the shape of a value, `(2,)<i2`, and before
that `trajectory ` where the value is the whole trajectory's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmdflow._rust_buffer import Conflict

Column = npt.NDArray[Any]
Columns = Mapping[str, npt.ArrayLike]
"""What is given, by name."""

_NAME = re.compile(r"(?!zarr\.json$)\w[\w.-]*")
"""It is a directory of the archive, beside `zarr.json`."""
_LONGEST_NAME = 200
"""Bytes; file systems take 255."""
_WHOLE = "trajectory "


@dataclass(frozen=True, slots=True)
class Extras:
    """The extra columns of one trajectory."""

    per_token: Mapping[str, list[tuple[int, int, Column]]]
    """By name: offset and number of tokens, and their values."""
    whole: Mapping[str, Column]
    """Values of the trajectory by name."""

    @classmethod
    def of(cls, stored: Mapping[str, Iterable[tuple[int, int, str, bytes]]]) -> Extras:
        """Those that the native store gives: (offset, length, dtype, bytes) by name."""
        per_token: dict[str, list[tuple[int, int, Column]]] = {}
        whole: dict[str, Column] = {}
        for name, pieces in stored.items():
            for offset, length, dtype, data in pieces:
                if dtype.startswith(_WHOLE):
                    whole[name] = np.frombuffer(data, np.dtype(dtype.removeprefix(_WHOLE)))[0]
                else:
                    per_token.setdefault(name, []).append((offset, length, np.frombuffer(data, np.dtype(dtype))))
        return cls(per_token, whole)


def encoded(name: str, values: npt.ArrayLike, *, tokens: int | None, of: str) -> tuple[str, Column]:
    """The dtype text of a column, and its values.

    Args:
        name: Of the column.
        values: One for each token, along the first axis; or the value of the trajectory.
        tokens: How many; None: it is of the trajectory.
        of: Says whose it is.

    Raises:
        ValueError: the name is none, the values are no numbers, or not one for each token.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{of}: a column cannot have the name {name!r}; use letters, digits, '_', '.' and '-', at most "
            f"{_LONGEST_NAME} bytes, and not 'zarr.json'"
        )
    array = np.ascontiguousarray(values).reshape(np.shape(values))
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or array.size == 0:
        raise ValueError(
            f"{of}: column {name!r} is {array.size} values of type {array.dtype}; give numbers of 1 to 8 bytes"
        )
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if tokens is None:
        return f"{_WHOLE}{_shaped(array.shape, array.dtype)}", array
    if array.ndim == 0 or len(array) != tokens:
        raise ValueError(f"{of}: column {name!r} has shape {array.shape} for {tokens} tokens; give one value for each")
    return _shaped(array.shape[1:], array.dtype), array


def _shaped(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{shape}{dtype.str}" if shape else dtype.str


def per_token(extras: Sequence[Extras], starts: npt.NDArray[np.int64], total: int) -> dict[str, Column]:
    """The columns of tokens, each [`total`, ...]; `starts` says where the tokens after each prompt begin.

    A token without a value has NaN, or 0 where the values are whole numbers.

    Raises:
        Conflict: values of one name have different shapes, or types that only a float could hold together.
    """
    pieces: dict[str, list[tuple[int, Column]]] = {}
    for start, own in zip(starts.tolist(), extras, strict=True):
        for name, parts in own.per_token.items():
            for offset, length, values in parts:
                # What was stored before shapes were is flat.
                shaped = values if len(values) == length else values.reshape(length, -1)
                pieces.setdefault(name, []).append((start + offset, shaped))
    columns = {}
    for name, placed in pieces.items():
        column = _empty(name, total, [(values.dtype, values.shape[1:]) for _, values in placed])
        for start, values in placed:
            column[start : start + len(values)] = values
        columns[name] = column
    return columns


def whole(extras: Sequence[Extras]) -> dict[str, Column]:
    """The columns of trajectories, each [N, ...]; one without a value has NaN, or 0 where values are whole numbers.

    Raises:
        Conflict: see `per_token`.
    """
    columns = {}
    for name in sorted({name for own in extras for name in own.whole}):
        given = {index: own.whole[name] for index, own in enumerate(extras) if name in own.whole}
        column = _empty(name, len(extras), [(value.dtype, value.shape) for value in given.values()])
        for index, value in given.items():
            column[index] = value
        columns[name] = column
    return columns


def _empty(name: str, count: int, kinds: Iterable[tuple[np.dtype[Any], tuple[int, ...]]]) -> Column:
    dtypes, shapes = zip(*kinds, strict=True)
    if len(set(shapes)) > 1:
        raise Conflict(
            f"the extra column {name!r} has values of shapes {sorted(set(shapes))} in one claim; give all one shape"
        )
    dtype = np.result_type(*dtypes)
    if dtype.kind == "f" and any(given.kind in "iu" for given in dtypes):
        types = sorted({given.name for given in dtypes})
        raise Conflict(f"the extra column {name!r} has values of types {types} in one claim; give all one type")
    column = np.zeros((count, *shapes[0]), dtype)
    if dtype.kind == "f":
        column[...] = np.nan
    return column
