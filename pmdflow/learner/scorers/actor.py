"""The scorer actor: complete trajectories in, columns of their tokens out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pmdflow.config.schema import Config
from pmdflow.learner.scorers.in_hand import InHand
from pmdflow.learner.scorers.make import make_scorer, score_trajectories
from pmdflow.learner.scorers.protocol import Column, TokenScorer
from pmdflow.metrics.report import ActorReport, Event
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.store.actor import StoreActor
from pmdflow.store.annotations import Unannotated
from pmdflow.store.client import StoreHandle, answer_unless, call

MOST_HELD = 16
"""Trajectories that are scored at a time."""
CAREFUL = 4
"""A process that follows one that died takes trajectories one by one for so many times `timeout_s`: by then all that
was in its hands was handed out again."""
FETCH_WAIT_S = 1.0
"""How long a request for trajectories stays parked in the store."""


class ScorerActor:
    """Runs a frozen scorer over complete trajectories. It owns nothing: what it loses is handed out again.

    Where there are several, each scores what the store hands it; of two answers the first one counts. One that follows
    a process that died takes trajectories one by one for a while: what its process dies with alone has failed.
    """

    def __init__(self, *, config: Config, name: str, index: int, store: StoreHandle, run_dir: str) -> None:
        """Load nothing yet; `name` is that of the scorer, `index` numbers its actors."""
        self._config, self._name, self._store = config, name, store
        self._in_hand = InHand(Path(run_dir) / "scorers" / f"{name}-{index}.json")
        self._spans = SpanBuffer(f"scorer-{name}-{index}")
        self._failures: list[str] = []
        self._stopping = threading.Event()

    def run(self) -> None:
        """Score until `stop`.

        Consumes: complete trajectories that this scorer has not seen. Produces: columns, once each. Waits for: a
        trajectory, `FETCH_WAIT_S` at a time. Unblocked by: a finished rollout.

        Raises:
            ValueError: the scorer cannot be made.
            WaitTimeout: the store does not answer.
        """
        import torch

        given = self._config.learner.scorers[self._name]
        torch.set_num_threads(given.threads)
        with self._spans.span("start"):
            device = torch.device("cuda" if given.gpus > 0 else "cpu")
            scorer = make_scorer(self._config, self._name, device=device)
        careful_until = self._judge_death(careful_s=CAREFUL * given.timeout_s)
        while not self._stopping.is_set():
            start = time.time()
            most = 1 if time.monotonic() < careful_until else MOST_HELD
            asked = call(self._store, StoreActor.unannotated, self._name, most, given.timeout_s, FETCH_WAIT_S)
            items = answer_unless(self._stopping, asked, whose="scorer") or []
            self._spans.add("wait_unscored", start, time.time())
            if items:
                self._score(scorer, items)

    def stop(self) -> None:
        """Let `run` return within seconds; what is being scored is handed out again later."""
        self._stopping.set()

    def drain(self) -> ActorReport:
        """What happened since the last call: spans `start`, `wait_unscored` and `score`, and one event of failures."""
        failures, self._failures = self._failures, []
        what = f"{self._name} failed on {len(failures)} trajectories; the first: {failures[0]}" if failures else ""
        events = [Event(kind="scoring_failed", message=what)] if failures else []
        return ActorReport(spans=self._spans.drain(), events=[*events, *self._spans.losses()])

    def _judge_death(self, *, careful_s: float) -> float:
        """Tell the store what the process before died with, if that was one; until when to take them one by one."""
        died_with = self._in_hand.died_with
        if len(died_with) == 1:
            self._failures.append(f"trajectory {min(died_with)}: the scorer's process died with it")
            told = call(self._store, StoreActor.annotate, self._name, {}, died_with)
            answer_unless(self._stopping, told, whose="scorer")
        self._in_hand.give()
        return time.monotonic() + (careful_s if died_with else 0.0)

    def _score(self, scorer: TokenScorer, items: Sequence[Unannotated]) -> None:
        read = sum(len(item.prompt) + len(history) for item in items for history, _ in item.branches())
        with self._spans.span("score", scorer=self._name, scored=len(items), tokens=read):
            self._in_hand.take({item.trajectory: item.attempt for item in items})
            columns, failed = self._try(scorer, items)
            told = call(self._store, StoreActor.annotate, self._name, columns, failed)
            answer_unless(self._stopping, told, whose="scorer")
            self._in_hand.give()

    def _try(
        self, scorer: TokenScorer, items: Sequence[Unannotated]
    ) -> tuple[dict[int, dict[str, Column]], dict[int, int]]:
        """Columns by trajectory, and the attempts of those that it fails on, which are found one by one."""
        try:
            found = score_trajectories(scorer, self._name, items)
            return {item.trajectory: own for item, own in zip(items, found, strict=True)}, {}
        except Exception as error:  # code of the user, or a model without room
            if len(items) == 1:
                self._failures.append(f"trajectory {items[0].trajectory}: {error}")
                return {}, {items[0].trajectory: items[0].attempt}
        columns: dict[int, dict[str, Column]] = {}
        failed: dict[int, int] = {}
        for item in items:
            own, attempts = self._try(scorer, [item])
            columns |= own
            failed |= attempts
        return columns, failed
