"""A killed rollout actor: what it loses, and who goes on with its trajectories."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pmdflow.config.schema import Config
from tests.support.engine import prompt, tiny_model
from tests.support.rollout_alone import rollout_alone
from tests.support.runs import small_config

pytestmark = pytest.mark.timeout(300)

GROUPS, SIZE, SLOTS = 24, 4, 32
LEASE_TTL_S = 600.0


def test_it_loses_at_most_one_flush_interval_and_its_leases_at_once(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tiny_model(seed=0).save_pretrained(tmp_path / "model")
    config = small_config(tmp_path, scheduler__groups_per_iteration=GROUPS, data__max_tokens=400)
    config["model"] = {"path": str(tmp_path / "model")}
    engine = {"engine": "transformers", "slots": SLOTS}
    config["rollout"] = {**engine, "flush_interval_s": 1.0, "lease_ttl_s": LEASE_TTL_S}
    with rollout_alone(Config.model_validate(config), tmp_path) as run:
        run.publish(0, groups=GROUPS)
        run.admit([prompt(8, seed=n) for n in range(GROUPS)], group_size=SIZE, max_tokens=400)
        run.start_actor()
        run.wait_tokens(200)
        due, generated = run.kill_generating()
        durable = run.generated()
        print(f"\nlost {generated - durable} of {generated} generated tokens; {generated - due} in the last interval")
        assert durable >= due > 0
        held = run.call("counts").trajectories_leased
        assert run.fence() == held > 0
        assert run.call("counts").trajectories_leased == 0
        start = time.monotonic()
        run.start_actor()
        run.wait_complete(GROUPS * SIZE)
        assert time.monotonic() - start < LEASE_TTL_S / 2
        run.stop()
