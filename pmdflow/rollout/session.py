"""The environment of one trajectory: calls beside decoding, each with a limit, and how it goes on from the record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from pmdflow.config.variables import hide
from pmdflow.environments.host import FAILURES, Host, Hosts
from pmdflow.environments.observed import Speech, checked, is_text
from pmdflow.environments.protocol import Environment, Note, Observation, PastTurn, Reply
from pmdflow.errors import PmdflowError
from pmdflow.rollout.turns import Turn

if TYPE_CHECKING:
    from pmdflow.config.schema import EnvironmentConfig


MAX_KEY = 200
"""Characters of a state's identity; of a longer one, or one with half a character, a hash is kept."""


class EnvironmentChanged(PmdflowError):
    """A replayed environment did not answer as the trajectory records."""


@dataclass(slots=True)
class Session:
    """The environment of one trajectory, as its rollout actor sees it; calls run in a thread of their own.

    A call has a deadline. One that fails or is late is answered with `environment.failure`, which the model reads; a
    continuation passes over such turns. What is late is given up, and closed when it comes to an end: the next call
    gets a new object.
    """

    make: Callable[[], Environment]
    hosts: Hosts
    speech: Speech
    config: EnvironmentConfig
    key: str
    prompt: str
    metadata: Mapping[str, Any]
    said: tuple[int, ...] | None
    """What `reset` said; None if it was never called."""
    turns: list[Turn]
    """Answered ones."""
    num_notes: int = 0
    """Durable ones."""
    is_noted: bool = False
    """What comes next is noted already, by a worker that vanished before it was appended: that stands."""
    outlives: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)
    limit: int | None = field(default=None, init=False)
    stop: tuple[str, ...] = field(default=(), init=False)
    _host: Host | None = field(default=None, init=False)
    """None until the first call, and after a late one."""
    _call: Future[tuple[Observation, Reply]] | None = field(default=None, init=False)
    _action: tuple[int, ...] | None = field(default=None, init=False)
    _has_begun: bool = field(default=False, init=False)
    """The environment is where the record ends."""

    @property
    def call(self) -> Future[tuple[Observation, Reply]] | None:
        """The call that goes on."""
        return self._call

    def poll(self) -> Reply | None:
        """The answer of the call, if it is there or its time is over."""
        assert self._call is not None
        observation = Observation()
        if self._call.done():
            observation, reply = self._call.result()
            self._has_begun = not reply.done
        elif self._host is not None and self._host.is_late:
            reply = self._late()
        else:
            return None
        self._call = None
        if self._action is not None:
            self.turns.append(Turn(action=self._action, observed=reply.tokens))
        elif self.said is None:
            self.said = reply.tokens
        return self._limited(replace(reply, note=self._note(observation)))

    def start(self, action: tuple[int, ...] | None) -> None:
        """Have the environment answer a turn; before the first one, make it and bring it to where the record ends.

        Args:
            action: A turn that has ended; None only makes it.
        """
        assert self._call is None
        self._action = action
        try:
            if self._host is None:
                self._host = self.hosts.start(self.key, timeout_s=self.config.timeout_s)
            self._call = self._host.submit(self._answer(self._host, action))
        except (OSError, RuntimeError) as error:  # this machine has no file or thread left: it may have later
            self._call = Future()
            self._call.set_result((Observation(), self._ends(error)))

    def is_at(self, said: tuple[int, ...], turns: Sequence[Turn], *, num_notes: int) -> bool:
        """Whether it stands where this record ends."""
        return self._has_begun and (self.said, self.turns, self.num_notes) == (said, turns, num_notes)

    def generated(self, logprobs: Sequence[float], version: int) -> None:
        """Nobody asks for them."""

    def close(self, why: str) -> None:
        """Close the environment, if it can be, beside everything else; a call that goes on ends first."""
        if self._host is not None:
            self._host.close()

    async def _answer(self, host: Host, action: tuple[int, ...] | None) -> tuple[Observation, Reply]:
        """The environment's answer to a turn, or to `reset`."""
        first, reply = Observation(), Reply()
        try:
            if not self._has_begun:
                first = checked(await self._begin(host))
                if self.said is not None:
                    first = Observation(done=first.done)  # what it says besides is in the record
                reply = Reply(tokens=self.speech.tokens(first), done=first.done)
            if action is not None and not reply.done:
                return await self._step(host, action)
        except FAILURES as error:
            return Observation(), self._ends(error)
        return first, reply

    async def _begin(self, host: Host) -> Observation:
        """Make the environment and bring it to where the record ends; what `reset` said, if it was called."""
        host.environment = environment = await host.call(self.make)
        task = {"key": f"{self.key}/0", "prompt": self.prompt, "metadata": self.metadata}
        past = [(number, turn) for number, turn in enumerate(self.turns, 1) if turn.observed != self.failure]
        resume = getattr(environment, "resume", None)
        if self.said is not None and callable(resume):
            turns = [
                PastTurn(
                    key=f"{self.key}/{number}",
                    action=self.speech.text(turn.action),
                    observation=self.speech.text(turn.observed),
                )
                for number, turn in past
            ]
            await host.call(resume, **task, turns=turns)
            return Observation()
        first: Observation = await host.call(environment.reset, **task)
        if self.said is not None:
            self._compare(0, self.said, first, after=())
        for number, turn in past:
            observation = await host.call(environment.step, **self._given(environment, number, turn.action))
            self._compare(number, turn.observed, observation, after=turn.action)
        return first

    async def _step(self, host: Host, action: tuple[int, ...]) -> tuple[Observation, Reply]:
        environment, number = host.environment, len(self.turns) + 1
        assert environment is not None
        try:
            said = await host.call(environment.step, **self._given(environment, number, action))
            observation, tokens = checked(said), self.speech.tokens(said, after=action)
            if not tokens and not observation.done:
                raise ValueError("step says nothing and does not end the trajectory")
        except FAILURES as error:
            return Observation(), self._failed(f"{type(error).__name__}: {error}")
        return observation, Reply(tokens=tokens, done=observation.done)

    def _given(self, environment: Environment, number: int, action: tuple[int, ...]) -> dict[str, Any]:
        """What `step` is given, by the parameters that it has."""
        wanted = inspect.signature(environment.step).parameters
        given: dict[str, Any] = {"key": f"{self.key}/{number}"}
        if "raw" in wanted:
            given["raw"] = self.speech.text(action, raw=True)
        if "tokens" in wanted:
            given["tokens"] = action
        if "action" in wanted or len(given) == 1:
            given["action"] = self.speech.text(action)
        return given

    def _late(self) -> Reply:
        assert self._host is not None
        why = f"no answer within {self.config.timeout_s:g} s"
        self._host.close()
        self._host = None
        if not self._has_begun:
            return Reply(done=True, problem=f"{self.key}: the trajectory ends: {why} of a call that begins it")
        self._has_begun = False
        return self._failed(why)

    def _note(self, observation: Observation) -> Note | None:
        """What is to be durable of an answer, if there is anything that is not."""
        rewards = dict(observation.metrics)
        if observation.reward is not None:
            rewards["reward"] = float(observation.reward)
        is_noted, self.is_noted = self.is_noted, False
        if is_noted or not (rewards or observation.key):
            return None
        self.num_notes += 1
        key = observation.key or None
        if key is not None and (len(key) > MAX_KEY or not is_text(key)):
            key = blake2b(key.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        return Note(number=self.num_notes - 1, rewards=rewards, key=key)

    def _limited(self, reply: Reply) -> Reply:
        """An episode of too many turns ends with the answer to the last one."""
        most = self.config.max_turns
        if reply.done or most is None or len(self.turns) < most:
            return reply
        why = f"{self.key}: the trajectory ends after {most} turns (environment.max_turns)"
        return replace(reply, done=True, notice=why)

    def _compare(
        self, number: int, recorded: tuple[int, ...], observation: Observation, *, after: tuple[int, ...]
    ) -> None:
        if self.speech.tokens(observation, after=after) != recorded:
            raise EnvironmentChanged(
                f"turn {number} was answered with {self.speech.text(recorded)!r:.80} before, now with "
                f"{observation.text!r:.80}; an environment must repeat its answer to a key, or have `resume`"
            )

    def _ends(self, error: BaseException) -> Reply:
        return Reply(done=True, problem=self._said(f"the trajectory ends: {type(error).__name__}: {error}"))

    def _failed(self, why: str) -> Reply:
        problem = self._said(f"turn {len(self.turns) + 1} was not answered: {why}")
        return Reply(tokens=self.failure, problem=problem)

    @property
    def failure(self) -> tuple[int, ...]:
        """What the model reads in place of a failed call's answer."""
        return self.speech.tokens(Observation(text=self.config.failure))

    def _said(self, problem: str) -> str:
        """What is noted of a problem; an error may quote an argument."""
        return f"{self.key}: {hide(problem, self.config.args)}"
