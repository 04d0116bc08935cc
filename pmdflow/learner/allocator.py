"""What glibc's allocator keeps of freed memory, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def trim(*_: object) -> None:
    """Give back every free page; nothing where the C library is another.

    Seen with glibc 2.36: layer after layer that is gathered takes new memory, perhaps since an aligned block, as torch
    asks for, does not fit into the hole of one of its size.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def trimmed_after(modules: Iterable[Any]) -> Iterator[None]:
    """Trim meanwhile after each forward pass of one of the modules, which then are sharded again, and at the end."""
    hooks = [module.register_forward_hook(trim) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        trim()
