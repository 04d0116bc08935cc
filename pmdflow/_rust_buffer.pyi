"""The trajectory store: the life of a trajectory on an append-only, CRC-framed log.

Every method that changes state carries an id or offset made by the caller and answers a repeat with the
first answer. Blocking methods release the GIL, wait on a condition variable and take `timeout_s`; in the main
thread a signal whose handler raises ends them within about 0.1 s.
`now_s` is the clock: None reads the monotonic clock; a simulator passes its own.
Arrays cross as little-endian bytes; `pmdflow.store` gives them their NumPy types.
"""

from typing import Any, Literal, final

from typing_extensions import Buffer

__all__ = [
    "Conflict",
    "CorruptLog",
    "DiskFault",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StorePoisoned",
    "TrajectoryStore",
    "pack",
]

def pack(
    lengths: list[int], *, ranks: int, limit: int, steps: list[int] | None = None, quadratic: float = 0.0
) -> list[list[list[list[int]]]]:
    """Micro-batches over data-parallel ranks, as indices: for each step, rank and micro-batch.

    `steps` says how many sequences each step has, in order (None: all are one step). In a step all ranks have equally
    many micro-batches, empty ones included, of at most `limit` tokens; a longer sequence is alone in one. A sequence of
    n tokens costs n + `quadratic` n^2: the costs of two ranks differ at most by that of the longest sequence, and
    micro-batches that run at the same time cost about the same. Deterministic.

    Raises:
        ValueError: `steps` does not add up to the number of sequences, a number is out of range, or there are more than
            2^20 ranks x steps.
    """

class StoreError(Exception):
    """Root of the store's errors."""

class StoreFull(StoreError):
    """Admission refused: the quota of groups or `max_bytes` is reached, or the disk is full; names the limit."""

class Conflict(StoreError):
    """A repeat with other content, a gap in offsets, or an operation in the wrong state."""

class CorruptLog(StoreError):
    """Damage before the tail of the log, or another format; names file and offset."""

class DiskFault(StoreError):
    """The operating system failed to read, write or sync a file; names it. What was acknowledged is not lost."""

class StorePoisoned(StoreError):
    """A write or sync failed before, and the store takes no more records; names that failure. Open it again."""

class StoreLocked(StoreError):
    """Another process has the store open for writing."""

