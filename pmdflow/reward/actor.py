"""The reward actor: complete trajectories in, scores out."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from pmdflow.config.schema import Config
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.reward.item import ScoreItem, decode_text
from pmdflow.reward.process import BATCH
from pmdflow.reward.rubric import Scored
from pmdflow.reward.runner import RewardRunner
from pmdflow.store.actor import StoreActor
from pmdflow.store.client import StoreHandle, answer_unless, call
from pmdflow.types import Unscored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_IN_TURN = 2
"""Trajectories held for each subprocess that scores one at a time: the other waits at most `reward.timeout_s`."""
FETCH_WAIT_S = 1.0
"""How long a request for trajectories stays parked in the store while nothing is in flight."""
RESULT_WAIT_S = 0.25
"""Scores are written at least this often while others are still being made."""
TTL_MARGIN_S = 5.0
"""Beyond the time-outs of those held, when the store hands a trajectory out again; known ones are then ignored."""
NUM_MESSAGES = 3
"""Messages kept of the failures of one span."""

_Key = tuple[int, int]
"""Trajectory and attempt."""


class RewardActor:
    """Scores complete trajectories in killable subprocesses. It owns nothing: what it loses is handed out again.

    Where there are several, each scores what the store hands it; of two answers to one attempt the first one counts.
    """

    def __init__(self, *, config: Config, index: int, store: StoreHandle) -> None:
        """Start nothing yet; `index` numbers the reward actors."""
        self._config = config
        self._store = store
        self._spans = SpanBuffer(f"reward-{index}")
        self._failures: list[str] = []
        """Messages of infra failures since the last report."""
        self._in_flight: dict[_Key, Future[Scored]] = {}
        self._stopping = threading.Event()

    def run(self) -> None:
        """Score until `stop`.

        Consumes: complete trajectories without a score. Produces: scores, one an attempt. Waits for: a trajectory,
        `FETCH_WAIT_S` at a time, or a result, `RESULT_WAIT_S` at a time. Unblocked by: a finished rollout, a result
        or a time-out of a reward subprocess.

        Raises:
            ValueError: the rubric or the tokenizer cannot be loaded.
            PmdflowError: reward subprocesses do not start, only failures come of them, or the store does not answer.
        """
        tokenizer = load_tokenizer(self._config.model.path)
        with self._spans.span("start"):
            runner = RewardRunner(self._config.reward, self._config.own_rewards)
        with runner:
            while not self._stopping.is_set():
                self._fetch(runner, tokenizer)
                if self._in_flight:
                    self._write()

    def stop(self) -> None:
        """Let `run` return within seconds; what is being scored is handed out again later."""
        self._stopping.set()

    def drain(self) -> ActorReport:
        """What happened since the last call: spans `start`, `wait_unscored` and `score`, and one event of failures.

        `score` has the attributes `scored`, `invalid` and `infra_failure` (counts) and, after infra failures,
        `messages`.
        """
        failures, self._failures = self._failures, []
        what = f"failed scorings: {len(failures)}; the first: {failures[0]}" if failures else ""
        events = [Event(kind="scoring_failed", message=what)] if failures else []
        return ActorReport(spans=self._spans.drain(), events=[*events, *self._spans.losses()])

    def _fetch(self, runner: RewardRunner, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take as many trajectories as there is room for; waits for the first one only if nothing is in flight."""
        each = BATCH if runner.is_concurrent else HELD_IN_TURN
        room = each * self._config.reward.workers - len(self._in_flight)
        if room <= 0:
            return
        start = time.time()
        ttl_s = HELD_IN_TURN * self._config.reward.timeout_s + TTL_MARGIN_S
        wait_s = 0.0 if self._in_flight else FETCH_WAIT_S
        asked = call(self._store, StoreActor.unscored, room, ttl_s, wait_s)
        items = answer_unless(self._stopping, asked, whose="reward") or []
        if not self._in_flight:
            self._spans.add("wait_unscored", start, time.time())
        for item in items:
            key = (item.trajectory, item.attempt)
            if key not in self._in_flight:
                self._in_flight[key] = runner.submit(_score_item(item, tokenizer, runner))

    def _write(self) -> None:
        """Wait a little for results, and write those that are there."""
        start = time.time()
        wait(self._in_flight.values(), timeout=RESULT_WAIT_S)
        done = {key: future.result() for key, future in self._in_flight.items() if future.done()}
        if done:
            scores = [(*key, scored.outcome, scored.reward, dict(scored.components)) for key, scored in done.items()]
            answer_unless(self._stopping, call(self._store, StoreActor.score, scores), whose="reward")
        for key in done:
            del self._in_flight[key]
        failures = [scored.message for scored in done.values() if scored.outcome == "infra_failure"]
        self._failures += failures
        attrs: dict[str, Any] = dict(Counter(scored.outcome for scored in done.values()))
        if failures:
            attrs["messages"] = failures[-NUM_MESSAGES:]
        self._spans.add("score", start, time.time(), **attrs)


def _score_item(item: Unscored, tokenizer: PreTrainedTokenizerBase, runner: RewardRunner) -> ScoreItem:
    return ScoreItem.of_tokens(
        item.tokens.tolist(),
        tokenizer=tokenizer,
        inputs=runner.inputs,
        prompt=item.text if item.text is not None else decode_text(tokenizer, item.prompt.tolist()),
        stop=item.stop.name.lower(),
        metadata=item.metadata,
        rewards=item.rewards,
    )
