"""The program of one trajectory, as the rollout actor that holds the lease sees it: it asks for turns until it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pmdflow.agents.answers import Choice, chat_answer, error, text_answer
from pmdflow.agents.desk import Desk, Incoming, Outgoing
from pmdflow.agents.history import History, Target
from pmdflow.agents.program import Program
from pmdflow.agents.record import Record, Tokens
from pmdflow.agents.requests import Posted, RequestRefused, TurnRequest
from pmdflow.agents.tools import ToolFormat, read
from pmdflow.config.variables import hide
from pmdflow.data.stop_text import StopText
from pmdflow.environments.protocol import Reply
from pmdflow.store.episodes import MAX_FORKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pmdflow.config.agents import AgentsConfig


@dataclass(slots=True)
class _Open:
    """A request that is not answered yet."""

    request: TurnRequest
    waiters: list[str]
    """HTTP requests that get the answer."""
    target: Target | None = None
    choices: list[Choice] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class AgentSession:
    """Stands where an environment does: `start` takes a turn that is whole and durable, `poll` says what comes next.

    Requests of one episode are worked off one after another. The first recorded turns answer a program that was started
    again, as long as it asks for what it asked before.
    """

    config: AgentsConfig
    tokenizer: PreTrainedTokenizerBase
    history: History
    style: ToolFormat
    desk: Desk
    start_program: Callable[[], Program]
    trajectory: int
    epoch: int
    """Of the lease for which the program is started."""
    model: str
    """Its name in answers."""
    prompt_length: int
    max_tokens: int
    """Of the episode, all that comes in it counted."""
    record: Record
    ends: Collection[int]
    """Token ids that end a turn."""
    run_stop: tuple[str, ...]
    """Texts that end a turn of any request, and stay in the answer."""
    sampling: Mapping[str, Any]
    """The run's own, which every answer says."""
    outlives: bool = field(default=True, init=False)
    may_die: bool = True
    """A program that is killed is started again."""
    rewards: dict[str, float] = field(default_factory=dict, init=False)
    """What the program says of its episode."""
    is_judged: bool = field(default=False, init=False)
    """The store has what was said of it already."""
    notes: list[tuple[str, str]] = field(default_factory=list, init=False)
    """(kind, message) of what is to be said of it in the run's events."""
    refused: str = field(default="it asked for nothing", init=False)
    """Why its last request got no turn, if none did."""
    num_turns: int = field(default=0, init=False)
    """Answered, recorded ones included."""
    generating: bool = field(default=False, init=False)
    """The model writes the turn that is asked for."""
    turn_start: int = field(default=0, init=False)
    """Tokens of the history before the present turn, prompt included."""
    _program: Program | None = field(default=None, init=False)
    _queue: deque[_Open] = field(default_factory=deque, init=False)
    _current: _Open | None = field(default=None, init=False)
    _answered: list[tuple[TurnRequest, dict[str, Any]]] = field(default_factory=list, init=False)
    _turn: tuple[list[float], list[int]] = field(default_factory=lambda: ([], []), init=False)
    """Log-probs and versions of what is generated of the present turn."""
    _ended: str = field(default="", init=False)
    """Why the episode ends although its program did not."""

    @property
    def call(self) -> Future[Any] | None:
        """Done when there may be something to poll for."""
        if self._program is not None and self._program.ended.done():
            return self._program.ended
        return self.desk.arrival

    @property
    def over(self) -> bool:
        """The program has ended, or its episode does."""
        return bool(self._ended) or (self._program is not None and self._program.ended.done())

    @property
    def limit(self) -> int | None:
        """Tokens that the present turn may still have by its request; None is unlimited."""
        if self._current is None or self._current.request.max_tokens is None:
            return None
        return self._current.request.max_tokens - len(self._turn[0])

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end the present turn."""
        return () if self._current is None else self._current.request.stop

    def start(self, action: tuple[int, ...] | None) -> None:
        """Take a turn of the model, whole and durable; None starts the program."""
        if action is None:
            self.desk.open(self.trajectory, self.epoch)
            self._program = self.start_program()
            return
        self.generating = False
        self.record.live = self.record.live[: self.turn_start] + action
        logprobs, versions = self._turn
        self._chose(action, logprobs[: len(action)], versions[: len(action)])

    def generated(self, logprobs: Sequence[float], version: int) -> None:
        """Take the log-probs of tokens of the present turn; it may be cut afterwards."""
        self._turn[0].extend(logprobs)
        self._turn[1].extend([version] * len(logprobs))
        self.record.spent += len(logprobs)

    def poll(self) -> Reply | None:
        """What comes next, if anything: tokens to go on from, or the end."""
        self._take_arrivals()
        if self.generating:
            return self._last() if self.over else None
        while not self.over and (self._current is not None or self._queue):
            self._current = self._current or self._queue.popleft()
            try:
                reply = self._proceed(self._current)
            except RequestRefused as refusal:
                self._answer(self._current, refusal.status, error(str(refusal), kind=refusal.kind))
                self.refused = f"its request was refused: {refusal}"
                self._current = None
                continue
            if reply is not None:
                self.generating, self._turn = True, self._turn if reply.turn else ([], [])
                return reply
        return self._last() if self.over else None

    def close(self, why: str) -> None:
        """End the program and all that it started; whoever waits is told why."""
        for entry in self._waiting:
            self._answer(entry, 410, error(f"the episode is over: {why}", kind="session_over"))
        self._current = None
        self._queue.clear()
        self.desk.close(self.trajectory, self.epoch)
        if self._program is not None:
            self._program.kill()

    @property
    def _waiting(self) -> list[_Open]:
        """Requests that are not answered yet, in their order."""
        return [*([] if self._current is None else [self._current]), *self._queue]

    def _take_arrivals(self) -> None:
        for incoming in self.desk.take(self.trajectory, self.epoch):
            if isinstance(incoming.content, Posted):
                self.rewards |= incoming.content.rewards
                self.desk.answer([Outgoing(id=incoming.id, status=200, body={"rewards": dict(self.rewards)})])
            else:
                self._arrive(incoming, incoming.content)

    def _arrive(self, incoming: Incoming, request: TurnRequest) -> None:
        """Join the same request where it is open or sent again; else wait for one's turn."""
        for entry in self._waiting:
            if _same(entry.request, request):
                entry.waiters.append(incoming.id)
                return
        if request.retried or request.idempotency_key is not None:
            for earlier, body in reversed(self._answered):
                if _same(earlier, request):
                    self.desk.answer([Outgoing(id=incoming.id, status=200, body=body)])
                    return
        if request.asked and self.config.sampling == "refuse":
            message = f"{_shown(request.asked)} asked, {_shown(self.sampling)} sampled; leave it out (agents.sampling)"
            self.desk.answer([Outgoing(id=incoming.id, status=400, body=error(message))])
            return
        self._queue.append(_Open(request, [incoming.id]))

    def _proceed(self, entry: _Open) -> Reply | None:
        """Answer from the record, or say what the model is to go on from."""
        if entry.target is None:
            entry.target = self.history.target(entry.request)
        target = entry.target.tokens
        turn = self.record.take(target)
        if turn is not None:
            end = self._end(entry.request, turn.tokens)
            if end is not None and end < len(turn.tokens):
                turn = self.record.cut(target, turn, end)
            self._turn = (list(turn.logprobs), list(turn.versions))
            self.turn_start = len(target)
            if not turn.last or end is not None:
                self._chose(turn.tokens, turn.logprobs, turn.versions)
                return None
            return Reply(turn=len(turn.tokens))
        return self._go_on(entry, target)

    def _go_on(self, entry: _Open, target: Tokens) -> Reply:
        live = self.record.live
        kept = _common(live, target)
        if kept < self.prompt_length:
            raise RequestRefused(
                "a history of this run begins as its chat template makes conversations begin, with token "
                f"{live[0]} ({self.tokenizer.decode([live[0]])!r}), not {list(target[:1])}"
            )
        if max(target[kept:], default=0) >= len(self.tokenizer):
            raise RequestRefused(f"the model has {len(self.tokenizer)} tokens, not {max(target[kept:])}")
        new = len(target) - kept
        if self.record.spent + new >= self.max_tokens:
            raise RequestRefused(
                f"the episode has {self.record.spent} of {self.max_tokens} tokens (data.max_tokens), and this request "
                f"adds {new}",
                kind="context_length_exceeded",
            )
        fork = None
        if kept < len(live):
            if self.record.forks >= MAX_FORKS:
                raise RequestRefused(f"an episode begins at most {MAX_FORKS} branches, and this request would another")
            self._say_broken(entry)
            if self._ended:
                raise RequestRefused(self._ended, status=410, kind="session_over")
            fork = kept - self.prompt_length
            self.record.forks += 1
        self.record.live, self.record.bare = target, False
        self.record.spent += new
        self.turn_start = len(target)
        return Reply(tokens=target[kept:], fork=fork, turn=0)

    def _say_broken(self, entry: _Open) -> None:
        """A request does not go on from what was last: by the rule it begins a branch, or ends the episode."""
        assert entry.target is not None
        asked_before = any(_same(earlier, entry.request) for earlier, _ in self._answered) or bool(entry.choices)
        if asked_before and not self.record.bare:
            return  # another answer to the same: a sample
        why = entry.target.broken or "the program rewrote its history"
        if self.record.remaining:
            why = f"started again, the program says something else than before; {why}"
        if self.config.history == "strict":
            self._ended = f"{why} (agents.history is strict)"
        elif self.record.bare:
            self._ended = f"{why}, and the branch before this one has no token yet"
        self.notes.append(("history_ended" if self._ended else "history_branched", why))

    def is_at(self, history: Tokens) -> bool:
        """Whether it stands where this history of the newest branch ends: all that it knows of is durable."""
        own = len(self._turn[0]) if self.generating else len(self.record.live) - self.turn_start
        return history[: len(self.record.live)] == self.record.live and len(history) - self.turn_start == own

    def is_whole(self, tokens: Sequence[int]) -> bool:
        """Whether the present turn has ended with these tokens."""
        return self._current is not None and self._end(self._current.request, tokens) is not None

    def _end(self, request: TurnRequest, tokens: Sequence[int]) -> int | None:
        """Tokens of the turn that is the answer, where they begin with a whole one."""
        ends = [at + 1 for at, token in enumerate(tokens) if token in self.ends][:1]
        if request.max_tokens is not None and len(tokens) >= request.max_tokens:
            ends.append(request.max_tokens)
        if stop := (*self.run_stop, *request.stop):
            found = StopText(self.tokenizer, stop).find(tokens)
            ends += [] if found is None else [found + 1]
        if self.record.spent >= self.max_tokens:
            ends.append(len(tokens))
        return min(ends, default=None)

    def _chose(self, tokens: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> None:
        """A turn is whole: answer its request once it has all of its samples."""
        entry = self._current
        if entry is None or entry.target is None:
            return  # whoever asked is gone
        ended = bool(tokens) and tokens[-1] in self.ends
        text = self._text(tokens[:-1] if ended else tokens)
        cut = min((at for at in (text.find(stop) for stop in entry.request.stop) if at >= 0), default=None)
        ended = ended or any(stop in text for stop in self.run_stop)
        place = f"{self.trajectory}-{len(entry.target.tokens)}-{self.num_turns}"
        said = read(text if cut is None else text[:cut], self.style, id=place)
        entry.choices.append(
            Choice(
                said=said,
                tokens=tokens,
                texts=[self._text([token]) for token in tokens] if entry.request.logprobs else (),
                logprobs=logprobs,
                versions=versions,
                finish="stop" if ended or cut is not None else "length",
            )
        )
        self.num_turns += 1
        self.history.answered(entry.request, entry.target, said, tokens)
        if len(entry.choices) < entry.request.samples:
            return
        make = text_answer if entry.request.messages is None else chat_answer
        body = make(place, self.model, entry.choices, prompt_tokens=len(entry.target.tokens))
        if entry.request.asked:
            if not any(kind == "sampling_overridden" for kind, _ in self.notes):
                self.notes.append(("sampling_overridden", f"{_shown(entry.request.asked)} asked for"))
            body["pmdflow"]["sampling"] = dict(self.sampling)
        self._answered.append((entry.request, body))
        self._answer(entry, 200, body)
        self._current = None

    def _answer(self, entry: _Open, status: int, body: Mapping[str, Any]) -> None:
        self.desk.answer([Outgoing(id=id, status=status, body=body) for id in entry.waiters])

    def _last(self) -> Reply:
        """The end of the episode, or of this program alone where it was killed."""
        if self._ended:
            return Reply(done=True, problem=f"trajectory {self.trajectory}: {self._ended}")
        assert self._program is not None
        self.rewards = {**self._program.rewards, **self.rewards}
        problem = self._program.ended.result()
        again = self._program.died and self.may_die
        told = f"trajectory {self.trajectory}: {'its program died: ' if again else ''}{problem}" if problem else ""
        told = hide(told, self.config.args)
        return Reply(done=not again, again=again, problem=told)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _same(one: TurnRequest, other: TurnRequest) -> bool:
    if one.idempotency_key is not None or other.idempotency_key is not None:
        return one.idempotency_key == other.idempotency_key
    return one.content == other.content


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])


def _shown(sampling: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sampling.items())