@final
class TrajectoryStore:
    def __new__(
        cls,
        path: str | None,
        *,
        groups_per_iteration: int,
        lookahead: int,
        max_staleness: int | None,
        segment_loss: Literal["all", "current_only"] = "all",
        window: int | None = None,
        signal: tuple[float | None, float | None] | None = None,
        successes: tuple[float, float] | None = None,
        min_group_size: int = 2,
        straggler: tuple[int, float] | None = None,
        max_attempts: int = 3,
        lease_ttl_s: float = 30.0,
        grant_tokens: int = 64,
        durability: Literal["os", "group", "always"] = "group",
        max_bytes: int | None = None,
        file_bytes: int = 67108864,
        sync_interval_s: float = 0.005,
        read_only: bool = False,
    ) -> TrajectoryStore:
        """Open or create the store in directory `path`; None keeps the log in memory (simulation, tests).

        With `read_only` it is a picture of the store as it is now, beside a process that may be writing it: no lock is
        taken and every change is refused. Opening drops all leases (their trajectories are partial again); epochs go
        on counting.

        `straggler` is (members, wait in seconds), off by default: a training group with at least that many scored
        members is ready once that time has passed since, without its late members: those not complete or without an
        outcome. They are evicted with the reason `late`: fenced, not in claims, their scores ignored. This biases
        training towards short answers. The time is not stored: opening starts it again.

        Raises:
            StoreLocked: another writer has it open.
            CorruptLog: damage before the tail, or a newer format.
        """
    def set_quota(self, version: int, groups: int, tokens: int, tokens_per_segment: int | None) -> None:
        """Set what rollout may do under `version`; durable; a later call for the same version replaces it."""
    def admit(
        self,
        request_id: str,
        *,
        cursor: int | None,
        kind: Literal["train", "eval"],
        prompt_id: str,
        prompt: bytes,
        metadata: bytes,
        text: str | None = None,
        group_size: int,
        max_tokens: int,
        priority: int = 0,
        drawn: tuple[int, int] | None = None,
        wait: bool = True,
    ) -> int:
        """Admit a prompt with `group_size` empty trajectories; returns the group id.

        `prompt` is int32 ids, `text` what these are of, `metadata` opaque bytes. `cursor` (train only) advances
        `next_cursor` to at least cursor + 1. Groups of higher `priority` are started first. `drawn` is the key of the
        prompt's success and the number of the rates that it was drawn by, see `successes`. A repeat of a live
        `request_id` returns its group; of one already gone raises Conflict (but the ids of dropped evaluations are free
        again).

        Raises:
            StoreFull: untrained groups have reached the quota, or no room for group_size x max_tokens.
        """
    def lease(
        self, worker: str, version: int, max_leases: int, timeout_s: float, now_s: float | None = None
    ) -> list[dict[str, Any]]:
        """Lease up to `max_leases` trajectories to a worker whose engine holds `version`; waits for the first one.

        Order: evaluation first, then partial ones, oldest group first, then new ones, highest priority and then oldest
        group first. Nothing is leased when its grant would be 0. With lookahead 0 nothing (but evaluation) is leased
        while a claim is untrained or `version` is not the newest. Keys of an answer: the fields of
        `pmdflow.types.Lease`.
        """
    def lease_group(self, worker: str, group: int) -> list[dict[str, Any]]:
        """Lease the members of a group that can still grow and that nobody holds, outside every order and budget.

        For a caller that has generated them already: the grant is all that `max_tokens` leaves. Keys as of `lease`.

        Raises:
            Conflict: there is no such group.
        """
    def fence(self, worker: str) -> int:
        """End every lease of a worker that is dead or given up, and lease nothing to it again; returns how many.

        A call of `lease` that it left waiting gets nothing, and what it appends from now on is stale. Forgotten at
        reopening, like leases: give each worker that takes over a name of its own.
        """
    def append(
        self, batch: Buffer, wait: bool = True, now_s: float | None = None
    ) -> tuple[int, list[tuple[int, bool, int]]]:
        """Append segments, extend grants, end leases. Returns (lsn, [(trajectory, stale, grant)]) in order.

        `batch` is what `pmdflow.store.encode_segments` makes; rust_buffer/src/wire.rs describes it. It is read without
        the GIL: nobody may write to it during the call. A segment without tokens renews the lease and asks for a new
        grant. What a segment repeats is compared, the rest is taken; a whole repeat is a no-op that answers as the
        first time. Tokens beyond the grant are taken and counted (`overdraft` of the ledger). Without `wait` it answers
        before the batch is durable.

        Raises:
            Conflict: a gap, other content at the same offset, more tokens than max_tokens, a version that decreases or
                was never published, a negative id, a log-prob that is not finite, or a temperature that is not finite
                and above 0 (evaluation and observed tokens: at least 0).
        """
    def fork(
        self, trajectory: int, epoch: int, offset: int, wait: bool = True, now_s: float | None = None
    ) -> tuple[bool, int, int]:
        """Begin a new branch of a leased episode. Returns (stale, branch, epoch).

        It keeps `offset` tokens of the history of the newest branch; the next append has that offset, and the epoch
        that is answered. A repeat is answered as the first time. Renews the lease.

        Raises:
            Conflict: an epoch never given out, an offset beyond the history, a branch without a token, a repeat with
                another offset, or more than 1,024 branches.
        """
    def unscored(
        self, max_items: int, ttl_s: float, timeout_s: float, now_s: float | None = None
    ) -> list[dict[str, Any]]:
        """Complete trajectories without a reward; each is handed out again only after `ttl_s` or a restart."""
    def score(
        self,
        trajectory: int,
        attempt: int,
        outcome: Literal["scored", "invalid", "infra_failure"],
        reward: float,
        components: dict[str, float],
        wait: bool = True,
        now_s: float | None = None,
    ) -> None:
        """Record the outcome of scoring attempt `attempt`. `max_attempts` infra failures make the member `failed`.

        A group whose living members are all scored is ready; with fewer than `min_group_size` it is evicted with
        the reason `min_group_size`. Scores of late members are ignored (see `straggler`), and so is every outcome of
        an attempt but the first; `scores_ignored` counts those that differ.

        Raises:
            Conflict: not complete, a reward that is not finite, or an attempt that nobody was asked for.
        """
    def publish(self, version: int, iteration: int | None, left_out: dict[str, list[int]]) -> None:
        """Make `version` the newest; `iteration`'s claim is trained (None for initial weights or after a resume).

        `left_out` names trajectories of the claim that had no gradient by reason (`filter`, `veto`): from then on,
        `read_claim` and the ledger show their otherwise trained tokens as masked for it.

        Raises:
            Conflict: the version is not above every earlier one (an exact repeat is a no-op), the claim is not there to
                be trained, or a trajectory left out is not in it, or is there for two reasons.
        """
    def claim(self, iteration: int, version: int, timeout_s: float, now_s: float | None = None) -> dict[str, Any]:
        """Claim `iteration`'s groups for a learner at `version`.

        While there are undone claims it makes the oldest of them again, whatever `version` is. Otherwise it
        waits until `groups_per_iteration` groups are ready, or nothing can be leased, none is leased and none
        awaits a score. Of the ready groups the first admitted are taken, at most `groups_per_iteration`: those still
        being generated do not hold up younger ones, and the quota of untrained groups bounds how many these are.
        A ready group without any token to train is evicted with the reason `over_age`.
        Returns {status: "claimed" | "starved" | "timeout", reason: str | None, groups: list[int], lsn: int}.
        "starved" says why waiting would not help: `closed`, rollout is closed and no group is ready (grant the budget
        again or admit), `over_age`, this call evicted groups and too few are left (admit others in their place), or
        `no_signal`, groups were evicted since the last call because their rewards lie outside of `signal`.
        A repeat for an iteration already claimed returns the first answer.

        Raises:
            Conflict: another claim is untrained, the iteration is not above every earlier one, the version was never
                published, or a repeat names another.
        """
    def claim_tokens(self, iteration: int) -> int:
        """Tokens of the claim, prompts included: what `read_claim` needs room for."""
    def read_claim(
        self,
        iteration: int,
        *,
        tokens: Buffer,
        logprobs: Buffer,
        versions: Buffer,
        temperatures: Buffer,
        mask: Buffer,
        check: bool,
    ) -> dict[str, Any]:
        """Pack the claim into the given byte arrays, without the GIL: nobody else may touch them during the call.

        Returns the other fields of `pmdflow.types.TrainBatch` but `plan`, arrays as bytes, but for extra columns:
        `columns` says whether there are any, and `read_extras` gives them.

        Raises:
            ValueError: the arrays are read-only, not contiguous or share memory.
            Conflict: they are too short.
            CorruptLog: with `check`, a token array is not the one that was written.
        """
    def record_plan(self, iteration: int, rule: str, seed: int | None, num_steps: int, steps: list[int]) -> None:
        """Record how `iteration`'s claim is dealt to `num_steps` optimizer steps. Safe to repeat.

        `steps` has the 0-based step of each group with a reward, in claim order.

        Raises:
            Conflict: there is no such claim, it has another plan or is trained, or the numbers are not of it.
        """
    def plan(self, iteration: int) -> dict[str, Any] | None:
        """The recorded plan as the fields of `pmdflow.types.ClaimPlan`; None where there is none.

        Raises:
            Conflict: there is no such claim.
        """
    def claim_rows(self, iteration: int) -> dict[str, Any]:
        """The fields of `pmdflow.types.Claim` but `plan`, arrays as bytes, and `columns` as `read_claim`."""
    def token_counts(self, trajectories: list[int]) -> list[int]:
        """Tokens of each of these live trajectories, prompts included: what `read_tokens` needs room for.

        Raises:
            Conflict: one of them is not in the store.
        """
    def read_tokens(self, trajectories: list[int], *, tokens: Buffer, logprobs: Buffer, check: bool) -> None:
        """Pack prompt and tokens of live trajectories into the given byte arrays, without the GIL.

        Raises:
            ValueError: as `read_claim`.
            Conflict: one of them is not in the store, or the arrays are too short.
            CorruptLog: with `check`, a token array is not the one that was written.
        """
    def read_extras(self, trajectories: list[int]) -> list[dict[str, list[tuple[int, int, str, bytes]]]]:
        """The extra columns of live trajectories by name, one entry (offset, length, dtype, bytes) for each stored run.

        Raises:
            Conflict: one of them is not in the store.
        """
    def prefetch(self) -> int:
        """Have the disk read what a claim would take now, without waiting for it; returns the number of its tokens."""
    def commit(self, iteration: int) -> None:
        """A durable checkpoint covers every claim up to `iteration`, all of them trained. Safe to repeat.

        Raises:
            Conflict: one of them is untrained, or `iteration` has no claim: the store is older than the checkpoint.
        """
    def uncommit(self, iteration: int) -> list[int]:
        """Undo every claim after `iteration` (resume): their groups are ready again. Returns the undone iterations.

        They are claimed again as they were (groups, order, version, masks, plan), the oldest first, before any new
        claim.

        Raises:
            Conflict: one of them is evicted.
        """
    def evict(self, iteration: int) -> int:
        """Drop the groups of every committed claim up to `iteration`, and log files without live groups.

        Call it after they are archived. Returns the number of groups dropped.
        """
    def discard(self, group: int, reason: str) -> bool:
        """Drop a group that no claim has, with its trajectories and leases; durable. False when it is gone already.

        Its tokens are in the ledger's `evicted_discarded`. An undone claim is made again without it.

        Raises:
            Conflict: no such group was ever admitted, a claim has it, or the reason is empty or above 4,096 bytes.
        """
    def eval_results(self, prefix: str, timeout_s: float) -> list[dict[str, Any]] | None:
        """Results of the evaluation groups whose request ids start with `prefix`; None if not all are scored in time.

        One per trajectory: {request_id, prompt_id, reward: float | None, length, stop, first_version, last_version}.
        """
    def drop_eval(self, prefix: str) -> int:
        """Evict the evaluation groups whose request ids start with `prefix`; returns how many."""
    def groups(self, state: str | None, after: int | None, limit: int) -> tuple[list[dict[str, Any]], int | None]:
        """One page of the live groups: up to `limit` with ids above `after`, and the next page's `after`.

        The answer's second part is None on the last page; a page may be empty before it.

        Keys: group, request_id, prompt_id, kind, state, iteration, trajectories: list[int], cursor, priority,
        max_tokens, prompt_length, tokens, scored, failed, late, metadata: bytes, text: str | None.

        `state` is one of `partial`, `ready`, `claimed`, `trained`, `committed`; `tokens` are those of its members,
        `scored`, `failed` and `late` count members; tokens of late members are not in `tokens`.
        """
    def select(
        self,
        after: int | None,
        limit: int,
        *,
        iteration: int | None,
        version: tuple[int | None, int | None],
        reward: tuple[float | None, float | None],
        length: tuple[int | None, int | None],
        stop: int | None,
        prompt_id: str | None,
        group: int | None,
        kind: str | None,
        state: str | None,
    ) -> tuple[list[dict[str, Any]], int | None]:
        """One page of a query: up to `limit` trajectories with ids above `after`, and the next page's `after`.

        The answer's second part is None on the last page; a page may be empty before it. See
        `pmdflow.store.TrajectoryStore.query` for the filter; rows are the fields of `pmdflow.store.StoredTrajectory`.

        Raises:
            ValueError: an unknown `stop`, `kind` or `state`.
        """
    def claims(self) -> dict[int, str]:
        """State of every claim that is not evicted, by iteration: `claimed`, `trained` or `committed`."""
    def claim_lsn(self, iteration: int) -> int:
        """LSN of the record of a claim.

        Raises:
            Conflict: the iteration has none.
        """
    def take_late(self) -> list[dict[str, Any]]:
        """Groups that became ready without late members since the last call, the newest 1,024 of them.

        Keys: group, prompt_id, members (late ones), tokens (of these).
        """
    def trajectory(self, trajectory: int) -> dict[str, Any]:
        """One live trajectory, with its arrays.

        Keys: trajectory, group, state (`leased`, `idle`, `unscored`, `scored`, `failed` or `late`), prompt, tokens,
        logprobs, observed, segments: [(length, version, temperature, observed)], reward, components, stop, attempts,
        epoch,
        extra: {name: [(offset, length, dtype, bytes)]}, forks: [(branch, start, offset)].
        """
    def counts(self) -> dict[str, int]:
        """The fields of `pmdflow.types.Counts`."""
    def ledger(self) -> dict[str, int]:
        """Durable generated tokens of training trajectories, each in one place; `generated` is their sum.

        Keys: generated, partial_leased, partial_idle, unscored, waiting_group, ready, claimed, trained,
        masked_over_age, masked_segment, masked_filter, masked_veto, evicted_<reason>...; and, outside the sum,
        `prompt`, `observed` (made by environments), `reprefill` (prefix tokens handed out with leases after the
        first), `eval`, `overdraft` (appended beyond the grants).
        """
    def versions_spent(self) -> dict[int, int]:
        """Durable training tokens by policy version, for the versions that still have a quota."""
    def successes(self, after: int | None = None) -> tuple[int, bytes, bytes]:
        """Rates of success: their number, keys (uint64) and rates (float64) as bytes.

        What the last claim moved if `after` is the number before it, nothing if it is the present one, else all.
        """
    def wait_durable(self, lsn: int | None, timeout_s: float) -> bool:
        """Wait until records up to `lsn` (None: the newest) are as durable as promised; False when that is late."""
    def sync(self) -> int:
        """Bring every record so far to the disk, also with durability `os`; returns the newest one's LSN."""
    def close(self) -> None:
        """Sync, wake every waiter with StoreError and release the lock. Safe to repeat."""
