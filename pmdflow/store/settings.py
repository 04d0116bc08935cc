"""The settings of the trajectory store, declared once: what opens one takes them as keyword arguments."""

from typing import Literal, NotRequired, TypedDict


class StoreSettings(TypedDict):
    """Keyword arguments of `TrajectoryStore`; the native module holds the defaults of those that may be left out.

    They may change at each opening: what a record decides by them is in the record.
    """

    groups_per_iteration: int
    """Groups of one claim."""
    lookahead: int
    """Iterations that rollout may run ahead of the learner; 0: rollout and training alternate."""
    max_staleness: int | None
    """Greatest staleness of a trained token, in iterations; None is unbounded."""
    segment_loss: NotRequired[Literal["all", "current_only"]]
    """Which segments have a gradient: all that are not over-age (default), or only those of the newest version."""
    window: NotRequired[int | None]
    """Places in the order of admission, from that of the oldest untrained group on, out of which groups are claimed;
    default None, all of them."""
    signal: NotRequired[tuple[float | None, float | None] | None]
    """Open interval of mean rewards: a group outside of it says nothing to the learner, and is evicted as soon as all
    its rewards are there. None in its place is no bound; default None evicts no group."""
    successes: NotRequired[tuple[float, float] | None]
    """Share of its old value that a rate of success keeps at each claim (0 to below 1), and the least reward of a
    success; default None: rates are not kept."""
    min_group_size: NotRequired[int]
    """Scored members below which a group is evicted; default 2."""
    straggler: NotRequired[tuple[int, float] | None]
    """Members, and seconds: with that many scored, a group waits for the late ones only so much longer. Default None:
    it waits for all."""
    max_attempts: NotRequired[int]
    """Infra failures of scoring after which a member is given up; default 3."""
    lease_ttl_s: NotRequired[float]
    """Time that an append renews a lease for; default 30."""
    grant_tokens: NotRequired[int]
    """Most tokens of one grant; default 64."""
    durability: NotRequired[Literal["os", "group", "always"]]
    """When a call is acknowledged: in the page cache, after a group's fdatasync (default), or after its own."""
    max_bytes: NotRequired[int | None]
    """Size of the log above which admission is refused; default None, no limit."""
    file_bytes: NotRequired[int]
    """Size at which the log starts a new file; default 64 MiB."""
    sync_interval_s: NotRequired[float]
    """Longest time between two syncs while records arrive that nobody waits for; default 0.005."""
