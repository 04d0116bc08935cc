"""A reward subprocess: imports the rubric once, then scores what its parent sends, one item at a time.

Started by `pmdflow.reward.runner` as `python -m pmdflow.reward.worker FD PARENT_PID`. Over the socket FD, in
msgpack: the parent sends the reward section as JSON, then batches of encoded [completion, prompt, metadata]; this
side answers "" once (or why the rubric cannot be imported), then [outcome, reward, components, message] an item.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.rubric import Rubric, Scored, load_rubric

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def encode(value: Any) -> bytes:
    """Message to bytes; any `str` survives, also one with lone surrogates."""
    data: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return data


def decode(data: bytes) -> Any:
    """Undo `encode`."""
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)


def main() -> None:
    """Serve until the parent closes its end."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(parent)
    os.dup2(2, 1)  # what reward functions print goes to the actor's log
    config = RewardConfig.model_validate_json(decode(connection.recv_bytes()))
    try:
        rubric = load_rubric(config)
    except ValueError as error:
        connection.send_bytes(encode(str(error)))
        return
    connection.send_bytes(encode(""))
    try:
        while True:
            _score(connection, rubric)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _score(connection: Connection, rubric: Rubric) -> None:
    for item in decode(connection.recv_bytes()):
        completion, prompt, metadata = decode(item)
        scored: Scored = rubric(completion=completion, prompt=prompt, metadata=metadata)
        answer = [scored.outcome, scored.reward, dict(scored.components), scored.message]
        connection.send_bytes(encode(answer))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends: a busy function reads no EOF."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os._exit(1)


if __name__ == "__main__":
    main()
