"""The learner: one FSDP2 rank that trains on claims; `actor` puts it in a process of its own."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pmdflow.config.schema import Config
from pmdflow.learner.algorithms import find_algorithm
from pmdflow.learner.batch import ReadTokens, StepPlan, pack_rank, plan_iteration
from pmdflow.learner.checkpoint.files import AsyncSaver, load_training, training_state
from pmdflow.learner.flops import Speed
from pmdflow.learner.fsdp import build_policy, free_address, full_state_dict, join_ranks, learner_device
from pmdflow.learner.mismatch import mismatch_by_age
from pmdflow.learner.policy import Policy
from pmdflow.learner.result import TrainResult
from pmdflow.learner.schedule import learning_rate
from pmdflow.learner.selection import Weighed, groups_left_out, importance_metrics, veto_sequences, weigh
from pmdflow.learner.steps import Supervised, Tensors, accumulate, mismatch_sums, reference_pass, update
from pmdflow.learner.sums import StepSums, Sums, added, over_ranks
from pmdflow.learner.supervised import SupervisedData
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.reward.total import total_rewards
from pmdflow.types import Claim, Float64, Int64, Mask, TrainBatch


class Learner:
    """One rank. Every rank makes the same calls in the same order; each waits for the others in its collectives.

    Example:
        >>> learner = Learner(config=config, rank=0)                # doctest: +SKIP
        >>> learner.setup(learner.address())                        # doctest: +SKIP
        >>> result = learner.train(batch)                           # doctest: +SKIP
        >>> learner.save("checkpoints/iteration-000001.tmp")        # doctest: +SKIP
        >>> learner.await_saved()                                   # doctest: +SKIP
    """

    def __init__(self, *, config: Config, rank: int) -> None:
        """Check the settings; nothing is loaded before `setup`.

        Raises:
            ValueError: `learner.algorithm` is not known.
        """
        self._config = config
        self._rank = rank
        self._algorithm = find_algorithm(config.learner.algorithm)
        self._device = learner_device(rank)
        self._spans = SpanBuffer(f"learner-{rank}")
        self._mesh: DeviceMesh | None = None
        self._saver: AsyncSaver
        self._policy: Policy
        self._speed: Speed
        self._optimizer: torch.optim.AdamW
        self._ptx: SupervisedData | None = None
        self._num_steps = 0
        self._pristine = False

    def address(self) -> str:
        """A free `host:port` of this machine, for `setup`."""
        return free_address("127.0.0.1")

    def setup(self, master: str) -> None:
        """Join the other ranks at `master` (`host:port` of rank 0) and load the initial weights.

        Raises:
            WaitTimeout: not all ranks joined in time.
            ValueError: the model cannot be read.
        """
        torch.set_num_threads(self._config.learner.threads)
        if self._device.type == "cpu":
            torch.use_deterministic_algorithms(True)
        ranks, replicas = self._config.learner.num_ranks, self._config.learner.replicas
        self._mesh = join_ranks(master, rank=self._rank, ranks=ranks, device=self._device, replicas=replicas)
        self._saver = AsyncSaver()
        self._build()

    def close(self) -> None:
        """Leave the process group, so that this process can join another."""
        if self._mesh is not None:
            self._saver.wait()
            self._mesh = None
            dist.destroy_process_group()

    def load_initial(self) -> None:
        """Go back to the weights of the model folder, with a fresh optimizer and schedule."""
        if not self._pristine:
            self._build()

    def train(self, batch: TrainBatch) -> TrainResult:
        """Take the iteration's optimizer steps on a claim that is here whole; as `train_claim`."""
        return self.train_claim(Claim.of(batch), batch.read)

    def train_claim(self, claim: Claim, read: ReadTokens) -> TrainResult:
        """Take the iteration's optimizer steps on one claim; each rank reads the tokens of its own trajectories alone.

        Raises:
            ValueError: a reward is not finite, or a trajectory does not fit `learner.tokens_per_microbatch`.
            PmdflowError: a gradient is not finite.
        """
        learner = self._config.learner
        sums = Sums(max_grad_norm=learner.max_grad_norm)
        started = time.perf_counter()
        torch.set_num_threads(learner.threads)  # Also for this thread: it need not be the one that ran setup.
        rewards = total_rewards(claim, self._config.reward)
        portions = claim.episode_shares()
        advantages, weights = self._values(claim, rewards.total)
        filtered = groups_left_out(claim, rewards.task, learner)
        counts = claim.count(Mask.TRAINABLE)
        kept = np.where(filtered, 0, counts)
        plans = self._plan(claim, kept, steps=learner.steps_per_iteration)
        steps = self._load(claim, read, plans, advantages, weights)
        anchors = self._anchors(claim, steps, sums)
        vetoed = np.zeros_like(filtered)
        weighed: list[Weighed] = []
        if learner.veto:
            plans, steps, vetoed = veto_sequences(plans, steps, anchors, kept, portions, self._device)
        if learner.importance_weights != "none":
            pairs = [weigh(micros, own, learner, self._device) for micros, own in zip(steps, anchors, strict=True)]
            steps, weighed = [micros for micros, _ in pairs], [total for _, total in pairs]
        self._take_steps(claim, plans, steps, anchors, sums)
        left_out = {"filter": filtered, "veto": vetoed}
        total = max(int(counts.sum()), 1)
        own = sums.metrics(clips=self._algorithm.clipped is not None, supervised=self._ptx is not None)
        shares = {f"learner/{reason}_share": int(counts[out].sum()) / total for reason, out in left_out.items()}
        return TrainResult(
            metrics={**own, **importance_metrics(weighed), **rewards.metrics(), **shares},
            speed=self._speed.metrics(claim, plans, seconds=time.perf_counter() - started),
            left_out={reason: claim.trajectories[out].tolist() for reason, out in left_out.items()},
            advantages=advantages,
        )

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, or the adapters alone, on the CPU in `model.dtype`, at rank 0; None elsewhere."""
        with self._spans.span("publish"):
            dtype, lora = self._config.model.dtype, self._config.learner.lora
            return full_state_dict(self._policy, dtype=dtype, rank=self._rank, lora=lora)

    def save(self, directory: str) -> None:
        """Copy weights, optimizer, schedule and random state, and begin to write them; any number of ranks can load.

        Returns once the copy is made: training may go on. The files are whole when `await_saved` returns.
        """
        with self._spans.span("checkpoint", directory=directory):
            self._saver.save(training_state(self._policy, self._optimizer, self._num_steps), directory)

    def await_saved(self) -> None:
        """Wait for the files of the last `save`; safe beside `train`, and raises what went wrong in writing them."""
        self._saver.wait()

    def load(self, directory: str) -> None:
        """Continue from a saved directory, bit for bit if the ranks are equally many."""
        with self._spans.span("checkpoint", directory=directory):
            self._saver.wait()
            self._num_steps = load_training(self._policy, self._optimizer, directory)
            self._pristine = False

    def drain(self) -> ActorReport:
        """The spans since the last call; safe beside `train`."""
        return ActorReport(spans=self._spans.drain(), events=self._spans.losses())

    def device_info(self) -> dict[str, Any]:
        """What bitwise equality of a replay depends on."""
        cuda = self._device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "dtype": self._config.model.dtype,
            "threads": self._config.learner.threads,
            "torch": torch.__version__,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def _build(self) -> None:
        assert self._mesh is not None, "setup comes first"
        learner = self._config.learner
        torch.manual_seed(self._config.run.seed)
        self._ptx = SupervisedData.of(self._config)
        model = self._config.model
        self._policy = build_policy(model.path, dtype=model.dtype, learner=learner, mesh=self._mesh)
        trained = [parameter for parameter in self._policy.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=learner.lr, betas=(0.9, 0.95), weight_decay=learner.weight_decay
        )
        self._speed = Speed.of(self._policy.model, config=self._config, device=self._device)
        self._num_steps = 0
        self._pristine = True

    def _plan(self, claim: Claim, counts: Int64, *, steps: int) -> list[StepPlan]:
        learner = self._config.learner
        return plan_iteration(
            claim,
            counts=counts,
            steps=steps,
            ranks=learner.num_ranks,
            tokens_per_microbatch=learner.tokens_per_microbatch,
            packing=learner.packing,
            quadratic=self._speed.quadratic,
        )

    def _values(self, claim: Claim, rewards: Float64) -> tuple[Float64, Float64]:
        """The advantage of each trajectory, which is its episode's, and its weight, a share of the episode's [N]."""
        first, episode, weights = claim.first_branches(), claim.episode_of(), claim.episode_shares()
        arguments = (rewards[first], claim.groups[first], self._config.learner)
        if self._algorithm.weights is not None:
            weights = weights * self._algorithm.weights(*arguments)[episode]
        return self._algorithm.advantages(*arguments)[episode], weights

    def _load(
        self, claim: Claim, read: ReadTokens, plans: list[StepPlan], advantages: Float64, weights: Float64
    ) -> list[list[Tensors]]:
        steps = pack_rank(claim, read, plans, rank=self._rank, packing=self._config.learner.packing)
        values = {"advantages": advantages, "weights": weights}
        return [
            [Tensors.of(micro, **values, version=claim.version, device=self._device) for micro in micros]
            for micros in steps
        ]

    def _anchors(self, claim: Claim, steps: list[list[Tensors]], sums: Sums) -> list[list[Tensor]]:
        """The log-probs to compare with; log pi_i of the whole claim is computed before the first step."""
        if self._config.learner.anchor == "behavior":
            return [[micro.behavior for micro in micros] for micros in steps]
        with self._spans.span("reference", iteration=claim.iteration):
            anchors = [reference_pass(self._policy, micros) for micros in steps]
            pairs = zip(chain(*steps), chain(*anchors), strict=True)
            sums.mismatch = over_ranks(added(StepSums, (mismatch_sums(*pair) for pair in pairs)), self._device)
            sums.by_age = mismatch_by_age(zip(chain(*steps), chain(*anchors), strict=True), self._device)
        return anchors

    def _take_steps(
        self,
        claim: Claim,
        plans: list[StepPlan],
        steps: list[list[Tensors]],
        anchors: list[list[Tensor]],
        sums: Sums,
    ) -> None:
        if self._config.learner.reset_optimizer:
            self._optimizer.state.clear()
        self._pristine = False
        for index, (plan, micros) in enumerate(zip(plans, steps, strict=True)):
            where = f"iteration {claim.iteration}, step {index + 1} of {len(plans)}"
            with self._spans.span("step", iteration=claim.iteration, step=index, tokens=plan.num_tokens):
                self._step(plan, micros, anchors[index], sums, where)

    def _supervised(self) -> Supervised | None:
        """The supervised sequences of the next step, which its number selects."""
        if self._ptx is None:
            return None
        batch = self._ptx.batch(self._num_steps)
        claim = Claim.of(batch)
        (plan,) = self._plan(claim, claim.count(Mask.TRAINED), steps=1)
        ones = np.ones(len(claim.rewards))
        (micros,) = self._load(claim, batch.read, [plan], ones, ones)
        return Supervised(micros=micros, num_sequences=plan.num_sequences)

    def _step(self, plan: StepPlan, micros: list[Tensors], anchors: list[Tensor], sums: Sums, where: str) -> None:
        """One optimizer step, or none: AdamW moves weights even on zero gradients."""
        if plan.num_tokens == 0:
            sums.skip()
            return
        learner = self._config.learner
        since_reset = len(sums.grad_norms)
        sums.lr = learning_rate(learner, steps_taken=self._num_steps, steps_since_reset=since_reset)
        for group in self._optimizer.param_groups:
            group["lr"] = sums.lr
        step = accumulate(
            self._policy,
            micros,
            anchors,
            supervised=self._supervised(),
            algorithm=self._algorithm,
            config=self._config,
            plan=plan,
        )
        norm = update(self._policy, self._optimizer, step, max_grad_norm=learner.max_grad_norm, where=where)
        sums.add(step, norm=norm, tokens=plan.num_tokens)
        self._num_steps += 1
