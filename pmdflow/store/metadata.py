"""Metadata of prompts as the store keeps it: what goes in comes out, and what would not is refused at admission."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from pmdflow.types import Prompt


def pack_metadata(prompt: Prompt) -> bytes:
    """The metadata of `prompt` as msgpack.

    Raises:
        ValueError: it holds something that cannot be stored.
    """
    try:
        packed: bytes = msgpack.packb(dict(prompt.metadata), use_bin_type=True)
        unpack_metadata(packed)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the metadata of prompt {prompt.id!r} cannot be stored: {error}; use text, numbers, booleans, None, and "
            "lists and mappings of these"
        ) from error
    return packed


def unpack_metadata(packed: bytes) -> dict[str, Any]:
    """What `pack_metadata` packed; keys may be numbers too."""
    metadata: dict[str, Any] = msgpack.unpackb(packed, strict_map_key=False)
    return metadata
