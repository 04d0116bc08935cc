"""Keeps one program: runs it in a folder of its own, and ends with it everything that it started.

It is started as a text by a bare interpreter, so it imports nothing but the standard library. The first line of its
standard input is the job in JSON, `{"argv", "env", "task", "work", "reward", "log", "log_bytes", "hidden"}`; the end of
its input is the order to kill, so the death of whoever started it is one too. Its last word is a line of JSON,
`{"status"}`; where nobody hears it, it removes the file `reward`. A job may have `walls`, `{"job", "gateway", "user"}`:
`argv` then begins a sandbox, which gets `job` first and sends a socket, and who connects to that speaks to the gateway.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_FIRST_USER = 2_000_000_000
"""Above every user id that is given out."""
_CONNECTIONS = 64
"""Of one sandbox at a time; more wait."""
_END_S = 5.0
"""Time in which killed processes end."""


def main() -> None:
    """Run the job of standard input to its end, or to the end of the input."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    job: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    os.makedirs(job["work"], exist_ok=True)
    status = None
    try:
        with open(job["log"], "ab", buffering=0) as file:
            log = _Log(file, job["log_bytes"], job["hidden"].encode())
            status = _sandboxed(job, log) if "walls" in job else _attend(_start(job), job["task"].encode(), log)
    except OSError as error:
        _say({"error": str(error)})
    finally:
        _kill_all()
        shutil.rmtree(job["work"], ignore_errors=True)
    heard = status is not None
    try:
        _say({"status": status})
    except BrokenPipeError:
        heard = False
        sys.stdout = sys.stderr  # the interpreter flushes it at its end
    if not heard:
        with contextlib.suppress(OSError):
            os.unlink(job["reward"])


def _start(job: dict[str, Any], *more: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        [*job["argv"], *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=job["work"],
        env=job["env"],
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )


def _sandboxed(job: dict[str, Any], log: _Log) -> int | None:
    """Run it behind walls; its own user id is that of no other living process."""
    walls = job["walls"]
    user = _FIRST_USER + os.getpid() if walls["user"] else 0
    os.close(os.open(job["reward"], os.O_CREAT | os.O_WRONLY, 0o600))
    if user:
        os.chown(job["reward"], user, -1)
    ours, theirs = socket.socketpair()
    with theirs:
        process = _start(job, str(theirs.fileno()), str(user), pass_fds=(theirs.fileno(),))
    threading.Thread(target=_serve, args=(ours, tuple(walls["gateway"])), daemon=True).start()
    begin = walls["job"].encode()
    status = _attend(process, b"%010d" % len(begin) + begin + job["task"].encode(), log)
    return 128 - status if status is not None and 128 < status <= 192 else status  # as a shell tells a signal


def _serve(inside: socket.socket, gateway: tuple[str, int]) -> None:
    """Answer at the socket that listens inside the sandbox, for the gateway."""
    word, sockets, _, _ = socket.recv_fds(inside, 1, 1)
    if not word:
        return
    listener, room = socket.socket(fileno=sockets[0]), threading.Semaphore(_CONNECTIONS)
    while room.acquire():
        threading.Thread(target=_relay, args=(listener.accept()[0], gateway, room), daemon=True).start()


def _relay(program: socket.socket, gateway: tuple[str, int], room: threading.Semaphore) -> None:
    """Carry one connection; it ends with either side, so that a gateway that dies is seen to."""
    with program, contextlib.suppress(OSError), socket.create_connection(gateway) as far:
        sides = {program: far, far: program}
        while sides:
            for side in select.select(list(sides), [], [])[0]:
                data = side.recv(1 << 16)
                if data:
                    sides[side].sendall(data)
                elif side is far:
                    sides = {}
                    break
                else:
                    del sides[side]
                    far.shutdown(socket.SHUT_WR)
    room.release()


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class _Log:
    """The first bytes of what a program says, without its key."""

    def __init__(self, file: Any, room: int, hidden: bytes) -> None:
        self._file, self._room, self._hidden, self._held = file, room, hidden, b""

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Keep more of it; what may be the beginning of the key waits for the rest, or for the `last` call."""
        data, key = self._held + data, self._hidden
        if key:
            data = data.replace(key, b"OPENAI_API_KEY")
        begun = 0 if last else next((n for n in range(len(key) - 1, 0, -1) if data.endswith(key[:n])), 0)
        data, self._held = data[: len(data) - begun], data[len(data) - begun :]
        self._file.write(data[: self._room])
        self._room = max(self._room - len(data), 0)


def _attend(process: subprocess.Popen[bytes], task: bytes, log: _Log) -> int | None:
    """Feed it and keep what it says until it ends; None if it is to be killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    ended = os.pidfd_open(process.pid)
    said, order, into = process.stdout.fileno(), sys.stdin.fileno(), process.stdin.fileno()
    os.set_blocking(into, False)
    reading, writing = {ended, said, order}, {into} if task else set()
    while True:
        ready, free, _ = select.select(reading, writing, [])
        if free:
            with contextlib.suppress(BrokenPipeError):
                task = task[os.write(into, task) :]
        if writing and (not task or process.poll() is not None):
            process.stdin.close()
            writing = set()
        if said in ready:
            data = os.read(said, 1 << 16)
            if not data:
                reading.discard(said)
            log.write(data)
        if order in ready and not os.read(order, 1 << 16):
            return None
        if ended in ready:
            os.set_blocking(said, False)
            with contextlib.suppress(BlockingIOError):
                log.write(os.read(said, 1 << 20))
            log.write(b"", last=True)
            return process.wait()


def _kill_all() -> None:
    """Kill every descendant: what loses its parent becomes a child of this process."""
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


if __name__ == "__main__":
    main()
