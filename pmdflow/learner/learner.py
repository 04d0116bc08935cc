"""The learner: one FSDP2 rank that trains on claims; `actor` puts it in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pmdflow.config.schema import Config
from pmdflow.learner.algorithms import find_algorithm
from pmdflow.learner.aside import Aside
from pmdflow.learner.assessment import Assessment, flat
from pmdflow.learner.batch import ReadTokens, StepPlan
from pmdflow.learner.checkpoint.files import AsyncSaver, load_training, training_state
from pmdflow.learner.checkpoint.manifest import CheckpointFile
from pmdflow.learner.context import Context, make_contexts
from pmdflow.learner.flops import Speed
from pmdflow.learner.fsdp import (
    all_ranks,
    build_policy,
    build_teacher,
    free_address,
    full_state_dict,
    gathered,
    join_ranks,
    learner_device,
    reshard,
)
from pmdflow.learner.policy import Policy
from pmdflow.learner.preparation import Parts, Ready, load_steps, needed_columns, plan_claim, prepare
from pmdflow.learner.probing import Prober
from pmdflow.learner.result import TrainResult
from pmdflow.learner.schedule import learning_rate
from pmdflow.learner.scorers.claim import ClaimScorers
from pmdflow.learner.scorers.teacher import require_teacher
from pmdflow.learner.selection import importance_metrics
from pmdflow.learner.steps import Supervised, Tensors, accumulate, update
from pmdflow.learner.sums import Sums, add_across
from pmdflow.learner.supervised import SupervisedData
from pmdflow.learner.view import State
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.reward.total import Memory
from pmdflow.types import Claim, Mask, TrainBatch
from pmdflow.weights.file import NamedTensors
from pmdflow.weights.probe import Probe
from pmdflow.weights.shares import Ranks

Answer = TypeVar("Answer")


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
            ValueError: `learner.algorithm` is not known, or has no such setting.
        """
        self._algorithm = find_algorithm(config.learner.algorithm)
        self._config = config.model_copy(update={"learner": self._algorithm.configured(config.learner)})
        self._rank = rank
        self._teacher: Policy | None = None
        self._scorers: ClaimScorers | None = None
        require_teacher(self._algorithm.needs, config.learner)
        self._state: State | None = None
        """Of an algorithm that keeps some."""
        self._memory: Memory = {}
        """Earlier claims by prompt, for group rewards that remember."""
        self._device = learner_device(rank)
        self._spans = SpanBuffer(f"learner-{rank}")
        self._aside = Aside()
        self._mesh: DeviceMesh | None = None
        self._context: Context | None = None
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
        if self._config.learner.context_parallel > 1:
            self._context, across = make_contexts(self._config.learner.context_parallel)
            add_across(across)
        self._build()

    def close(self) -> None:
        """Leave the process group, so that this process can join another."""
        if self._mesh is not None:
            self._saver.wait()
            self._mesh = self._context = None
            add_across(None)
            dist.destroy_process_group()

    def load_initial(self) -> None:
        """Go back to the weights of the model folder, with a fresh optimizer and schedule."""
        if not self._pristine:
            self._build()

    def train(self, batch: TrainBatch) -> TrainResult:
        """Take the iteration's optimizer steps on a claim that is here whole; as `train_claim`."""
        return self.train_claim(Claim.of(batch), self._read(batch))

    def train_claim(self, claim: Claim, read: ReadTokens) -> TrainResult:
        """Take the iteration's optimizer steps on one claim; each rank reads the tokens of its own trajectories alone.

        Raises:
            ValueError: a reward is not finite, or a trajectory does not fit `learner.tokens_per_microbatch`.
            PmdflowError: a gradient is not finite.
        """
        learner = self._config.learner
        sums = Sums(max_grad_norm=learner.max_grad_norm)
        started = time.perf_counter()
        ready = self._prepare(claim, read, sums, steps=learner.steps_per_iteration)
        self._take_steps(claim, ready, sums)
        self._state, self._memory = ready.given.state, ready.rewards.memory
        counts = claim.count(Mask.TRAINABLE)
        total = max(int(counts.sum()), 1)
        own = sums.metrics(clips=self._algorithm.clipped is not None, supervised=self._ptx is not None)
        shares = {f"learner/{reason}_share": int(counts[out].sum()) / total for reason, out in ready.left_out.items()}
        own |= importance_metrics(ready.weighed)
        return TrainResult(
            metrics={**own, **ready.rewards.metrics(), **shares, **ready.given.metrics, **ready.scored},
            speed=self._speed.metrics(claim, ready.plans, seconds=time.perf_counter() - started),
            left_out={reason: claim.trajectories[out].tolist() for reason, out in ready.left_out.items()},
            advantages=ready.given.advantages,
        )

    def assess(self, batch: TrainBatch) -> Assessment:
        """What the algorithm makes of a claim as one step, at the present weights, which it leaves as they are.

        Raises:
            ValueError: as `train_claim`, or there are several ranks.
        """
        if self._config.learner.num_ranks > 1:
            raise ValueError("a claim is assessed on one rank: set learner.ranks to 1")
        claim = replace(Claim.of(batch), plan=None)
        learned = self._scorers.state() if self._scorers else {}
        ready = self._prepare(claim, self._read(batch), Sums(max_grad_norm=1.0), steps=1)
        if self._scorers:
            self._scorers.load(learned)
        ((plan, micros, anchors),) = zip(ready.plans, ready.steps, ready.anchors, strict=True)
        loss = accumulate(
            self._policy, micros, anchors, supervised=None, algorithm=self._algorithm, config=self._config, plan=plan
        ).loss if plan.num_tokens else 0.0  # fmt: skip
        gradients = [parameter.grad for parameter in self._policy.parameters() if parameter.requires_grad]
        full = [gradient.full_tensor() for gradient in gradients if isinstance(gradient, DTensor)]
        gradient = flat([tensor.float().cpu().numpy() for tensor in full])
        self._optimizer.zero_grad()
        weights = [torch.zeros(0, dtype=torch.float64), *(micro.trained_weights().cpu() for micro in micros)]
        return Assessment(
            advantages=ready.given.advantages,
            weights=torch.cat(weights).numpy(),
            loss=loss,
            gradient=gradient,
            state=ready.given.state,
        )

    def adopt(self, config: Config, state: State | None = None) -> None:
        """Train the same weights by another algorithm and other settings of learner and reward from here on.

        Args:
            config: Of the same model, ranks, adapters and scorers.
            state: Of its algorithm; None is the first.

        Raises:
            ValueError: `learner.algorithm` is not known, or has no such setting.
        """
        self._algorithm = find_algorithm(config.learner.algorithm)
        self._config = config.model_copy(update={"learner": self._algorithm.configured(config.learner)})
        self._state = state if state is not None or self._algorithm.state is None else self._algorithm.state()

    @property
    def columns(self) -> frozenset[str]:
        """Extra columns of tokens that a claim has to be read with; scorers that run here give theirs later."""
        named = needed_columns(self._algorithm, self._config.learner)
        return named - (self._scorers.columns if self._scorers else frozenset())

    @property
    def state(self) -> State | None:
        """What the algorithm keeps; None if nothing."""
        return self._state

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, or the adapters alone, on the CPU in `model.dtype`, at rank 0; None elsewhere."""
        with self._spans.span("publish"):
            dtype, lora = self._config.model.dtype, self._config.learner.lora
            return full_state_dict(self._policy, dtype=dtype, rank=self._rank, lora=lora)

    def publish(self, write: Callable[[NamedTensors, Ranks], Answer]) -> Answer:
        """What `write` makes of all weights, or of the adapters alone, in `model.dtype`, with the other ranks.

        Each tensor is gathered on the learner's device when `write` comes to it. Every rank must call.
        """
        with self._spans.span("publish"):
            dtype, lora = self._config.model.dtype, self._config.learner.lora
            tensors = gathered(self._policy, dtype=dtype, lora=lora)
            try:
                return write(tensors, all_ranks(self._rank))
            finally:
                tensors.skip()  # the other ranks wait in the collectives of what is left

    def probe(self) -> Probe:
        """What an engine that has loaded the present weights gives for a few tokens. Every rank must call."""
        return self._prober.probe()

    def save(self, directory: str) -> None:
        """Copy weights, optimizer, schedule and random state, and begin to write them; any number of ranks can load.

        Returns once the copy is made: training may go on. The files are whole when `await_saved` returns.
        """
        with self._spans.span("checkpoint", directory=directory):
            kept = {"algorithm": self._state, "prompts": dict(self._memory)}
            scorers = self._scorers.state() if self._scorers else {}
            state = training_state(
                self._policy, self._optimizer, self._num_steps, kept if any(kept.values()) else None, scorers
            )
            self._saver.save(state, directory)

    def await_saved(self) -> tuple[CheckpointFile, ...]:
        """Wait for the files of the last `save`; safe beside `train`, and raises what went wrong in writing them.

        Returns:
            Those that this rank wrote, summed as they were.
        """
        return self._saver.wait()

    def load(self, directory: str) -> None:
        """Continue from a saved directory, bit for bit if the ranks are equally many."""
        with self._spans.span("checkpoint", directory=directory):
            self._saver.wait()
            self._build_state()
            self._num_steps, kept, scorers = load_training(self._policy, self._optimizer, directory)
            if self._scorers:
                self._scorers.load(scorers)
            if kept is not None:
                self._memory = kept["prompts"]
                self._state = self._state if kept["algorithm"] is None else kept["algorithm"]
            self._pristine = False

    def offload(self) -> None:
        """Put weights, moments and teacher on the host and give the device's memory back; `restore` undoes it.

        Until then nothing else may be called but `await_saved`, `drain` and `close`.
        """
        with self._spans.span("offload"):
            policies = [policy for policy in (self._policy, self._teacher) if policy is not None]
            kept: list[Tensor] = []
            for policy in policies:
                reshard(policy)
                kept += [*policy.parameters(), *policy.buffers()]
            kept += [value for state in self._optimizer.state.values() for value in state.values()]
            self._aside.put(tensor for tensor in kept if tensor.device.type == self._device.type)

    def restore(self) -> None:
        """Have everything on the device again, as it was."""
        with self._spans.span("offload"):
            self._aside.take_back()

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
        build = partial(build_policy, dtype=model.dtype, learner=learner, mesh=self._mesh, context=self._context)
        self._policy = build(model.path)
        if learner.teacher is not None and self._teacher is None:
            self._teacher = build_teacher(model.path, build=build, learner=learner)
        self._scorers = ClaimScorers(self._config, self._device)
        trained = [parameter for parameter in self._policy.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=learner.lr, betas=(0.9, 0.95), weight_decay=learner.weight_decay
        )
        self._speed = Speed.of(self._policy.model, config=self._config, device=self._device)
        self._num_steps = 0
        self._prober = Prober(self._policy, config=self._config, device=self._device)
        self._build_state()
        self._pristine = True

    def _read(self, batch: TrainBatch) -> ReadTokens:
        """Of the extra columns only those that the algorithm names."""
        return replace(batch, extra={name: own for name, own in batch.extra.items() if name in self.columns}).read

    def _build_state(self) -> None:
        self._state = None if self._algorithm.state is None else self._algorithm.state()
        self._memory = {}

    def _prepare(self, claim: Claim, read: ReadTokens, sums: Sums, *, steps: int) -> Ready:
        torch.set_num_threads(self._config.learner.threads)  # Also for this thread: it need not be the one of setup.
        assert self._scorers is not None, "setup comes first"
        parts = Parts(
            config=self._config,
            algorithm=self._algorithm,
            policy=self._policy,
            teacher=self._teacher,
            scorers=self._scorers,
            rank=self._rank,
            device=self._device,
            spans=self._spans,
            quadratic=self._speed.quadratic,
        )
        return prepare(parts, claim, read, sums, steps=steps, state=self._state, memory=self._memory)

    def _take_steps(self, claim: Claim, ready: Ready, sums: Sums) -> None:
        if self._config.learner.reset_optimizer:
            self._optimizer.state.clear()
        self._pristine = False
        parts = zip(ready.plans, ready.steps, ready.anchors, strict=True)
        for index, (plan, micros, anchors) in enumerate(parts):
            where = f"iteration {claim.iteration}, step {index + 1} of {len(ready.plans)}"
            with self._spans.span("step", iteration=claim.iteration, step=index, tokens=plan.num_tokens):
                self._step(plan, micros, anchors, sums, where)

    def _supervised(self) -> Supervised | None:
        """The supervised sequences of the next step, which its number selects."""
        if self._ptx is None:
            return None
        batch = self._ptx.batch(self._num_steps)
        claim = Claim.of(batch)
        learner = self._config.learner
        (plan,) = plan_claim(learner, claim, claim.count(Mask.TRAINED), steps=1, quadratic=self._speed.quadratic)
        ones = np.ones(len(claim.rewards))
        (micros,) = load_steps(learner, claim, batch.read, [plan], ones, rank=self._rank, device=self._device)
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
