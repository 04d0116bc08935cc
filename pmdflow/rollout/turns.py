"""Turns of a trajectory with an environment: the durable record, its replay, and calls beside decoding."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pmdflow.config.variables import hide
from pmdflow.environments.protocol import Environment, Observation, Reply
from pmdflow.errors import PmdflowError
from pmdflow.types import Int32, UInt8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pmdflow.config.schema import EnvironmentConfig


class EnvironmentChanged(PmdflowError):
    """A replayed environment did not answer as the trajectory records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model wrote, and what the environment said to it."""

    action: tuple[int, ...]
    observed: tuple[int, ...]
    """Empty if it has not answered yet, or the turn goes on."""


def close_environment(environment: Environment) -> None:
    """Call its `close`, if it has one; what that fails at is nobody's any more."""
    close = getattr(environment, "close", None)
    if callable(close):
        with suppress(Exception):
            close()


def split_turns(tokens: Int32, observed: UInt8) -> tuple[tuple[int, ...], list[Turn]]:
    """What `reset` said, and the turns after it, of the tokens after a prompt and their flags, both [S].

    Example:
        >>> split_turns(np.array([9, 5, 6, 7]), np.array([0, 1, 1, 0]))[1][0]
        Turn(action=(9,), observed=(5, 6))
    """
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(tokens.tolist(), observed.tolist(), strict=True):
        if not runs or runs[-1][0] != bool(flag):
            runs.append((bool(flag), []))
        runs[-1][1].append(token)
    first = tuple(runs.pop(0)[1]) if runs and runs[0][0] else ()
    actions, answers = runs[::2], [*runs[1::2], (True, [])]
    return first, [Turn(action=tuple(a), observed=tuple(o)) for (_, a), (_, o) in zip(actions, answers, strict=False)]


@dataclass(slots=True)
class Session:
    """The environment of one trajectory, as its rollout actor sees it; calls run in threads of their own.

    A call has a deadline. One that fails or is late is answered with `environment.failure`, which the model reads; a
    replay passes over such turns. A late call keeps its thread and its object, so the next one gets a new object.
    """

    make: Callable[[], Environment]
    tokenizer: PreTrainedTokenizerBase
    config: EnvironmentConfig
    key: str
    prompt: str
    metadata: Mapping[str, Any]
    said: tuple[int, ...] | None
    """What `reset` said; None if it was never called."""
    turns: list[Turn]
    """Answered ones."""
    outlives: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)
    limit: int | None = field(default=None, init=False)
    stop: tuple[str, ...] = field(default=(), init=False)
    environment: Environment | None = field(default=None, init=False)
    """None until the first call, and after a late one."""
    _call: Future[tuple[Environment | None, Reply]] | None = field(default=None, init=False)
    _action: tuple[int, ...] | None = field(default=None, init=False)
    _deadline: float = field(default=0.0, init=False)
    _closed: bool = field(default=False, init=False)

    @property
    def call(self) -> Future[tuple[Environment | None, Reply]] | None:
        """The call that goes on."""
        return self._call

    def poll(self) -> Reply | None:
        """The answer of the call, if it is there or its time is over."""
        assert self._call is not None
        if self._call.done():
            self.environment, reply = self._call.result()
        elif time.monotonic() > self._deadline:
            reply = self._late()
        else:
            return None
        self._call = None
        if self._action is not None:
            self.turns.append(Turn(action=self._action, observed=reply.tokens))
        elif self.said is None:
            self.said = reply.tokens
        return reply

    def start(self, action: tuple[int, ...] | None) -> None:
        """Have the environment answer a turn; before the first one, make it and replay the record.

        Args:
            action: A turn that has ended; None only makes and replays.
        """
        assert self._call is None
        self._action = action
        calls = 1 if self.environment is not None else 2 + len(self.turns)
        self._deadline = time.monotonic() + calls * self.config.timeout_s
        call: Future[tuple[Environment | None, Reply]] = Future()
        self._call = call
        arguments = (call, self.environment, self.said, list(self.turns), action)
        threading.Thread(target=self._run, args=arguments, name=f"environment-{self.key}", daemon=True).start()

    def generated(self, logprobs: Sequence[float], version: int) -> None:
        """Nobody asks for them."""

    def close(self, why: str) -> None:
        """Close the environment, if it can be, beside everything else; a call that goes on closes it at its end."""
        call, self._closed = self._call, True
        if call is None and self.environment is not None:
            threading.Thread(target=close_environment, args=(self.environment,), daemon=True).start()

    def _run(
        self,
        call: Future[tuple[Environment | None, Reply]],
        environment: Environment | None,
        said: tuple[int, ...] | None,
        turns: Sequence[Turn],
        action: tuple[int, ...] | None,
    ) -> None:
        """One call, in a thread of its own."""
        reply = Reply()
        try:
            if environment is None:
                environment, first = self._replay(said, turns)
                reply = Reply(tokens=self._tokens(first) if said is None else (), done=first.done)
            if action is not None and not reply.done:
                reply = self._step(environment, len(turns), action)
        except Exception as error:
            reply = Reply(done=True, problem=self._said(f"the trajectory ends: {type(error).__name__}: {error}"))
        call.set_result((environment, reply))
        if environment is not None and (self._closed or self._call is not call):
            close_environment(environment)  # it was late, or is not wanted any more

    def _late(self) -> Reply:
        why = f"no answer within {self.config.timeout_s:g} s"
        if self.environment is None:
            return Reply(done=True, problem=f"{self.key}: the trajectory ends: {why} of each replayed call")
        self.environment = None
        return self._failed(why)

    def _replay(self, said: tuple[int, ...] | None, turns: Sequence[Turn]) -> tuple[Environment, Observation]:
        environment = self.make()
        first = environment.reset(key=f"{self.key}/0", prompt=self.prompt, metadata=self.metadata)
        if said is not None:
            self._compare(0, said, first)
        for number, turn in enumerate(turns):
            if turn.observed != self.failure:
                observation = environment.step(key=f"{self.key}/{number + 1}", action=self._text(turn.action))
                self._compare(number + 1, turn.observed, observation)
        return environment, first

    def _step(self, environment: Environment, number: int, action: tuple[int, ...]) -> Reply:
        try:
            observation = environment.step(key=f"{self.key}/{number + 1}", action=self._text(action))
            tokens = self._tokens(observation)
            if not tokens and not observation.done:
                raise ValueError("step says nothing and does not end the trajectory")
        except Exception as error:
            return self._failed(f"{type(error).__name__}: {error}")
        return Reply(tokens=tokens, done=observation.done)

    def _compare(self, number: int, recorded: tuple[int, ...], observation: Observation) -> None:
        if self._tokens(observation) != recorded:
            raise EnvironmentChanged(
                f"turn {number} was answered with {self._text(recorded)!r:.80} before, now with "
                f"{observation.text!r:.80}; an environment must repeat its answer to a key"
            )

    def _failed(self, why: str) -> Reply:
        problem = self._said(f"turn {len(self.turns) + 1} was not answered: {why}")
        return Reply(tokens=self.failure, problem=problem)

    @property
    def failure(self) -> tuple[int, ...]:
        """What the model reads in place of a failed call's answer."""
        return self._tokens(Observation(text=self.config.failure))

    def _tokens(self, observation: Observation) -> tuple[int, ...]:
        if not observation.text:
            return ()
        return tuple(self.tokenizer(observation.text, add_special_tokens=False)["input_ids"])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _said(self, problem: str) -> str:
        """What is noted of a problem; an error may quote an argument."""
        return f"{self.key}: {hide(problem, self.config.args)}"
