"""Held-out evaluation during a run: its own lease class, outside ledger and budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pmdflow.config.schema import Config
from pmdflow.data.prompts import PromptSource
from pmdflow.errors import WaitTimeout
from pmdflow.run.supervision import Supervisor
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import EvalResult
from pmdflow.store.client import call

FINISH_TIMEOUT_S = 600.0
APPLY_TIMEOUT_S = 60.0
"""A round begins when every rollout actor uses the newest version, or this much later."""


class HeldOut:
    """Admits the held-out prompts every few iterations and records each round when all of it is scored."""

    def __init__(self, *, config: Config, supervisor: Supervisor, prompts: PromptSource) -> None:
        """Use the first `eval.prompts` held-out prompts in every round."""
        self._config = config
        self._supervisor = supervisor
        self._store = supervisor.store
        self._prompts = prompts.held_out(config.eval.prompts)
        self._open: list[int] = []
        self._last = -1

    def start(self, iteration: int) -> None:
        """Forget unfinished rounds of an earlier process; evaluate the policy that a new run starts from."""
        self._drop("eval-")
        if iteration == 0:
            self._admit(0)

    def turn(self, iteration: int) -> None:
        """After an iteration: record finished rounds and begin one when it is due."""
        self._collect(timeout_s=0.0)
        if iteration % self._config.eval.every == 0 and iteration < self._config.run.iterations:
            self._admit(iteration)

    def finish(self, iteration: int) -> None:
        """Evaluate the final policy and wait for it."""
        if self._last != iteration:
            self._admit(iteration)
        self._wait_all()

    def _admit(self, iteration: int) -> None:
        if not self._prompts:
            return
        self._supervisor.await_applied(timeout_s=APPLY_TIMEOUT_S)
        batch = [(f"{_prefix(iteration)}{number}", None, prompt) for number, prompt in enumerate(self._prompts)]
        admitted = call(self._store, StoreActor.admit, batch, "eval", 1, self._config.data.max_tokens)
        self._supervisor.get(admitted, what="admitting evaluation")
        self._open.append(iteration)
        self._last = iteration

    def _wait_all(self) -> None:
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        while self._open and not self._supervisor.draining:
            self._collect(timeout_s=1.0)
            if time.monotonic() > deadline:
                raise WaitTimeout(f"evaluation rounds {self._open} were not scored within {FINISH_TIMEOUT_S:g} s")

    def _collect(self, *, timeout_s: float) -> None:
        for iteration in list(self._open):
            answer = call(self._store, StoreActor.eval_results, _prefix(iteration), timeout_s)
            results = self._supervisor.get(answer, what="the evaluation's results")
            if results is None:
                continue
            self._open.remove(iteration)
            self._drop(_prefix(iteration))
            self._supervisor.telemetry.evaluation({"eval/round": iteration, **summarize_round(results)})

    def _drop(self, prefix: str) -> None:
        self._supervisor.get(call(self._store, StoreActor.drop_eval, prefix), what="dropping an evaluation")


def summarize_round(results: Sequence[EvalResult]) -> dict[str, float | int | None]:
    """The `eval/*` metrics of one round.

    A trajectory whose scoring failed for good has no reward, and one whose environment never began has no version:
    both count as prompts and are left out of what they do not have, which is None if nobody has it.
    """
    rewards = [result.reward for result in results if result.reward is not None]
    return {
        "eval/reward_mean": float(np.mean(rewards)) if rewards else None,
        "eval/prompts": len(results),
        "eval/length_mean": float(np.mean([result.length for result in results])),
        "eval/first_version": min((r.first_version for r in results if r.first_version is not None), default=None),
        "eval/last_version": max((r.last_version for r in results if r.last_version is not None), default=None),
    }


def _prefix(iteration: int) -> str:
    return f"eval-{iteration:06d}-"
