"""One reward subprocess as its parent sees it: what was sent, what came back, and when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from pmdflow.reward.item import decode, encode
from pmdflow.reward.rubric import Scored

if TYPE_CHECKING:
    from pmdflow.config.schema import RewardConfig
    from pmdflow.config.sources import RewardFunctionConfig

TRANSFER_TIMEOUT_S = 10
"""Limit of one message over a socket; only a stopped process is that slow."""
BATCH = 64
"""Most items that a subprocess holds at a time."""
GRACE_S = 2.0
"""A concurrent rubric ends late items itself, and is killed if it has not done so for this long."""


@dataclass(slots=True, kw_only=True)
class Job:
    """An item and what its caller waits for."""

    data: bytes
    """The encoded item."""
    future: Future[Scored]
    source: str
    """Whose own functions judge it; "" is `reward.functions`."""
    alone: bool = False
    """It was running beside others when their process died; by itself it shows whether it was the cause."""


class RewardProcess:
    """One subprocess, from its start to its kill; used by the runner's thread only.

    Its own session lets a kill reach what its reward functions started.
    """

    def __init__(
        self, config: RewardConfig, own: Mapping[str, Sequence[RewardFunctionConfig]], *, start_timeout_s: float
    ) -> None:
        """Start it; it is ready once it has said so."""
        self._timeout_s = config.timeout_s
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", TRANSFER_TIMEOUT_S, 0))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pmdflow.reward.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self.connection = Connection(ours.detach())
        self.jobs: dict[int, Job] = {}
        """Sent and not answered yet, in the order of sending."""
        self.ready = False
        self.inputs: frozenset[str] = frozenset()
        """What its rubric asks for, once it is ready."""
        self.is_concurrent = False
        """Whether it scores many items at once."""
        self._num_sent = 0
        self.deadline: float | None = time.monotonic() + start_timeout_s
        """When the start, or the next answer, has taken too long; monotonic seconds."""
        functions = {name: [entry.model_dump(mode="json") for entry in entries] for name, entries in own.items()}
        self._send([config.model_dump_json(), json.dumps(functions)])

    @property
    def pid(self) -> int:
        """Process id, and that of its session."""
        return self._process.pid

    @property
    def room(self) -> int:
        """Items that may be sent now: a rubric of plain functions works off what it has first."""
        if not self.ready or any(job.alone for job in self.jobs.values()):
            return 0
        return BATCH - len(self.jobs) if self.is_concurrent or not self.jobs else 0

    def score(self, jobs: Sequence[Job]) -> None:
        """Send a batch."""
        if not self.jobs:
            self.deadline = time.monotonic() + self._limit_s
        numbered = {self._num_sent + index: job for index, job in enumerate(jobs)}
        self._num_sent += len(jobs)
        self.jobs |= numbered
        self._send([[number, job.data] for number, job in numbered.items()])

    def receive(self) -> Iterator[tuple[Job, Scored]]:
        """Take every answer that has arrived.

        Raises:
            EOFError: it has died.
            ValueError: it could not import the rubric.
        """
        while self.connection.poll(0):
            answer = decode(self.connection.recv_bytes())
            if not self.ready:
                error, inputs, self.is_concurrent = answer
                if error:
                    raise ValueError(error)
                self.ready, self.inputs = True, frozenset(inputs)
            else:
                number, outcome, reward, components, message = answer
                yield (
                    self.jobs.pop(number),
                    Scored(outcome=outcome, reward=reward, components=components, message=message),
                )
            self.deadline = time.monotonic() + self._limit_s if self.jobs else None

    @property
    def overdue(self) -> str:
        """Why it must be killed, if it must."""
        if self.deadline is None or time.monotonic() < self.deadline:
            return ""
        return f"timed out after {self._timeout_s:g} s" if self.ready else "timed out"

    def kill(self) -> str:
        """Kill its whole session; returns how it ended."""
        if self._process.returncode is None:  # not reaped yet, so the id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.connection.close()
        try:
            status = self._process.wait(timeout=TRANSFER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "still there after SIGKILL"
        return f"signal {-status}" if status < 0 else f"exit code {status}"

    def running(self) -> list[Job]:
        """Those that may be why it died: all of a concurrent rubric's, else the one that it was at."""
        jobs = list(self.jobs.values())
        return jobs if self.is_concurrent else jobs[:1]

    @property
    def _limit_s(self) -> float:
        return self._timeout_s + (GRACE_S if self.is_concurrent else 0.0)

    def _send(self, value: object) -> None:
        # A dead or stopped subprocess shows as an end of file or as a passed deadline.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(encode(value))
