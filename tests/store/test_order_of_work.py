"""Whatever the priorities of groups, what has begun goes on first, the oldest before all, with every grant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmdflow.store.segments import encode_segments
from pmdflow.types import Lease
from tests.support.filled_store import PROMPT, open_store, quota, segment

GROUPS, SIZE, MOST = 6, 2, 12


@given(data=st.data())
def test_the_oldest_partial_has_a_token_of_every_grant(data: st.DataObject) -> None:
    store = open_store(groups_per_iteration=GROUPS, grant_tokens=data.draw(st.integers(1, 5)))
    store.publish(0)
    store.set_quota(quota(groups=GROUPS, tokens=data.draw(st.integers(1, 60))))
    for number in range(GROUPS):
        priority = data.draw(st.integers(-3, 3))
        store.admit(f"{number}", PROMPT, cursor=number, group_size=SIZE, max_tokens=MOST, priority=priority)
    held: dict[int, Lease] = {}
    lengths = dict.fromkeys(range(GROUPS * SIZE), 0)
    for _ in range(data.draw(st.integers(1, 15))):
        counts = store.counts()
        waiting = [id for id, length in lengths.items() if 0 < length < MOST and id not in held]
        leased = store.lease("worker", 0, data.draw(st.integers(1, 4)), 0.0)
        if counts.tokens_spent + sum(lease.grant for lease in held.values()) < counts.tokens_budget:
            begun = [lease.trajectory for lease in leased if lengths[lease.trajectory]]
            assert begun == sorted(waiting)[: len(begun)]
            assert leased[0].grant >= 1
            if waiting:
                assert leased[0].trajectory == waiting[0]
        held |= {lease.trajectory: lease for lease in leased}
        back = [lease for lease in held.values() if data.draw(st.booleans())]
        made = {lease.trajectory: min(lease.grant, data.draw(st.integers(0, 5))) for lease in back}
        parts = [
            segment(
                lease,
                made[lease.trajectory],
                offset=len(lease.prefix),
                stop="length" if len(lease.prefix) + made[lease.trajectory] == MOST else "abort",
            )
            for lease in back
        ]
        if parts:
            store.append(encode_segments(parts))
        for lease in back:
            lengths[lease.trajectory] += made[lease.trajectory]
            del held[lease.trajectory]


@given(data=st.data())
def test_what_was_granted_is_not_taken_back_and_no_budget_is_overspent(data: st.DataObject) -> None:
    """A worker goes on with the rest of its grants while the store answers: that is to be within the budget too."""
    budget = data.draw(st.integers(1, 60))
    store = open_store(groups_per_iteration=GROUPS, grant_tokens=data.draw(st.integers(1, 9)))
    store.publish(0)
    store.set_quota(quota(groups=GROUPS, tokens=budget))
    for number in range(GROUPS):
        store.admit(f"{number}", PROMPT, cursor=number, group_size=SIZE, max_tokens=MOST)
    held = {lease.trajectory: lease for lease in store.lease("worker", 0, data.draw(st.integers(1, 12)), 0.0)}
    left = {id: lease.grant for id, lease in held.items()}
    sent = dict.fromkeys(held, 0)
    for _ in range(data.draw(st.integers(1, 6))):
        batch = [id for id in held if data.draw(st.booleans())]
        made = {id: data.draw(st.integers(0, left[id])) for id in batch}
        parts = [segment(held[id], made[id], offset=sent[id]) for id in batch]
        _, grants = store.append(encode_segments(parts)) if parts else (0, [])
        for grant in grants:
            id = grant.trajectory
            sent[id] += made[id]
            assert grant.tokens >= left[id] - made[id]
            left[id] = grant.tokens
        assert store.versions_spent()[0] + sum(left.values()) <= budget
    assert store.ledger()["overdraft"] == 0
