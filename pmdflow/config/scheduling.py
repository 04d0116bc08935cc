"""The settings of the scheduler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class StragglerConfig(Section):
    """When a group is trained without its late members, which biases training towards short answers."""

    members: PositiveInt
    """Scored members of a group from which on it waits no longer than `wait_s` for the others."""
    wait_s: NonNegativeFloat
    """Time that it still waits; then late members are evicted, whatever they have generated."""


class SchedulerConfig(Section):
    """Budgets and staleness."""

    groups_per_iteration: PositiveInt
    """Groups that one iteration trains."""
    tokens_per_iteration: PositiveInt | Literal["auto"]
    """Most tokens that all rollout actors may generate under one policy version; `auto` is what they generate in
    `iteration_s` at the rate of the newest iterations, waits left out, and at least a token for each trajectory of a
    claim. Until a rate is measured it holds nothing back."""
    iteration_s: PositiveFloat | None = None
    """Seconds that an iteration should take, for `tokens_per_iteration: auto`."""
    lookahead: NonNegativeInt = 1
    """Iterations that rollout may run ahead of the learner; 0 alternates rollout and training."""
    max_staleness: NonNegativeInt | None = 4
    """Tokens older than this many versions at the claim have no gradient; null is unbounded."""
    window: PositiveInt | None = None
    """Groups in the order of admission, from the oldest one on that is not ready, out of which a claim takes what is
    ready: a group is passed by fewer younger ones than this, evicted ones not counted. null is all that are
    admitted."""
    extra_groups: NonNegativeInt = 0
    """Groups that are generated at `lookahead` 0 beyond those that an iteration trains: it trains the first that are
    ready, and the next one goes on with what is left (APRIL's over-provisioning)."""
    versions: Annotated[int, Field(ge=2)] | None = None
    """Policy versions that rollout actors serve at a time, each trajectory by one from its first token to its last
    (DORA); the next version is published once the oldest has drained. null: trajectories go on under new weights."""
    policy: Annotated[str, Field(pattern=IMPORT_PATH)] | None = None
    """Import path `package.module:name` of a scheduling policy (`pmdflow/run/policies.py`), found like a reward
    function; `pmdflow check-policy` tries one. null is the one that the numbers here stand for."""
    refill: bool = False
    """Evict groups that `learner.keep_groups_above` and `keep_groups_below` leave out as soon as they are scored, and
    admit others in their place: every claim is full of groups that teach something (DAPO's dynamic sampling)."""
    refill_limit: PositiveInt = 4
    """Most groups, times `groups_per_iteration`, that are admitted in the place of others in one iteration; then what
    is ready is trained."""
    min_group_size: PositiveInt = 2
    """A group with fewer scored members is evicted."""
    straggler: StragglerConfig | None = None
    """Train groups without their late members, which biases towards short answers; null waits for every member."""
