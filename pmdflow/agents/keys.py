"""The credential of one program: who it may speak for, signed with the run's secret."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from dataclasses import astuple, dataclass

_SIGNED = 32
"""Bytes of a signature."""


@dataclass(frozen=True, slots=True)
class Credential:
    """Of the program that was started for one lease of a trajectory."""

    worker: str
    """The rollout actor that holds the lease; it is known to Ray by this name."""
    trajectory: int
    epoch: int
    """Fencing epoch of the lease for which it was started: of another program for the same trajectory it differs."""

    def key(self, secret: bytes) -> str:
        """The API key."""
        named = json.dumps(astuple(self)).encode()
        return base64.urlsafe_b64encode(_signature(named, secret) + named).decode()


def read_key(key: str, secret: bytes) -> Credential | None:
    """Whose API key it is; None if it is no key of this run.

    Example:
        >>> read_key(Credential("rollout-0/1", 7, 2).key(b"s"), b"s")
        Credential(worker='rollout-0/1', trajectory=7, epoch=2)
        >>> read_key("sk-1", b"s")
    """
    try:
        data = base64.urlsafe_b64decode(key.encode())
    except (binascii.Error, ValueError):
        return None
    signature, named = data[:_SIGNED], data[_SIGNED:]
    if not hmac.compare_digest(signature, _signature(named, secret)):
        return None
    return Credential(*json.loads(named))


def _signature(named: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, named, "sha256")
