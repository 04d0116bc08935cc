"""Scores completions in killable subprocesses, each item under a wall-clock limit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_readable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pmdflow.errors import PmdflowError, WaitTimeout
from pmdflow.reward.rubric import Scored, infra_failure
from pmdflow.reward.worker import decode, encode

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig

START_TIMEOUT_S = 120.0
"""Limit of one subprocess's start: interpreter, imports of the rubric."""
MAX_FAILED_STARTS = 3
"""Starts that may fail in a row before the runner gives up."""
BATCH = 64
"""Most items sent to one subprocess at a time."""
_TRANSFER_TIMEOUT_S = 10
"""Limit of one message over a socket; only a stopped process is that slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One completion to score."""

    completion: str
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


_IDLE_S = 60.0
"""Longest sleep of the idle thread; a submission wakes it at once."""

_Job = tuple[bytes, "Future[Scored]"]
"""An encoded item and what its caller waits for."""


class RewardRunner:
    """A pool of `workers` reward subprocesses that are killed and replaced when one item takes too long or crashes.

    One thread owns the subprocesses; any thread may submit. Items go out in batches and come back one by one, and
    each result restarts the clock of its subprocess, so the limit holds for each item while a batch costs one trip.
    What becomes of an item: the rubric's outcome, or `infra_failure` after a time-out or a crash; then the rest of
    its batch goes to another subprocess. Subprocesses have their own sessions, so what they started dies with them.

    Example:
        >>> from pmdflow.config.schema import RewardConfig
        >>> config = RewardConfig(functions=[{"function": "pmdflow.reward.reasoning_gym:score"}])
        >>> with RewardRunner(config) as runner:  # doctest: +SKIP
        ...     runner.map([ScoreItem(completion="answer: 3", prompt="1 + 2", metadata=metadata)])
    """

    def __init__(self, config: RewardConfig, *, start_timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the subprocesses and wait until each has imported the rubric.

        Raises:
            ValueError: the rubric cannot be imported; names the function and the cause.
            PmdflowError: a subprocess crashed or was not ready within `start_timeout_s`.
        """
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._closing = False
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._started: Future[None] = Future()
        self._wakeup, self._waker = socket.socketpair()
        # PR_SET_PDEATHSIG follows the starting thread, so one thread that lives as long as the runner starts them all.
        self._thread = threading.Thread(target=self._run, name="reward-runner", daemon=True)
        self._thread.start()
        try:
            self._started.result(timeout=start_timeout_s + 2 * _TRANSFER_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def submit(self, item: ScoreItem) -> Future[Scored]:
        """Queue one item; its future always completes: with its outcome, or with the error that ended the runner.

        Raises:
            TypeError: the metadata is not of plain types.
            PmdflowError: the runner has ended.
        """
        data = encode([item.completion, item.prompt, dict(item.metadata)])
        future: Future[Scored] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._lock:
            if self._error is not None:
                raise self._error
            self._jobs.append((data, future))
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
            self._thread.join(timeout=_TRANSFER_TIMEOUT_S)

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
            self._workers = [_Worker(self._config, self._start_timeout_s) for _ in range(self._config.workers)]
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
            jobs = [job for worker in self._workers for job in worker.jobs] + list(self._jobs)
            self._jobs.clear()
        for _, future in jobs:
            future.set_exception(error)
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
            failure = worker.receive(self._config.timeout_s)
            if failure is not None:
                self._workers[index] = self._replace(worker, failure)
            elif worker.ready and not was_ready:
                self._failed_starts = 0
        if all(worker.ready for worker in self._workers) and not self._started.done():
            self._started.set_result(None)

    def _feed(self, worker: _Worker) -> None:
        """Send the next batch to a subprocess that has finished its last one."""
        if not worker.ready or worker.jobs:
            return
        with self._lock:
            # Small shares while the queue is short, so that one slow item holds back few others.
            share = -(-len(self._jobs) // (2 * len(self._workers)))
            batch = [self._jobs.popleft() for _ in range(min(share, BATCH))]
        if batch:
            worker.score(batch, self._config.timeout_s)

    def _replace(self, worker: _Worker, failure: str) -> _Worker:
        """Kill a subprocess, charge the item it was at, put the others back at the head of the queue."""
        status = worker.kill()
        if not worker.ready:
            self._count_failed_start(f"{failure} ({status})")
        elif worker.jobs:
            _, future = worker.jobs.popleft()
            future.set_result(infra_failure(f"{failure} ({status})"))
        with self._lock:
            self._jobs.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        return _Worker(self._config, self._start_timeout_s)

    def _count_failed_start(self, failure: str) -> None:
        self._failed_starts += 1
        if not self._started.done() or self._failed_starts >= MAX_FAILED_STARTS:
            functions = ", ".join(entry.function for entry in self._config.functions)
            raise PmdflowError(f"a reward subprocess did not start: {failure} while it imported {functions}")


class _Worker:
    """One subprocess, from its start to its kill; used by the runner's thread only."""

    def __init__(self, config: RewardConfig, start_timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _TRANSFER_TIMEOUT_S, 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pmdflow.reward.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self.connection = Connection(ours.detach())
        self.jobs: deque[_Job] = deque()
        """Sent and not answered yet, in the order of the answers."""
        self.ready = False
        self.deadline: float | None = time.monotonic() + start_timeout_s
        """When the running item, or the start, has taken too long; monotonic seconds."""
        self._send(config.model_dump_json())

    def score(self, jobs: Sequence[_Job], timeout_s: float) -> None:
        """Send a batch to the idle subprocess."""
        self.jobs.extend(jobs)
        self._send([data for data, _ in jobs])
        self.deadline = time.monotonic() + timeout_s

    def receive(self, timeout_s: float) -> str | None:
        """Take every answer that has arrived; returns why the subprocess is unusable, if it is.

        Raises:
            ValueError: it could not import the rubric.
        """
        try:
            while self.connection.poll(0):
                self._take(decode(self.connection.recv_bytes()))
                self.deadline = time.monotonic() + timeout_s if self.jobs else None
        except (EOFError, OSError):
            return "the subprocess died"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return f"timed out after {timeout_s:g} s" if self.ready else "timed out"
        return None

    def kill(self) -> str:
        """Kill its whole session; returns how it ended."""
        if self._process.returncode is None:  # not reaped yet, so the id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.connection.close()
        try:
            status = self._process.wait(timeout=_TRANSFER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "still there after SIGKILL"
        return f"signal {-status}" if status < 0 else f"exit code {status}"

    def _take(self, answer: Any) -> None:
        if not self.ready:
            if answer:
                raise ValueError(answer)
            self.ready = True
            return
        outcome, reward, components, message = answer
        _, future = self.jobs.popleft()
        future.set_result(Scored(outcome=outcome, reward=reward, components=components, message=message))

    def _send(self, value: Any) -> None:
        # A dead or stopped subprocess shows as an end of file or as a passed deadline.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(encode(value))
