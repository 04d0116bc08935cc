"""Waits that a signal ends, and what `sync` answers."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.filled_store import PROMPT, admit, lease_all, ready_store


@pytest.mark.parametrize("durability", ["os", "group", "always"])
def test_sync_answers_what_is_on_the_disk(durability: Any, tmp_path: Path) -> None:
    store = ready_store(tmp_path, durability=durability)
    admit(store)
    lsn = store.sync()
    assert lsn == store.counts().lsn == store.counts().durable_lsn
    store.close()
    assert ready_store(tmp_path, durability=durability).counts().lsn >= lsn


class Alarm(Exception):
    """Raised by the handler of a signal."""


@pytest.mark.parametrize("call", ["claim", "lease", "unscored", "eval_results"])
def test_a_signal_ends_a_wait(call: str) -> None:
    store = ready_store()
    admit(store)
    lease_all(store)
    store.admit("eval-0", PROMPT, kind="eval", group_size=1, max_tokens=9)
    waits: dict[str, Any] = {
        "claim": lambda: store.claim(1, 0, 30.0),
        "lease": lambda: store.lease("other", 0, 0, 30.0),
        "unscored": lambda: store.unscored(1, 1.0, 30.0),
        "eval_results": lambda: store.eval_results("eval-", 30.0),
    }
    assert threading.current_thread() is threading.main_thread()

    def handle(number: int, frame: object) -> None:
        assert store.counts().groups_untrained == 1, "a handler may use the store"
        raise Alarm

    before = signal.signal(signal.SIGALRM, handle)
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Alarm):
            waits[call]()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 10.0
