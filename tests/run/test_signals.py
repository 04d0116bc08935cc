"""What signals do to a run: drain, with a deadline where nobody is there to press Ctrl-C again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from pmdflow.run.signals import StopSignals, hangup_ignored


class Run:
    """Something to drain."""

    def __init__(self) -> None:
        self.draining = False
        self.asked = 0

    def ask_to_drain(self) -> None:
        self.draining = True
        self.asked += 1


def wait_for_interrupt() -> None:
    for _ in range(200):
        time.sleep(0.05)


def test_ctrl_c_drains_without_a_deadline_and_twice_stops() -> None:
    run = Run()
    with StopSignals(drain_s=0.01) as signals:
        signals.drain(run)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        assert run.draining
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.reason == "stopped at once"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_signal_drains_however_often_it_comes_and_stops_at_its_deadline(number: signal.Signals) -> None:
    run = Run()
    with StopSignals(drain_s=0.3) as signals:
        signals.drain(run)
        for _ in range(3):
            signal.raise_signal(number)
        assert run.asked == 1
        with pytest.raises(KeyboardInterrupt):
            wait_for_interrupt()
        assert "run.drain_s (0.3 s)" in signals.reason


def test_a_drain_in_time_leaves_nothing_behind() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignals(drain_s=0.1) as signals:
        signals.drain(Run())
        signal.raise_signal(signal.SIGTERM)
        signals.over()
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_nohup_is_respected_and_children_do_not_hang_up() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = Run()
        with StopSignals(drain_s=9.0) as signals:
            signals.drain(run)
            signal.raise_signal(signal.SIGHUP)
        assert not run.draining
    finally:
        signal.signal(signal.SIGHUP, before)
    with hangup_ignored():
        child = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"])
    assert child.wait(timeout=60) == 0
    assert signal.getsignal(signal.SIGHUP) == before
