"""The plain form in which entries of reasoning-gym pass through the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TUPLE, _INT, _ITEMS = "__tuple__", "__int__", "__items__"
_INT64 = 1 << 63


def pack(value: Any) -> Any:
    """Turn an entry's value into plain types (str keys, lists, 64-bit integers) without losing what `unpack` needs.

    Some verifiers compare tuples or look up integer keys, which msgpack would turn into other things.

    Raises:
        ValueError: a type that has no plain form.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)  # drops numpy.str_ and string enums
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else {_INT: str(value)}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item) for item in value]}
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {_ITEMS: [[pack(key), pack(item)] for key, item in value.items()]}
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return pack(value.tolist())
    raise ValueError(f"a {type(value).__name__} cannot be stored as prompt metadata: {value!r:.80}")


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, list | tuple):
        return [unpack(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == _TUPLE:
            return tuple(unpack(item) for item in inner)
        if tag == _INT:
            return int(inner)
        if tag == _ITEMS:
            return {unpack(key): unpack(item) for key, item in inner}
    return {key: unpack(item) for key, item in value.items()}
