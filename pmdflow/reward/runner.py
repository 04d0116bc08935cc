"""Scores completions in killable subprocesses, each item under a wall-clock limit."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from multiprocessing.connection import wait as wait_readable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pmdflow.config.sources import SOURCE_KEY
from pmdflow.errors import PmdflowError, WaitTimeout
from pmdflow.reward.failures import FailuresInARow
from pmdflow.reward.item import ScoreItem
from pmdflow.reward.process import BATCH, TRANSFER_TIMEOUT_S, Job, RewardProcess
from pmdflow.reward.rubric import Scored, infra_failure

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig
    from pmdflow.config.sources import RewardFunctionConfig

START_TIMEOUT_S = 120.0
"""Limit of one subprocess's start: interpreter, imports of the rubric."""
MAX_FAILED_STARTS = 3
"""Starts that may fail in a row before the runner gives up."""
_IDLE_S = 60.0
"""Longest sleep of the idle thread; a submission wakes it at once."""


class RewardRunner:
    """A pool of `workers` reward subprocesses that are killed and replaced when one item takes too long or crashes.

    One thread owns the subprocesses; any thread may submit. Items go out in batches and come back one by one, and
    each result restarts the clock of its subprocess, so the limit holds for each item while a batch costs one trip.
    What becomes of an item: the rubric's outcome, or `infra_failure` after a time-out or a crash that was its own: of
    plain functions, the item that was running; of coroutines and batched functions, which run many at once, each of
    them is scored again by itself, and only one that fails so is charged. Subprocesses have their own sessions, so what
    they started dies with them.

    Example:
        >>> from pmdflow.config.schema import RewardConfig
        >>> config = RewardConfig(functions=[{"function": "pmdflow.reward.reasoning_gym:score"}])
        >>> with RewardRunner(config) as runner:  # doctest: +SKIP
        ...     runner.map([ScoreItem(completion="answer: 3", prompt="1 + 2", metadata=metadata)])
    """

    def __init__(
        self,
        config: RewardConfig,
        own: Mapping[str, Sequence[RewardFunctionConfig]] | None = None,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Start the subprocesses and wait until each has imported the rubric.

        Args:
            config: The `reward` section.
            own: Functions of sources that have their own: `Config.own_rewards`.
            start_timeout_s: Limit of one subprocess's start.

        Raises:
            ValueError: the rubric cannot be imported; names the function and the cause.
            PmdflowError: a subprocess crashed or hung while it imported the rubric.
        """
        self._config = config
        self._own = own or {}
        self._start_timeout_s = start_timeout_s
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._closing = False
        self._failed_starts = 0
        self._failures = FailuresInARow(most=config.max_failures_in_a_row)
        self._workers: list[RewardProcess] = []
        self._started: Future[RewardProcess] = Future()
        self._wakeup, self._waker = socket.socketpair()
        # PR_SET_PDEATHSIG follows the starting thread, so one thread that lives as long as the runner starts them all.
        self._thread = threading.Thread(target=self._run, name="reward-runner", daemon=True)
        self._thread.start()
        try:
            first = self._started.result(timeout=start_timeout_s + 2 * TRANSFER_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.inputs = first.inputs
        """What the rubric asks for: keys of `pmdflow.reward.function.INPUTS`."""
        self.is_concurrent = first.is_concurrent
        """Whether each subprocess scores many items at once."""

    def submit(self, item: ScoreItem) -> Future[Scored]:
        """Queue one item; its future always completes: with its outcome, or with the error that ended the runner.

        Raises:
            TypeError: the metadata is not of plain types.
            PmdflowError: the runner has ended.
        """
        future: Future[Scored] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        source = item.metadata.get(SOURCE_KEY, "")
        job = Job(data=item.encode(), future=future, source=source if source in self._own else "")
        with self._lock:
            if self._error is not None:
                raise self._error
            self._jobs.append(job)
            if len(self._jobs) == 1:  # with more of them, the thread is awake or every subprocess busy
                self._waker.send(b"x")
        return future

    def map(self, items: Iterable[ScoreItem]) -> list[Scored]:
        """Score `items` and return the results in their order.

        Raises:
            WaitTimeout: longer than every queued item timing out in turn would take.
        """
        futures = [self.submit(item) for item in items]
        with self._lock:
            ahead = len(self._jobs) + BATCH * self._config.workers
        limit_s = ahead * (self._config.timeout_s + self._start_timeout_s)
        _, late = wait(futures, timeout=limit_s)
        if late:
            raise WaitTimeout(f"{len(late)} of {len(futures)} completions were not scored within {limit_s:g} s")
        return [future.result() for future in futures]

    def close(self) -> None:
        """Kill the subprocesses; items not scored yet fail. Safe to repeat."""
        with self._lock:
            if self._error is None and not self._closing:
                self._closing = True
                self._waker.send(b"x")
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=TRANSFER_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        """Own the subprocesses until `close` or an error that more attempts would not cure."""
        error: Exception = PmdflowError("the reward runner is closed")
        try:
            self._workers = [self._start() for _ in range(self._config.workers)]
            while not self._closing:
                self._turn()
        except Exception as caught:
            error = caught
        finally:
            self._end(error)

    def _end(self, error: Exception) -> None:
        for worker in self._workers:
            worker.kill()
        with self._lock:
            self._error = error
            self._wakeup.close()
            self._waker.close()
            jobs = [job for worker in self._workers for job in worker.jobs.values()] + list(self._jobs)
            self._jobs.clear()
        for job in jobs:
            job.future.set_exception(error)
        if not self._started.done():
            self._started.set_exception(error)

    def _turn(self) -> None:
        """Wait for a result, a submission or a deadline, and act on it."""
        for worker in self._workers:
            self._feed(worker)
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout_s = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else _IDLE_S
        readable = wait_readable([self._wakeup, *(worker.connection for worker in self._workers)], timeout=timeout_s)
        if self._wakeup in readable:
            self._wakeup.recv(4096)
        for index, worker in enumerate(self._workers):
            was_ready = worker.ready
            try:
                for job, scored in worker.receive():
                    self._finish(job, scored)
                failure = worker.overdue
            except (EOFError, OSError):
                failure = "the subprocess died"
            if failure:
                self._workers[index] = self._replace(worker, failure)
            elif worker.ready and not was_ready:
                self._failed_starts = 0
        if all(worker.ready for worker in self._workers) and not self._started.done():
            self._started.set_result(self._workers[0])

    def _feed(self, worker: RewardProcess) -> None:
        """Send the next batch to a subprocess that has room for it."""
        room = worker.room
        if not room:
            return
        with self._lock:
            # Small shares while the queue is short, so that one slow item holds back few others.
            share = -(-len(self._jobs) // (2 * len(self._workers)))
            batch: list[Job] = []
            while len(batch) < min(share, room) and not self._jobs[0].alone:
                batch.append(self._jobs.popleft())
            if self._jobs and self._jobs[0].alone and not batch and not worker.jobs:
                batch.append(self._jobs.popleft())
        if batch:
            worker.score(batch)

    def _finish(self, job: Job, scored: Scored) -> None:
        """Hand out an outcome.

        Raises:
            PmdflowError: it is one infra failure too many.
        """
        job.future.set_result(scored)
        self._failures.count(job.source, scored)

    def _replace(self, worker: RewardProcess, failure: str) -> RewardProcess:
        """Kill a subprocess, charge the item that it was at, put the others back at the head of the queue."""
        failure = f"{failure} ({worker.kill()})"
        if not worker.ready:
            self._count_failed_start(failure)
        running = worker.running()
        for job in running:
            job.alone = True
        with self._lock:
            self._jobs.extendleft(reversed([job for job in worker.jobs.values() if running != [job]]))
        worker.jobs.clear()
        if len(running) == 1:
            self._finish(running[0], infra_failure(failure))
        return self._start()

    def _start(self) -> RewardProcess:
        return RewardProcess(self._config, self._own, start_timeout_s=self._start_timeout_s)

    def _count_failed_start(self, failure: str) -> None:
        self._failed_starts += 1
        if not self._started.done() or self._failed_starts >= MAX_FAILED_STARTS:
            functions = ", ".join(entry.function for entry in self._config.functions)
            raise PmdflowError(f"a reward subprocess did not start: {failure} while it imported {functions}")
