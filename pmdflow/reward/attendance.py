"""Attends a process: feeds it, takes what it says, and ends it at a limit."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Literal, Self

START_S = 30.0
"""What may pass before a process says that it begins: a busy machine is not its fault."""
END_S = 2.0
"""What a killed process, and all that it started, may take to end."""
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended."""

    how: Literal["exit", "signal", "timeout", "output"]
    """`timeout` is of wall or CPU time; `output` is too much of it."""
    status: int
    """Exit code or signal number; SIGKILL's where it was killed for a limit."""
    stdout: bytes
    stderr: bytes
    wall_s: float | None
    """Since it said that it begins; None if it never did."""


def attend(process: subprocess.Popen[bytes], stdin: bytes, *, begins: int, wall_s: float, output_bytes: int) -> Ended:
    """Wait for the end of a process that leads a session, or make it at a limit.

    A wrapper such as a shell reports the signal of its child as 128 + its number.

    Args:
        process: With pipes as its standard streams.
        stdin: What it reads.
        begins: A file descriptor; the process writes a byte to its other end when it begins, and closes it.
        wall_s: What it may take from then on; it has `START_S` to begin.
        output_bytes: Most of standard output, and of standard error.
    """
    with _Pipes(process, stdin, begins, output_bytes) as pipes:
        limit = pipes.serve(wall_s)
        took_s = None if pipes.began is None else time.monotonic() - pipes.began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left behind; not reaped, so the id is still its own
        code = process.wait(timeout=END_S)
        if not limit:
            pipes.drain(time.monotonic() + END_S)
    status = -code if code < 0 else code - 128 if code > 128 else 0
    how: Literal["exit", "signal", "timeout"] = "signal" if status else "exit"
    if status == signal.SIGXCPU:
        how = "timeout"
    return Ended(
        how=limit or how,
        status=status or code,
        stdout=bytes(pipes.said["stdout"]),
        stderr=bytes(pipes.said["stderr"]),
        wall_s=took_s,
    )


class _Pipes:
    """The standard streams of a process, none of which can block or outgrow its limit."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes, begins: int, limit: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.said = {"stdout": bytearray(), "stderr": bytearray()}
        self.began: float | None = None
        """When the process began, monotonic seconds."""
        self._stdin, self._limit = memoryview(stdin), limit
        self._files: list[IO[bytes]] = [process.stdin, process.stdout, process.stderr]
        for file in self._files:
            os.set_blocking(file.fileno(), False)
        self._end = os.pidfd_open(process.pid)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._end, selectors.EVENT_READ, "end")
        self._selector.register(begins, selectors.EVENT_READ, "begins")
        self._selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        self._selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        self._selector.register(process.stderr, selectors.EVENT_READ, "stderr")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        os.close(self._end)
        for file in self._files:
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def serve(self, wall_s: float) -> Literal["", "timeout", "output"]:
        """Until the process ends ("") or a limit is reached."""
        deadline = time.monotonic() + START_S
        while (left_s := deadline - time.monotonic()) > 0:
            ready = {key.data: key for key, _ in self._selector.select(left_s)}
            if "begins" in ready:
                self._selector.unregister(ready["begins"].fileobj)
                if os.read(ready["begins"].fd, 1):
                    self.began = time.monotonic()
                    deadline = self.began + wall_s
            if "stdin" in ready:
                self._write(ready["stdin"])
            if any(self._read(ready[name]) for name in self.said if name in ready):
                return "output"
            if "end" in ready:
                return ""
        return "timeout"

    def drain(self, deadline: float) -> None:
        """Take what is still in the pipes of a process that has ended."""
        for key in list(self._selector.get_map().values()):
            if key.data not in self.said:
                self._selector.unregister(key.fileobj)
        while self._selector.get_map() and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                if self._read(key):
                    return

    def _write(self, key: selectors.SelectorKey) -> None:
        try:
            self._stdin = self._stdin[os.write(key.fd, self._stdin[:_CHUNK]) :]
        except BrokenPipeError:
            self._stdin = memoryview(b"")
        if not self._stdin:
            self._selector.unregister(key.fileobj)
            self._files[0].close()

    def _read(self, key: selectors.SelectorKey) -> bool:
        """True when the stream has outgrown its limit."""
        data = os.read(key.fd, _CHUNK)
        if not data:
            self._selector.unregister(key.fileobj)
        said = self.said[key.data]
        said += data[: self._limit - len(said)]
        return len(said) >= self._limit
