"""New weights between the thread that fetches them and the one that generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pmdflow.errors import WaitTimeout
from pmdflow.rollout.incoming import IncomingWeights

WAIT_S = 30.0


def test_only_the_newest_is_taken_and_older_offers_are_forgotten() -> None:
    incoming = IncomingWeights()
    assert incoming.take() is None and not incoming.waiting
    for version in (2, 5, 4):
        incoming.offer(version, f"weights {version}")
    assert incoming.waiting and incoming.take() == (5, "weights 5")
    assert incoming.take() is None
    incoming.offer(5, "again")
    assert not incoming.waiting


def test_whoever_waits_learns_whether_its_version_was_used() -> None:
    incoming = IncomingWeights()
    with ThreadPoolExecutor() as pool:
        incoming.offer(1, "a")
        used = pool.submit(incoming.await_applied, 1, timeout_s=WAIT_S)
        taken = incoming.take()
        assert taken is not None
        incoming.mark_applied(taken[0])
        assert used.result(timeout=WAIT_S) is True
        incoming.offer(2, "b")
        passed_over = pool.submit(incoming.await_applied, 2, timeout_s=WAIT_S)
        incoming.offer(3, "c")
        assert passed_over.result(timeout=WAIT_S) is False
        last = pool.submit(incoming.await_applied, 3, timeout_s=WAIT_S)
        incoming.close()
        assert last.result(timeout=WAIT_S) is False


def test_a_version_that_nobody_takes_is_named_after_the_deadline() -> None:
    incoming = IncomingWeights()
    incoming.offer(4, "a")
    with pytest.raises(WaitTimeout, match=r"policy version 4 was not in use after 0\.01 s; the engine has 0"):
        incoming.await_applied(4, timeout_s=0.01)


def test_whoever_waits_for_an_offer_can_do_something_else_meanwhile() -> None:
    """The learner that will publish may want the device of the engine that waits for it."""
    incoming, looked = IncomingWeights(), []

    def look() -> None:
        looked.append(True)
        if len(looked) == 2:
            incoming.offer(1, "a")

    incoming.await_offer(timeout_s=WAIT_S, meanwhile=look)
    assert len(looked) == 2 and incoming.waiting
    with pytest.raises(WaitTimeout, match=r"no policy version was published within 0\.01 s"):
        IncomingWeights().await_offer(timeout_s=0.01, meanwhile=look)
