"""The engine of a configuration; what it needs is imported with it."""

from __future__ import annotations

from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.rollout.engine import RolloutEngine


def make_engine(config: Config, *, seed: int) -> RolloutEngine:
    """The engine that `rollout.engine` names."""
    rollout = config.rollout
    assert rollout.engine != "auto", "settle comes first"
    if rollout.engine == "simulated":
        from pmdflow.rollout.engines.simulated import SimulatedEngine

        return SimulatedEngine(num_slots=rollout.slots or DEFAULT_SLOTS, seed=seed)
    if rollout.engine == "vllm":
        from pmdflow.rollout.engines.vllm.engine import VllmEngine
        from pmdflow.rollout.engines.vllm.settings import VllmSettings

        return VllmEngine(VllmSettings.of(config), seed=seed)
    from pmdflow.rollout.engines.transformers.engine import TransformersEngine

    return TransformersEngine(
        model_path=config.model.path,
        dtype=config.model.compute,
        num_slots=rollout.slots or DEFAULT_SLOTS,
        threads=config.rollout.threads,
        seed=seed,
        record_experts=config.learner.router_replay,
    )
