"""An actor's part in evaluation: when it begins, and how it ends."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from pmdflow.rollout.evaluation import Ended, EvaluationTurns


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(turns: EvaluationTurns, pool: ThreadPoolExecutor, version: int) -> Future[Ended]:
    """Ask, and wait until that is known."""
    before, future = turns._turn, pool.submit(turns.serve, version, hold_s=10.0)
    while turns._turn is before:
        time.sleep(0.001)
    return future


def test_it_begins_with_its_version_and_ends_when_nothing_is_left_or_its_time_is_over() -> None:
    clock = Clock()
    turns = EvaluationTurns(clock=clock)
    with ThreadPoolExecutor(4) as pool:
        done = asked(turns, pool, 3)
        assert not turns.begins(2) and not turns.active, "it is still to be fetched"
        clock.now = 100.0
        assert turns.begins(3) and turns.active
        assert not turns.begins(3)
        clock.now = 110.0
        assert not turns.ends(is_idle=False)
        assert turns.ends(is_idle=True) and not turns.active
        assert done.result(timeout=5) == "done"

        late = asked(turns, pool, 3)
        assert turns.begins(3)
        clock.now = 120.1
        assert turns.ends(is_idle=False) and late.result(timeout=5) == "late"

        past = asked(turns, pool, 3)
        assert not turns.begins(4) and past.result(timeout=5) == "passed"

        first = asked(turns, pool, 5)
        second = asked(turns, pool, 6)
        assert first.result(timeout=5) == "passed"
        assert not turns.begins(5) and turns.begins(6)
        turns.close()
        assert second.result(timeout=5) == "passed"
