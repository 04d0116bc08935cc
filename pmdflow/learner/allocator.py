"""glibc's allocator while a model is loaded and checked: what is freed goes back to the system at once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OWN_PAGES_BYTES = 1 << 17
"""Blocks from this size on have pages of their own meanwhile: glibc's first threshold, which freed blocks raise."""
_LATER_BYTES = 32 << 20
"""The highest that freed blocks raise it to: training allocates the same sizes over and over."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Give each tensor pages of its own until the end; nothing is changed where the C library is another.

    Seen with glibc 2.36: on a heap, layer after layer that is gathered takes new memory, perhaps since an aligned
    block, as torch asks for, does not fit into the hole of one of its size.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LATER_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LATER_BYTES)
        libc.malloc_trim(0)
