"""One agent program: a process of its own, killed with all that it started at its deadline or when nobody wants it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmdflow.agents.remains import kill_marked, take_reward
from pmdflow.agents.sandbox import Walls

KEEPER = Path(__file__).with_name("keeper.py").read_text()
LOG_BYTES = 1 << 20
"""Most of a program's output that is kept."""
END_S = 10.0
"""What its keeper may take to kill it."""
_REWARD = "PMDFLOW_REWARD_FILE"
"""Variable with the name of a file; what the program leaves there is its reward."""
_TAIL = 300


@dataclass(slots=True, kw_only=True)
class Program:
    """A program from its start to its end.

    Example:
        >>> program = Program.start(["true"], env={}, task={}, work=Path("w"), log=Path("l"), timeout_s=9)
        >>> program.ended.result()  # what went wrong; nothing did
        ''
    """

    keeper: subprocess.Popen[bytes] | None
    """None: it could not be started."""
    work: Path
    log: Path
    rewards: dict[str, float] = field(default_factory=dict, init=False)
    """What it left in its file, once it has ended."""
    ended: Future[str] = field(default_factory=Future, init=False)
    """What went wrong: "" where it ended by itself, with exit code 0."""
    died: bool = field(default=False, init=False)
    """It was killed, by nobody here: another one may do better. Set before it has ended."""
    _killed: bool = field(default=False, init=False)
    _late: bool = field(default=False, init=False)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        task: Mapping[str, Any],
        work: Path,
        log: Path,
        timeout_s: float,
        walls: Walls | None = None,
    ) -> Program:
        """Start a program.

        Args:
            argv: The program and its arguments.
            env: Variables besides those of this process.
            task: What it finds as JSON on its standard input.
            work: Its working directory, made for it and removed afterwards.
            log: File that its output is appended to.
            timeout_s: Its deadline.
            walls: Around it. Then it has no variables of this process, and its working directory is its own `/tmp`.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        reward, path = work.with_name(f"{work.name}.reward"), [folder or os.getcwd() for folder in sys.path]
        full = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **env, _REWARD: str(reward)}
        job = {"argv": list(argv), "env": full, "task": json.dumps(task), "work": str(work), "log": str(log)}
        job |= {"reward": str(reward), "hidden": env.get("OPENAI_API_KEY", "")}
        if walls is not None:
            job |= walls.job(argv, env=env, reward=reward, timeout_s=timeout_s, path=path)
            job["env"] = {"PATH": os.environ.get("PATH", os.defpath), _REWARD: str(reward)}
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        program = cls(keeper=keeper, work=work, log=log)
        order = json.dumps({**job, "log_bytes": LOG_BYTES}).encode() + b"\n"
        threading.Thread(target=program._watch, args=(order, reward, timeout_s), daemon=True).start()
        return program

    @classmethod
    def failed(cls, problem: str) -> Program:
        """One that could not be started: to be tried again."""
        program = cls(keeper=None, work=Path(), log=Path())
        program.died = True
        program.ended.set_result(problem)
        return program

    def kill(self) -> None:
        """Have it killed, with all that it started; returns at once."""
        if self.keeper is None:
            return
        assert self.keeper.stdin is not None
        self._killed = True
        with contextlib.suppress(OSError, ValueError):
            self.keeper.stdin.close()

    def _watch(self, job: bytes, reward: Path, timeout_s: float) -> None:
        """See to its end, in a thread of its own."""
        assert self.keeper is not None
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it was killed before it began
            self.keeper.stdin.write(job)
            self.keeper.stdin.flush()
        timer = threading.Timer(timeout_s, self._end_late)
        timer.start()
        said = self.keeper.stdout.read()
        timer.cancel()
        ordered = self._killed
        self.kill()
        self.keeper.stdout.close()
        try:
            self.keeper.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.keeper.kill()
            self.keeper.wait()
        self.ended.set_result(self._settle(said, ordered, reward, timeout_s))

    def _settle(self, said: bytes, ordered: bool, reward: Path, timeout_s: float) -> str:
        """Take its reward, and see that nothing of it stays; returns what went wrong."""
        word = _last_word(said)
        if word is None:  # a keeper that was killed has left all
            kill_marked(f"{_REWARD}={reward}")
        shutil.rmtree(self.work, ignore_errors=True)
        problem = f"it did not end within {timeout_s:g} s" if self._late else self._problem(word, ordered)
        try:
            self.rewards = take_reward(reward)
        except ValueError as error:
            problem = problem or str(error)
        return problem

    def _end_late(self) -> None:
        self._late = True
        self.kill()

    def _problem(self, word: Mapping[str, Any] | None, ordered: bool) -> str:
        if word is None:
            self.died = not ordered
            return "its keeper was killed"
        if "error" in word:
            return str(word["error"])
        status = word["status"]
        self.died = status is not None and status < 0
        if status == 0:
            return ""
        how = "killed" if status is None else f"signal {-status}" if status < 0 else f"exit code {status}"
        return f"{how}; it said: {self._tail()!r}"

    def _tail(self) -> str:
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - _TAIL, 0))
            return file.read().decode(errors="replace").strip()
        return ""


def _last_word(said: bytes) -> Mapping[str, Any] | None:
    """Of a keeper; None if it was killed before it had said it."""
    try:
        word = json.loads(said.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    return word if isinstance(word, dict) and word.keys() & {"status", "error"} else None
