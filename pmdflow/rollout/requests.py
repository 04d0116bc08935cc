"""What a rollout actor asks of the store, beside generation: one request for leases and one append at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError

from pmdflow.errors import WaitTimeout
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import Forked
from pmdflow.store.client import StoreHandle, call
from pmdflow.store.episodes import TurnNote
from pmdflow.store.segments import encode_segments
from pmdflow.types import Grant, Lease, Segment

LEASE_WAIT_S = 0.25
"""How long a request for leases stays parked in the store; bounds how old the version it was asked for can be."""
STORE_TIMEOUT_S = 120.0
"""A request unanswered for this long ends the actor: it outlasts a restart of the store actor."""

Kind: TypeAlias = Literal["train", "eval"]
Answer = TypeVar("Answer")


class StoreRequests:
    """The requests in flight to the store actor; sending returns at once, taking an answer waits for it."""

    def __init__(self, store: StoreHandle) -> None:
        """Ask nothing yet; `store` is the handle of the store actor."""
        self._store = store
        self._leases: ObjectRef[list[Lease]] | None = None
        self._lease_version = -1
        self._grants: ObjectRef[list[Grant]] | None = None

    @property
    def asking(self) -> bool:
        """A request for leases is in flight."""
        return self._leases is not None

    @property
    def sending(self) -> bool:
        """An append is in flight."""
        return self._grants is not None

    def ask_leases(self, worker: str, *, version: int, most: int, kind: Kind) -> None:
        """Ask for up to `most` leases of one kind, with grants for `version`; only while none is asked for."""
        assert self._leases is None
        self._lease_version = version
        self._leases = call(self._store, StoreActor.lease, worker, version, most, LEASE_WAIT_S, kind)

    def send(self, segments: Sequence[Segment], notes: Sequence[TurnNote] = ()) -> None:
        """Append in one call, what is noted first; only while no append is in flight."""
        assert self._grants is None
        encoded = np.frombuffer(encode_segments(segments), np.uint8)
        self._grants = call(self._store, StoreActor.append, encoded, notes)

    def answered(self) -> tuple[bool, bool]:
        """Whether the request for leases, and whether the append, has its answer."""
        refs = self._in_flight()
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []
        return self._leases in ready, self._grants in ready

    def wait_answer(self) -> bool:
        """Wait for either answer, at most `LEASE_WAIT_S`; False at once if nothing is in flight."""
        refs = self._in_flight()
        if refs:
            ray.wait(refs, num_returns=1, timeout=LEASE_WAIT_S)
        return bool(refs)

    def take_leases(self) -> tuple[int, list[Lease]]:
        """The leases asked for, and the version that their grants are for.

        Raises:
            WaitTimeout: no answer within `STORE_TIMEOUT_S`.
        """
        assert self._leases is not None
        leases = _get(self._leases, "the request for leases")
        self._leases = None
        return self._lease_version, leases

    def take_grants(self) -> list[Grant]:
        """The answers to the append, all of which is durable then; [] if none is in flight.

        Raises:
            WaitTimeout: no answer within `STORE_TIMEOUT_S`.
        """
        if self._grants is None:
            return []
        grants = _get(self._grants, "an append")
        self._grants = None
        return grants

    def trajectory(self, id: int) -> Mapping[str, Any] | None:
        """A trajectory as the store has it, None if it is gone; waits for the answer.

        Raises:
            WaitTimeout: no answer within `STORE_TIMEOUT_S`.
        """
        return _get(call(self._store, StoreActor.trajectory, id), "the question for a trajectory")

    def epochs(self, trajectories: Sequence[int]) -> Mapping[int, int]:
        """The fencing epochs of those trajectories that are in the store; likewise."""
        return _get(call(self._store, StoreActor.epochs, trajectories), "the question for epochs")

    def turns(self, notes: Sequence[tuple[int, int, int, Mapping[str, float]]]) -> list[bool]:
        """Note what is said of episodes, (trajectory, epoch, number, rewards); whether each lease was fenced; likewise.

        All go out at once, and share what makes them durable.
        """
        refs = [
            call(self._store, StoreActor.turn, id, epoch, number, dict(rewards), None)
            for id, epoch, number, rewards in notes
        ]
        return [_get(ref, "a note on an episode") for ref in refs]

    def fork(self, id: int, epoch: int, offset: int) -> Forked:
        """Begin a branch; likewise."""
        return _get(call(self._store, StoreActor.fork, id, epoch, offset), "a fork")

    def _in_flight(self) -> list[ObjectRef[list[Lease]] | ObjectRef[list[Grant]]]:
        return [ref for ref in (self._leases, self._grants) if ref is not None]


def _get(ref: ObjectRef[Answer], what: str) -> Answer:
    try:
        return ray.get(ref, timeout=STORE_TIMEOUT_S)
    except GetTimeoutError as error:
        raise WaitTimeout(
            f"the store actor did not answer {what} within {STORE_TIMEOUT_S:g} s; its log says what it does"
        ) from error
