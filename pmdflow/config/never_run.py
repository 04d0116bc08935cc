"""What of pmdflow has never run, because no machine that it was built on has a GPU, and what would prove each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pmdflow.config.engine_problems import lossy_arguments

if TYPE_CHECKING:
    from pmdflow.config.gpus import Gpus
    from pmdflow.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class NeverRun:
    """One thing that was never run."""

    what: str
    proof: str
    """The test that would show that it works."""
    concerns: Callable[[Config, Gpus], bool]
    """Whether a plan on these GPUs uses it."""


NEVER_RUN = (
    NeverRun(
        what="the learner on CUDA: packed flash attention, bfloat16 log-probs, NCCL, async checkpoints from a GPU",
        proof="one H100: attention of packed rows beside float32 SDPA of each sequence, forward and backward; log-probs"
        " within 0.02 of plain float32 logits, gradient cosine above 0.999; a step, saved and loaded, bit for bit",
        concerns=lambda config, gpus: True,
    ),
    NeverRun(
        what="the memory of a plan on a real allocator: what CUDA, NCCL, vLLM and fragmentation take is assumed",
        proof="one H100: peak bytes at 8k, 16k and 36k packed tokens, with and without checkpointing, within 15 % of "
        "`--dry-run`; 60 micro-batches of random lengths without growth",
        concerns=lambda config, gpus: True,
    ),
    NeverRun(
        what="vLLM on a GPU: compiled graphs, asynchronous scheduling, weights loaded under load",
        proof="one H100: a swap while 128 sequences run, every token of its version, mismatch_kl below 1e-3; "
        "tests/rollout/engines/vllm with CUDA",
        concerns=lambda config, gpus: config.rollout.engine == "vllm",
    ),
    NeverRun(
        what="the transformers engine on a GPU",
        proof="one H100: its log-probs beside the learner's, and the position at which it runs out of memory",
        concerns=lambda config, gpus: config.rollout.engine == "transformers",
    ),
    NeverRun(
        what="an engine and a learner rank on one GPU",
        proof="one H100: both load and train ten iterations; the engine is killed and comes back",
        concerns=lambda config, gpus: (
            gpus.count < config.rollout.num_actors * config.rollout.tensor_parallel + config.learner.num_ranks
            and not config.cluster.colocate
        ),
    ),
    NeverRun(
        what="an engine and a learner rank that have one GPU in turn: vLLM's sleep, the learner's memory on the host",
        proof="one H100: configs/gpu.yaml with cluster.colocate=true scheduler.lookahead=0 for ten iterations; what "
        "each leaves on the GPU while it sleeps, within 2 GiB; an engine killed while the learner trains comes back",
        concerns=lambda config, gpus: config.cluster.colocate,
    ),
    NeverRun(
        what="ranks over NCCL: sharding, hybrid sharding, the abort of a collective whose peer is gone",
        proof="two GPUs: tests/learner/test_ranks.py with CUDA; a rank killed within an iteration, the run resumed",
        concerns=lambda config, gpus: config.learner.num_ranks > 1,
    ),
    NeverRun(
        what="ranks that share rows (learner.context_parallel) over NCCL, with flash attention",
        proof="two GPUs: tests/learner/test_context.py with CUDA; a sequence of 128k tokens on two ranks",
        concerns=lambda config, gpus: config.learner.context_parallel > 1,
    ),
    NeverRun(
        what="tensor-parallel engines on GPUs",
        proof="two GPUs: tests/rollout/engines/vllm/test_weights.py with tensor_parallel 2",
        concerns=lambda config, gpus: config.rollout.tensor_parallel > 1,
    ),
    NeverRun(
        what="a cluster of real machines: NFS, network interfaces, a machine that dies",
        proof="two machines: configs/cluster.yaml for ten iterations, one machine switched off in between",
        concerns=lambda config, gpus: config.cluster.address != "local",
    ),
    NeverRun(
        what="an engine with quantized weights",
        proof="one H100: rollout.engine_args={quantization: fp8} for ten iterations, importance_ess_share above 0.9",
        concerns=lambda config, gpus: bool(lossy_arguments(config.rollout)),
    ),
)


def never_run(config: Config, gpus: Gpus | None) -> Iterator[str]:
    """What a settled configuration on these GPUs uses that was never run; nothing without GPUs."""
    if gpus is not None:
        found = [one.what for one in NEVER_RUN if one.concerns(config, gpus)]
        yield from (f"never run: {what}" for what in found)
