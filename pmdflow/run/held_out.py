"""Held-out evaluation: its own lease class, outside ledger and budget."""

from __future__ import annotations

import time

import numpy as np

from pmdflow.config.schema import Config
from pmdflow.data.prompts import PromptSource
from pmdflow.errors import WaitTimeout
from pmdflow.run.supervision import Supervisor

FINISH_TIMEOUT_S = 600.0
APPLY_TIMEOUT_S = 60.0
"""A round begins when every rollout actor uses the newest version, or this much later."""


class Evaluation:
    """Admits the held-out prompts every few iterations and records each round when all of it is scored."""

    def __init__(self, *, config: Config, supervisor: Supervisor, prompts: PromptSource) -> None:
        """Use the first `eval.prompts` held-out prompts in every round."""
        self._config = config
        self._supervisor = supervisor
        self._prompts = prompts.held_out(config.eval.prompts)
        self._open: list[int] = []
        self._last = -1

    def start(self, iteration: int) -> None:
        """Forget unfinished rounds of an earlier process; evaluate the policy that a new run starts from."""
        self._supervisor.call(self._supervisor.store.drop_eval, "eval-", what="dropping old evaluations")
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
        batch = [(f"eval-{iteration:06d}-{number}", None, prompt) for number, prompt in enumerate(self._prompts)]
        self._supervisor.call(
            self._supervisor.store.admit, batch, "eval", 1, self._config.data.max_tokens, what="admitting evaluation"
        )
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
            prefix = f"eval-{iteration:06d}-"
            results = self._supervisor.call(
                self._supervisor.store.eval_results, prefix, timeout_s, what="the evaluation's results"
            )
            if results is None:
                continue
            self._open.remove(iteration)
            self._supervisor.call(self._supervisor.store.drop_eval, prefix, what="dropping an evaluation")
            values = {
                "eval/round": iteration,
                "eval/reward_mean": float(np.mean([result.reward for result in results if result.reward is not None])),
                "eval/prompts": len(results),
                "eval/length_mean": float(np.mean([result.length for result in results])),
                "eval/first_version": min(result.first_version for result in results),
                "eval/last_version": max(result.last_version for result in results),
            }
            self._supervisor.recorder.metric("eval", values)
            self._supervisor.live.evaluation(values)
