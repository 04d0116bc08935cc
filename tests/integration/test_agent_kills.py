"""Whatever dies in mid-conversation, no durable token is generated again, and nothing is left behind."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from pmdflow.store.archive import parts, read_part
from pmdflow.types import Mask
from tests.integration.test_agents import agent_config
from tests.support.reward import needs_sandbox
from tests.support.runs import Up, assert_exact

PATIENCE_S = 900.0
VICTIMS = ("RolloutActor", "Gateway", "StoreActor", "agents.function", "-I -S -c")
KILLS = 50
REWARDS = {0.0, 0.125}
"""What `long_talk` posts on its way, once or, where it was killed too often, not at all."""

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("sandbox", [False, pytest.param(True, marks=needs_sandbox)])
def test_fifty_kills(tmp_path: Path, sandbox: bool) -> None:
    draw = random.Random(5)
    config = agent_config(
        tmp_path, "agent_programs:long_talk", rollout__flush_interval_s=0.2, scheduler__tokens_per_iteration=100_000
    )
    config["run"]["iterations"] = 1000
    config["eval"] = {"prompts": 0}
    config["agents"]["sandbox"] = sandbox
    config["reward"]["functions"][0]["args"] = {"name": "said_2"}
    up, killed = Up(tmp_path, config), dict.fromkeys(VICTIMS, 0)
    up.wait_for(lambda: (up.run / "logs" / "agents").exists(), "the first program", PATIENCE_S)
    while sum(killed.values()) < KILLS and up.process.poll() is None:
        victim = draw.choice(VICTIMS)
        found = [process for process in up.processes() if victim in " ".join(_command(process))]
        if found:
            draw.choice(found).send_signal(signal.SIGKILL)
            killed[victim] += 1
        next_at = time.monotonic() + draw.uniform(1, 6)
        while time.monotonic() < next_at and up.process.poll() is None:
            time.sleep(0.05)
    up.process.send_signal(signal.SIGINT)  # it finishes its iteration
    assert up.wait(PATIENCE_S) == 0, up.output
    print(f"\nkilled: {json.dumps(killed)}")
    assert sum(killed.values()) == KILLS
    assert_exact(up)
    for path in parts(up.run):
        claim = read_part(path)
        for start, end in zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False):
            generated = (claim.mask[start:end] & Mask.GENERATED) != 0
            turns = int((generated[1:] & ~generated[:-1]).sum())
            assert 1 <= turns <= 4
        assert set(claim.rewards.tolist()) <= REWARDS  # each was said once, however often it was sent
    assert not (up.run / "agents").exists()
    left = [process for process in psutil.process_iter() if str(tmp_path) in " ".join(_command(process))]
    assert left == []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
