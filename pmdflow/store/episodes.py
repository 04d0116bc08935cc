"""Calls on an episode while it goes on: branches, and what is said of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pmdflow import _rust_buffer
from pmdflow.store.answers import Forked

Turn = tuple[int, Mapping[str, float], str | None]
"""Tokens of the episode before the note, rewards by name, and key."""
TurnNote = tuple[int, int, int, Mapping[str, float], str | None]
"""Trajectory, epoch, number, rewards by name, and key: what `Episodes.turn` takes."""


MAX_FORKS = 1023
"""Of one episode."""


class Episodes:
    """That part of `TrajectoryStore`."""

    _native: _rust_buffer.TrajectoryStore

    def fork(
        self, trajectory: int, epoch: int, offset: int, *, wait: bool = True, now_s: float | None = None
    ) -> Forked:
        """Go on in a new branch of a leased episode: an agent rewrote its history after `offset` tokens.

        The branch keeps the first `offset` tokens after the prompt of the newest branch. In it they are observed: each
        token is trained once, where it was generated. The next append has that offset and the new epoch. The episode
        has one lease, one `max_tokens` over all that comes in it, one score, and one place in its group; each of its m
        branches counts for 1/m where it is trained. A branch without a token yet is begun anew, at another offset.

        Raises:
            Conflict: an epoch that was never given out, an offset beyond the history, an episode without a token yet, a
                repeat with another offset, or more than `MAX_FORKS`.
        """
        stale, branch, newest = self._native.fork(trajectory, epoch, offset, wait, now_s)
        return Forked(stale=stale, branch=branch, epoch=newest)

    def turn(
        self,
        trajectory: int,
        epoch: int,
        number: int,
        rewards: Mapping[str, float],
        key: str | None = None,
        *,
        wait: bool = True,
        now_s: float | None = None,
    ) -> bool:
        """Note what is said of a leased episode where it stands; `Unscored.rewards` has the sums, by name.

        Args:
            trajectory: The episode's.
            epoch: Of the lease.
            number: Of the note, from 0; a repeat changes nothing.
            rewards: By name.
            key: Identity of the state that it is in.
            wait: Until it is durable.
            now_s: The clock, for simulations.

        Returns:
            Whether the lease was fenced: nothing is noted then.

        Raises:
            Conflict: an epoch that was never given out, a reward that is not finite, or a number that is not the next.
        """
        try:
            stale: bool = self._native.turn(trajectory, epoch, number, dict(rewards), key, wait, now_s)
        except _rust_buffer.Conflict:
            noted = self._native.trajectories([trajectory])[0]["turns"]
            if noted[number : number + 1] and noted[number][1:] == (dict(rewards), key):
                return False  # a repeat, after what came behind it
            raise
        return stale

    def epochs(self, trajectories: Sequence[int]) -> dict[int, int]:
        """Fencing epochs of those of these trajectories that are in the store; no file is read."""
        return self._native.epochs(list(trajectories))


def rewards_said(turns: Iterable[Turn]) -> dict[str, float]:
    """The rewards that were said of an episode, each the sum of its notes."""
    sums: defaultdict[str, float] = defaultdict(float)
    for _, rewards, _ in turns:
        for name, value in rewards.items():
            sums[name] += value
    return dict(sums)
