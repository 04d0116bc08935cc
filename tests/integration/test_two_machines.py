"""A run over machines of its own network: a link that is cut, machines that die, what waits for them and what goes on.

The machines are network namespaces of this one, so they share its disk and clock; Ray asks for a token on each of them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.netns import PORT, Machines
from tests.support.runs import Up, assert_exact, small_config

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not netns.is_possible(), reason="needs network namespaces, so root"),
]
CUT_S = 30.0
GO_ON_S = 60.0
PATIENCE_S = 300.0


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as machines:
        yield machines


def started(machines: Machines, directory: Path, *, actors: int = 2) -> Up:
    """A run whose two ranks fit on no machine together; it is begun on machine a."""
    config = small_config(
        directory, run__iterations=1000, scheduler__max_staleness=None, learner__ranks=2, learner__threads=2,
        learner__checkpoint_every=1, rollout__actors=actors, rollout__lease_ttl_s=60,
    )  # fmt: skip
    config["cluster"] = {"address": f"{machines.address('a')}:{PORT}", "env": {"GLOO_SOCKET_IFNAME": "eth0"}}
    return Up(directory, config, prefix=machines.inside("a"), env=machines.env)


def told(up: Up, kind: str) -> list[str]:
    return [event["message"] for event in up.events() if event["kind"] == kind]


def done(up: Up) -> int:
    records = up.iterations()
    return int(records[-1]["iteration"]) if records else 0


def goes_on(up: Up, what: str, timeout_s: float = PATIENCE_S) -> float:
    """Seconds until two more iterations are done."""
    before, begun = done(up), time.monotonic()
    up.wait_for(lambda: done(up) >= before + 2, what, timeout_s)
    return time.monotonic() - begun


def ended(up: Up) -> None:
    """Drained, with nothing lost that was durable."""
    up.process.send_signal(signal.SIGINT)
    assert up.wait(PATIENCE_S) == 0, up.output
    assert_exact(up)


def test_a_link_that_is_cut_and_a_machine_of_rollout_actors_that_dies(machines: Machines, tmp_path: Path) -> None:
    machines.start("a", cpus=3)
    machines.start("b", cpus=3)
    machines.start("c", cpus=1)
    up = started(machines, tmp_path, actors=3)
    goes_on(up, "the first iterations")
    assert [machines.runs(name, "LearnerActor") for name in "abc"] == [1, 1, 0]
    assert [machines.runs(name, "RolloutActor") for name in "abc"] == [1, 1, 1]

    machines.cut("b")
    time.sleep(CUT_S)
    machines.mend("b")
    seconds = goes_on(up, "iterations after the cut")
    restarts = told(up, "actor_died")
    print(f"a link cut for {CUT_S:g} s: two iterations {seconds:.0f} s after it was mended, restarts: {restarts}")
    # Ray gives up connections that are silent for long, and the ranks begin again together: once, at most.
    assert len(restarts) <= 1

    machines.kill("c")
    seconds = goes_on(up, "iterations without the machine of rollout actors", GO_ON_S)
    print(f"a machine with a rollout actor killed: two iterations in {seconds:.0f} s")
    up.wait_for(lambda: any("waits for a place" in message for message in told(up, "actor_waits")), "what is missing")
    ended(up)


def test_a_rank_of_a_machine_that_dies_waits_for_it_or_goes_where_there_is_room(
    machines: Machines, tmp_path: Path
) -> None:
    machines.start("a", cpus=3)
    machines.start("b", cpus=3)
    up = started(machines, tmp_path)
    goes_on(up, "the first iterations")
    assert [machines.runs(name, "LearnerActor") for name in "ab"] == [1, 1]

    machines.kill("b")
    up.wait_for(lambda: any("learner ranks" in message for message in told(up, "actor_waits")), "what is missing")
    (missing,) = [message for message in told(up, "actor_waits") if "learner ranks" in message]
    print(missing)
    assert "of 2 learner ranks wait for a place: each needs 2 CPUs and 0 GPUs, free are " in missing
    machines.start("b", cpus=3)
    print(f"the machine is back: two iterations in {goes_on(up, 'iterations when the machine is back'):.0f} s")

    machines.start("c", cpus=3)
    waits = len(told(up, "actor_waits"))
    machines.kill("b")
    print(f"room elsewhere: two iterations in {goes_on(up, 'iterations on the other machine'):.0f} s")
    assert machines.runs("c", "LearnerActor") == 1
    assert not any("learner ranks" in message for message in told(up, "actor_waits")[waits:])
    ended(up)
