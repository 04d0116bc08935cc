"""A reward subprocess: imports the rubric once, then scores what its parent sends.

Started by `pmdflow.reward.process` as `python -m pmdflow.reward.worker FD PARENT_PID`. Over the socket FD, in msgpack:
the parent sends the reward section and the sources' own functions as JSON, then batches of [number, encoded item];
this side answers once why a rubric cannot be imported ("" if all can), what they ask for and whether they are
concurrent; then [number, outcome, reward, components, message] an item. Rubrics of plain functions score one item at a
time, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

from pydantic import TypeAdapter

from pmdflow.config.schema import RewardConfig
from pmdflow.config.sources import RewardFunctionConfig
from pmdflow.reward.item import decode, decode_inputs, encode
from pmdflow.reward.rubric import Rubrics, Scored, infra_failure, load_rubrics

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve until the parent closes its end."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(parent)
    os.dup2(2, 1)  # what reward functions print goes to the actor's log
    reward, own = decode(connection.recv_bytes())
    config = RewardConfig.model_validate_json(reward)
    try:
        rubrics = load_rubrics(config, TypeAdapter(dict[str, list[RewardFunctionConfig]]).validate_json(own))
    except ValueError as error:
        connection.send_bytes(encode([str(error), [], False]))
        return
    connection.send_bytes(encode(["", sorted(rubrics.inputs), rubrics.is_concurrent]))
    try:
        if rubrics.is_concurrent:
            asyncio.run(_score_together(connection, rubrics, config.timeout_s))
        else:
            _score_in_turn(connection, rubrics, config.timeout_s)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _score_in_turn(connection: Connection, rubrics: Rubrics, timeout_s: float) -> None:
    """Score one item at a time; the parent kills this process when one takes too long."""
    while True:
        for number, item in decode(connection.recv_bytes()):
            inputs = decode_inputs(item)
            _answer(connection, number, rubrics.of(inputs["metadata"])(**inputs, timeout_s=timeout_s))


async def _score_together(connection: Connection, rubrics: Rubrics, timeout_s: float) -> None:
    """Score every item from its arrival on, until the parent closes its end."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    running: set[asyncio.Task[None]] = set()

    async def score(number: int, item: bytes) -> None:
        inputs = {**decode_inputs(item), "timeout_s": timeout_s}
        try:
            async with asyncio.timeout(timeout_s):
                scored = await rubrics.of(inputs["metadata"]).score(inputs)
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
