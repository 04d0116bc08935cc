"""Held-out evaluation during a run: its own lease class, outside ledger and budget."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmdflow.config.schema import Config
from pmdflow.config.sources import EvalSetConfig
from pmdflow.data.mixture import MixedPrompts
from pmdflow.errors import WaitTimeout
from pmdflow.evaluate.results import pass_at_k
from pmdflow.run.supervision import Supervisor
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import EvalResult
from pmdflow.store.client import call
from pmdflow.types import Prompt

FINISH_TIMEOUT_S = 600.0
APPLY_TIMEOUT_S = 60.0
"""A round begins when every rollout actor uses the newest version, or this much later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Prompts that are answered together: the held-out ones of `data`, or one of `eval.sets`."""

    name: str
    """Key in `eval.sets`; empty for the held-out prompts of `data`."""
    prompts: Sequence[Prompt]
    settings: EvalSetConfig | None
    """None for the held-out prompts of `data`."""

    @property
    def samples(self) -> int:
        """Attempts at each prompt."""
        return 1 if self.settings is None else self.settings.samples

    def request_prefix(self, iteration: int) -> str:
        """What the request ids of a round begin with; no other round's do."""
        return f"eval-{iteration:06d}/{self.name}/" if self.name else f"eval-{iteration:06d}-"


class HeldOut:
    """Admits evaluation prompts every few iterations and records each set of a round when all of it is scored."""

    def __init__(self, *, config: Config, supervisor: Supervisor, prompts: MixedPrompts) -> None:
        """Use the first `eval.prompts` held-out prompts, and every set, in every round."""
        self._config = config
        self._supervisor = supervisor
        self._store = supervisor.store
        held_out = EvaluationSet(name="", prompts=prompts.held_out(config.eval.prompts), settings=None)
        named = [
            EvaluationSet(name=name, prompts=prompts.evaluation_set(name), settings=settings)
            for name, settings in config.eval.sets.items()
        ]
        self._sets = [given for given in (held_out, *named) if given.prompts]
        self._open: list[tuple[int, EvaluationSet]] = []
        """Iteration and set of what is not wholly scored."""
        self._last = -1

    def start(self, iteration: int) -> None:
        """Forget unfinished rounds of an earlier process; evaluate the policy that a new run starts from."""
        self._drop("eval-")
        if iteration == 0:
            self._admit(0)

    def turn(self, iteration: int) -> None:
        """After an iteration: record what is finished and begin a round when it is due."""
        self._collect(timeout_s=0.0)
        if iteration % self._config.eval.every == 0 and iteration < self._config.run.iterations:
            self._admit(iteration)

    def finish(self, iteration: int) -> None:
        """Evaluate the final policy and wait for it."""
        if self._last != iteration:
            self._admit(iteration)
        self._wait_all()

    def _admit(self, iteration: int) -> None:
        if self._sets:
            self._supervisor.await_applied(timeout_s=APPLY_TIMEOUT_S)
        for given in self._sets:
            prefix = given.request_prefix(iteration)
            batch = [(f"{prefix}{number}", None, prompt) for number, prompt in enumerate(given.prompts)]
            admitted = call(self._store, StoreActor.admit, batch, "eval", given.samples, self._config.data.max_tokens)
            self._supervisor.get(admitted, what="admitting evaluation")
            self._open.append((iteration, given))
        self._last = iteration

    def _wait_all(self) -> None:
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while self._open and not self._supervisor.draining:
            self._collect(timeout_s=1.0)
            if time.monotonic() > deadline:
                rounds = ", ".join(f"{given.name or 'held-out'} of iteration {number}" for number, given in self._open)
                raise WaitTimeout(f"evaluation ({rounds}) was not scored within {FINISH_TIMEOUT_S:g} s")

    def _collect(self, *, timeout_s: float) -> None:
        for iteration, given in list(self._open):
            answer = call(self._store, StoreActor.eval_results, given.request_prefix(iteration), timeout_s)
            results = self._supervisor.get(answer, what="the evaluation's results")
            if results is None:
                continue
            self._open.remove((iteration, given))
            self._drop(given.request_prefix(iteration))
            telemetry = self._supervisor.telemetry
            telemetry.evaluation({"eval/round": iteration, **summarize_round(results, given)})
            if problem := failures(results, given, iteration):
                telemetry.event("evaluation_failures", problem)

    def _drop(self, prefix: str) -> None:
        self._supervisor.get(call(self._store, StoreActor.drop_eval, prefix), what="dropping an evaluation")


def failures(results: Sequence[EvalResult], given: EvaluationSet, iteration: int) -> str:
    """What a round says of attempts that could not be scored; empty without any."""
    failed = sum(result.reward is None for result in results)
    if not failed:
        return ""
    what = f"evaluation set {given.name}" if given.name else "held-out evaluation"
    rest = "its reward is the mean of the others" if failed < len(results) else "it has no reward"
    return f"{what} of iteration {iteration}: {failed} of {len(results)} attempts were not scored; {rest}"


def summarize_round(results: Sequence[EvalResult], given: EvaluationSet) -> dict[str, float | int | str | None]:
    """The `eval/*` metrics of one set of a round; those of a named set are `eval/NAME/*`.

    An attempt whose scoring failed for good has no reward, and one whose environment never began has no version: both
    are left out of what they do not have, which is None if nobody has it. `failed` counts the former: a failure of the
    judge says nothing about the policy, so it is neither a 0 nor forgotten.
    """
    key = f"eval/{given.name}/" if given.name else "eval/"
    rewards: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.reward is not None:
            rewards[result.request_id].append(result.reward)
    values: dict[str, float | int | str | None] = {
        f"{key}reward_mean": float(np.mean([np.mean(own) for own in rewards.values()])) if rewards else None,
        f"{key}prompts": len(given.prompts),
        f"{key}failed": sum(result.reward is None for result in results),
        f"{key}length_mean": float(np.mean([result.length for result in results])),
        f"{key}first_version": min((r.first_version for r in results if r.first_version is not None), default=None),
        f"{key}last_version": max((r.last_version for r in results if r.last_version is not None), default=None),
    }
    if given.settings is None:
        return values
    for k in given.settings.k or [1 << power for power in range(given.samples.bit_length())]:
        passes = [
            pass_at_k(attempts=len(own), passed=sum(reward >= given.settings.pass_reward for reward in own), k=k)
            for own in rewards.values()
            if len(own) >= k
        ]
        values[f"{key}pass_at_{k}"] = float(np.mean(passes)) if passes else None
    return {"eval/set": given.name, **values}
