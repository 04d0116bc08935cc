"""The program of one trajectory, as the rollout actor that holds the lease sees it: it asks for turns until it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pmdflow.agents.answers import error
from pmdflow.agents.asked import Asked, Next, joined, same
from pmdflow.agents.desk import Desk, Incoming, Outgoing
from pmdflow.agents.diary import Diary
from pmdflow.agents.history import History
from pmdflow.agents.program import Program
from pmdflow.agents.record import Record, Tokens, Turn
from pmdflow.agents.requests import Delivered, Posted, RequestRefused, TurnRequest
from pmdflow.agents.rewards import Rewards
from pmdflow.agents.wording import Wording, shown
from pmdflow.config.variables import hide
from pmdflow.environments.protocol import Reply
from pmdflow.store.episodes import MAX_FORKS

if TYPE_CHECKING:
    from pmdflow.config.agents import AgentsConfig


@dataclass(slots=True, kw_only=True)
class AgentSession:
    """Stands where an environment does: `start` takes a turn that is whole and durable, `poll` says what comes next.

    Requests of one episode come to their places in it one after another, and may run `ahead` of them. The first
    recorded turns answer a program that was started again, as long as it asks for what it asked before.
    """

    config: AgentsConfig
    history: History
    wording: Wording
    desk: Desk
    start_program: Callable[[], Program]
    trajectory: int
    epoch: int
    """Of the lease for which the program is started."""
    prompt_length: int
    max_tokens: int
    """Of the episode, all that comes in it counted."""
    record: Record
    rewards: Rewards
    """What programs say of the episode."""
    diary: Diary = field(default_factory=Diary)
    outlives: bool = field(default=True, init=False)
    may_die: bool = True
    """A program that is killed is started again."""
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
    _queue: deque[Asked] = field(default_factory=deque, init=False)
    _current: Asked | None = field(default=None, init=False)
    _answered: list[Asked] = field(default_factory=list, init=False)
    _turn: tuple[list[float], list[int]] = field(default_factory=lambda: ([], []), init=False)
    """Log-probs and versions of what is generated of the present turn."""
    _num_asked: int = field(default=0, init=False)
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
            self.diary.tell("start")
            self._program = self.start_program()
            return
        self.generating = False
        self.record.live = self.record.live[: self.turn_start] + action
        logprobs, versions = self._turn
        turn = Turn(tokens=action, logprobs=tuple(logprobs[: len(action)]), versions=tuple(versions[: len(action)]))
        self._chose(turn, recorded=False)

    def generated(self, logprobs: Sequence[float], version: int) -> None:
        """Take the log-probs of tokens of the present turn; it may be cut afterwards."""
        self._turn[0].extend(logprobs)
        self._turn[1].extend([version] * len(logprobs))
        self.record.spent += len(logprobs)

    def poll(self) -> Reply | None:
        """What comes next, if anything: tokens to go on from, or the end."""
        self.take_arrivals()
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
        self.rewards.close(why)
        self.diary.tell("end", why=why)
        self.desk.close(self.trajectory, self.epoch)
        if self._program is not None:
            self._program.kill()

    @property
    def _waiting(self) -> list[Asked]:
        """Requests that are not answered yet, in their order."""
        return [*([] if self._current is None else [self._current]), *self._queue]

    def take_arrivals(self) -> None:
        """Take what the program has sent since the last call."""
        for incoming in self.desk.take(self.trajectory, self.epoch):
            if isinstance(incoming.content, Posted):
                self.rewards.post(incoming)
            elif isinstance(incoming.content, Delivered):
                for entry in self._answered:
                    entry.delivered |= incoming.id in entry.waiters
            else:
                self._arrive(incoming, incoming.content)

    def _arrive(self, incoming: Incoming, request: TurnRequest) -> None:
        """Join the same request where it is open or sent again; else wait for one's turn."""
        entry = joined(request, self._waiting, self._answered)
        if entry is None and request.asked and self.config.sampling == "refuse":
            own = shown(self.wording.sampling)
            message = f"{shown(request.asked)} asked, {own} sampled; leave it out (agents.sampling)"
            self.desk.answer([Outgoing(id=incoming.id, status=400, body=error(message))])
            return
        if entry is None:
            self._num_asked += 1
            entry = Asked(request, self._num_asked)
            self._queue.append(entry)
        entry.add(incoming.id, request.attempt)
        if entry.body is not None:
            self.desk.answer([Outgoing(id=incoming.id, status=200, body=entry.body)])

    @property
    def turn_key(self) -> tuple[int, int]:
        """Of the present turn among those of `ahead`."""
        return (0, 0) if self._current is None else (self._current.number, len(self._current.choices))

    def ahead(self) -> list[tuple[int, int]]:
        """Keys of turns that are asked for besides the present one, in their order."""
        entries = self._waiting
        if self.over or self.record.remaining or sum(entry.request.samples for entry in entries) <= 1:
            return []
        first = {entry.number: len(entry.choices) + (entry is self._current) for entry in entries}
        return [(one.number, nth) for one in entries for nth in range(first[one.number], one.request.samples)]

    def plan(self, key: tuple[int, int]) -> Next | None:
        """A turn of `ahead`; None where it has no room, or it cannot be said what it goes on from."""
        entry = next(entry for entry in self._waiting if entry.number == key[0])
        if entry.early is None:
            entry.early = self._early(entry)
        room = self.max_tokens - self.record.spent - len(entry.early) + _common(self.record.live, entry.early)
        limit = min(entry.request.max_tokens or room, room)
        if not entry.early or limit <= 0:
            return None
        return Next(key=key, history=entry.early, limit=limit, stop=entry.request.stop)

    def _early(self, entry: Asked) -> Tokens:
        try:
            target = (entry.target or self.history.target(entry.request)).tokens
            self._check(target)
        except RequestRefused:
            return ()
        return target

    def _proceed(self, entry: Asked) -> Reply | None:
        """Answer from the record, or say what the model is to go on from."""
        if entry.target is None:
            entry.target = self.history.target(entry.request)
        target = entry.target.tokens
        turn = self.record.take(target)
        if turn is not None:
            end = self._end(entry.request, turn.tokens)
            if end is not None and end < len(turn.tokens):
                turn = self.record.cut(target, turn, end)
            if turn.last and end is None and self.record.live != target + turn.tokens:
                return self._go_on(entry, target)  # another conversation has gone on since: this turn has no next token
            self._turn = (list(turn.logprobs), list(turn.versions))
            self.turn_start = len(target)
            if not turn.last or end is not None:
                self._chose(turn, recorded=True)
                return None
            return Reply(turn=len(turn.tokens))
        return self._go_on(entry, target)

    def _go_on(self, entry: Asked, target: Tokens) -> Reply:
        live = self.record.live
        kept = self._check(target)
        new = len(target) - kept
        if self.record.spent + new >= self.max_tokens:
            raise RequestRefused(
                f"the episode has {self.record.spent} of {self.max_tokens} tokens (data.max_tokens), and this request "
                f"adds {new}",
                kind="context_length_exceeded",
            )
        fork = None
        if kept < len(live):
            if self.record.forks >= MAX_FORKS and not self.record.bare:
                raise RequestRefused(f"an episode begins at most {MAX_FORKS} branches, and this request would another")
            self._say_broken(entry)
            if self._ended:
                raise RequestRefused(self._ended, status=410, kind="session_over")
            fork = kept - self.prompt_length
            self.record.forks += not self.record.bare  # one without a token is begun anew
        self.record.live, self.record.bare = target, False
        self.record.spent += new
        self.turn_start = len(target)
        return Reply(tokens=target[kept:], fork=fork, turn=0)

    def _check(self, target: Tokens) -> int:
        """Tokens that a history has in common with the newest branch.

        Raises:
            RequestRefused: it is none that this model could have.
        """
        live = self.record.live
        kept = _common(live, target)
        if kept < self.prompt_length:
            raise RequestRefused(
                "a history of this run begins as its chat template makes conversations begin, with token "
                f"{live[0]} ({self.wording.tokenizer.decode([live[0]])!r}), not {list(target[:1])}"
            )
        if max(target[kept:], default=0) >= len(self.wording.tokenizer):
            raise RequestRefused(f"the model has {len(self.wording.tokenizer)} tokens, not {max(target[kept:])}")
        return kept

    def _say_broken(self, entry: Asked) -> None:
        """A request does not go on from what was last: by the rule it begins a branch, or ends the episode."""
        assert entry.target is not None
        asked_before = any(same(earlier.request, entry.request) for earlier in self._answered) or bool(entry.choices)
        if asked_before:
            return  # another answer to the same: a sample
        if entry.target.follows and self.config.history == "branch":
            return  # one of several conversations goes on
        why = entry.target.broken or "the program rewrote its history"
        if self.record.remaining:
            why = f"started again, the program says something else than before; {why}"
        if self.config.history == "strict":
            self._ended = f"{why} (agents.history is strict)"
        self.notes.append(("history_ended" if self._ended else "history_branched", why))

    def is_at(self, history: Tokens) -> bool:
        """Whether it stands where this history of the newest branch ends: all that it knows of is durable."""
        own = len(self._turn[0]) if self.generating else len(self.record.live) - self.turn_start
        return history[: len(self.record.live)] == self.record.live and len(history) - self.turn_start == own

    def is_whole(self, tokens: Sequence[int]) -> bool:
        """Whether the present turn has ended with these tokens."""
        return self._current is not None and self._end(self._current.request, tokens) is not None

    def _end(self, request: TurnRequest, tokens: Sequence[int]) -> int | None:
        return self.wording.end(request, tokens, full=self.record.spent >= self.max_tokens)

    def _chose(self, turn: Turn, *, recorded: bool) -> None:
        """A turn is whole: answer its request once it has all of its samples."""
        entry = self._current
        if entry is None or entry.target is None:
            return  # whoever asked is gone
        place = f"{self.trajectory}-{len(entry.target.tokens)}-{self.num_turns}"
        choice = self.wording.choice(entry.request, turn, id=place)
        entry.choices.append(choice)
        self.num_turns += 1
        self.diary.tell(
            "turn",
            asked=entry.asked_at,
            tokens=len(turn.tokens),
            calls=[call["function"]["name"] for call in choice.said.calls],
            finish=choice.finish,
            branch=self.record.forks,
            recorded=recorded,
        )
        self.history.answered(entry.request, entry.target, choice.said, turn.tokens)
        if len(entry.choices) < entry.request.samples:
            return
        if entry.request.asked and not any(kind == "sampling_overridden" for kind, _ in self.notes):
            self.notes.append(("sampling_overridden", f"{shown(entry.request.asked)} asked for"))
        entry.body = self.wording.answer(entry, id=place)
        entry.request = replace(entry.request, messages=None, prompt="")  # its digest is enough from now on
        self._answered.append(entry)
        self._answer(entry, 200, entry.body)
        self._current = None

    def _answer(self, entry: Asked, status: int, body: Mapping[str, Any]) -> None:
        self.desk.answer([Outgoing(id=id, status=status, body=body) for id in entry.waiters])

    def _last(self) -> Reply:
        """The end of the episode, or of this program alone where it was killed."""
        if self._ended:
            return Reply(done=True, problem=f"trajectory {self.trajectory}: {self._ended}")
        assert self._program is not None
        problem = self._program.ended.result()
        again = self._program.died and self.may_die
        if again:
            self.diary.tell("died", why=problem)
        else:
            self.rewards.end(self._program.rewards)
        told = f"trajectory {self.trajectory}: {'its program died: ' if again else ''}{problem}" if problem else ""
        told = hide(told, self.config.args)
        return Reply(done=not again, again=again, problem=told)


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])
