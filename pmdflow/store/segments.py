"""The form in which segments travel to the store; `rust_buffer/src/wire.rs` is its other side."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any

import msgpack
import numpy as np

from pmdflow.store.columns import Column, Columns, encoded
from pmdflow.store.tokens import TOKEN, token_ids
from pmdflow.types import Int32, Segment

_WIRE = struct.Struct("<4sHHII")
"""Magic, version, 0, length of the header, 0; `rust_buffer/src/wire.rs` describes the whole."""
_place = attrgetter("trajectory", "epoch", "offset")
_end = attrgetter("next_version", "stop", "observed")
_LOGPROB = np.dtype("<f4")


def encode_segments(
    segments: Sequence[Segment],
    *,
    extra: Sequence[Columns] | None = None,
    trajectory_extra: Sequence[Columns] | None = None,
) -> bytes:
    """Encode segments as the batch that `TrajectoryStore.append` takes.

    Args:
        segments: In the order in which they are to be appended.
        extra: Named columns of each segment, a value of any shape for each of its tokens (for example expert ids); they
            are stored with it and in every claim and archive part.
        trajectory_extra: Named values of the trajectory of each segment, likewise; a segment with tokens brings them.

    Raises:
        ValueError: `extra` or `trajectory_extra` has another length than `segments`, log-probs another shape than
            tokens, a column a value too few or too many, or a token id is no int32.
    """
    count = len(segments)
    columns: Iterable[Columns] = extra if extra is not None else repeat({}, count)
    values: Iterable[Columns] = trajectory_extra if trajectory_extra is not None else repeat({}, count)
    rows: list[tuple[Any, ...]] = []
    arrays: list[Any] = []
    for segment, named, whole in zip(segments, columns, values, strict=True):
        tokens = _ids(segment)
        length = len(tokens)
        others = _others(segment, named, whole, length) if named or whole or segment.columns else ()
        described = [(name, dtype, array.nbytes) for name, dtype, array in others]
        rows.append((*_place(segment), length, segment.version, float(segment.temperature), *_end(segment), described))
        if length == 0:
            continue
        arrays.append(tokens)
        if segment.observed:
            arrays.append(_padding(tokens.nbytes))
        else:
            arrays.append(np.ascontiguousarray(segment.logprobs, _LOGPROB))
            if len(arrays[-1]) != length:
                given = f"{len(arrays[-1])} log-probs for {length} tokens"
                raise ValueError(f"trajectory {segment.trajectory}: {given}; give one for each")
        for _, _, array in others:
            arrays += array, _padding(array.nbytes)
    header: bytes = msgpack.packb(rows)
    return b"".join([_WIRE.pack(b"PMDB", 1, 0, len(header), 0), header, _padding(len(header)), *arrays])


def _ids(segment: Segment) -> Int32:
    """Its token ids as they are sent. Whether one of int32 is negative the store sees by itself."""
    given = segment.tokens
    if isinstance(given, np.ndarray) and given.dtype == TOKEN:
        return np.ascontiguousarray(given)
    return token_ids(given, of=f"trajectory {segment.trajectory}")


def _others(segment: Segment, named: Columns, whole: Columns, length: int) -> list[tuple[str, str, Column]]:
    """Name, dtype text and values of its columns."""
    of = f"trajectory {segment.trajectory}"
    named = {**(segment.columns or {}), **named}
    if twice := named.keys() & whole.keys():
        raise ValueError(f"{of}: {sorted(twice)} in both extra and trajectory_extra; give each name once")
    others = [(name, *encoded(name, column, tokens=length, of=of)) for name, column in named.items()]
    return others + [(name, *encoded(name, value, tokens=None, of=of)) for name, value in whole.items()]


def _padding(length: int) -> bytes:
    return bytes(-length % 8)
