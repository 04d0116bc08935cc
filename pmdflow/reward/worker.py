"""A reward subprocess: imports the rubric once, then scores what its parent sends.

Started by `pmdflow.reward.process` as `python -m pmdflow.reward.worker FD PARENT_PID`. Over the socket FD, in msgpack:
the parent sends the reward section as JSON, then batches of [number, encoded item]; this side answers once why the
rubric cannot be imported ("" if it can), what it asks for and whether it is concurrent; then [number, outcome, reward,
components, message] an item. A rubric of plain functions scores one item at a time, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.item import decode, decode_inputs, encode
from pmdflow.reward.rubric import Rubric, Scored, infra_failure, load_rubric

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve until the parent closes its end."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(parent)
    os.dup2(2, 1)  # what reward functions print goes to the actor's log
    config = RewardConfig.model_validate_json(decode(connection.recv_bytes()))
    try:
        rubric = load_rubric(config)
    except ValueError as error:
        connection.send_bytes(encode([str(error), [], False]))
        return
    connection.send_bytes(encode(["", sorted(rubric.inputs), rubric.is_concurrent]))
    try:
        if rubric.is_concurrent:
            asyncio.run(_score_together(connection, rubric, config.timeout_s))
        else:
            _score_in_turn(connection, rubric, config.timeout_s)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _score_in_turn(connection: Connection, rubric: Rubric, timeout_s: float) -> None:
    """Score one item at a time; the parent kills this process when one takes too long."""
    while True:
        for number, item in decode(connection.recv_bytes()):
            _answer(connection, number, rubric(**decode_inputs(item), timeout_s=timeout_s))


async def _score_together(connection: Connection, rubric: Rubric, timeout_s: float) -> None:
    """Score every item from its arrival on, until the parent closes its end."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    running: set[asyncio.Task[None]] = set()

    async def score(number: int, item: bytes) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                scored = await rubric.score({**decode_inputs(item), "timeout_s": timeout_s})
        except TimeoutError:
            scored = infra_failure(f"timed out after {timeout_s:g} s")
        _answer(connection, number, scored)

    def receive() -> None:
        try:
            batch = decode(connection.recv_bytes())
        except (EOFError, OSError):
            loop.remove_reader(connection.fileno())
            closed.set_result(None)
            return
        for number, item in batch:
            task = loop.create_task(score(number, item))
            running.add(task)
            task.add_done_callback(running.discard)

    loop.add_reader(connection.fileno(), receive)
    await closed


def _answer(connection: Connection, number: int, scored: Scored) -> None:
    answer = [number, scored.outcome, scored.reward, dict(scored.components), scored.message]
    connection.send_bytes(encode(answer))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends: a busy function reads no EOF."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os._exit(1)


if __name__ == "__main__":
    main()
