"""The agent programs of one rollout actor: one for each lease, alive as long as its episode is wanted here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pmdflow.agents.desk import Desk
from pmdflow.agents.diary import SUFFIX, Diary
from pmdflow.agents.history import History
from pmdflow.agents.record import Episode, Record
from pmdflow.agents.rewards import Rewards
from pmdflow.agents.session import AgentSession
from pmdflow.agents.tools import format_of
from pmdflow.agents.wording import Wording
from pmdflow.config.agents import AgentsConfig
from pmdflow.config.schema import Config
from pmdflow.config.variables import hide
from pmdflow.data.messages import Style
from pmdflow.data.sampling import SamplingControl
from pmdflow.data.stop_text import StopText
from pmdflow.data.tokenizer import end_ids, load_tokenizer
from pmdflow.metrics.report import Event
from pmdflow.rollout.failures import InARow
from pmdflow.rollout.held import HeldTrajectory, LeaseLost
from pmdflow.rollout.launching import AgentsPlace, Launcher
from pmdflow.store.episodes import Turn, rewards_said
from pmdflow.types import Lease

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Note: TypeAlias = "tuple[int, int, int, Mapping[str, float]]"
"""Trajectory, epoch, number of the note, and rewards by name."""
MAX_DEATHS = 3
"""A trajectory whose programs are killed so often ends with the next such death, where it is."""


class Programs:
    """Starts, keeps and ends them. A lease that is given back leaves its program waiting for the next one."""

    def __init__(
        self,
        config: Config,
        place: AgentsPlace,
        run_dir: Path,
        worker: str,
        read: Callable[[int], Mapping[str, Any] | None],
    ) -> None:
        """Start nothing yet; `read` gives a trajectory as the store has it (`TrajectoryStore.trajectory`)."""
        assert config.agents is not None
        self.desk = Desk()
        self._config, self._agents, self._read = config, config.agents, read
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.path)
        self._ends = end_ids(config.model.path)
        self._longest = max(map(len, self._tokenizer.get_vocab()))
        """Characters of the longest token."""
        self._launcher = Launcher(config, place, run_dir, worker, self._tokenizer)
        self._parked: dict[int, tuple[AgentSession, int]] = {}
        """By trajectory, with the epoch of the lease that was given back."""
        self._failures = InARow.of_programs(self._agents)
        self.num_actors = config.rollout.num_actors
        """Among which the programs of the run are shared out."""

    @property
    def most(self) -> int:
        """Programs that this actor may run at a time; at most as many more wait for a lease."""
        return math.ceil(self._agents.concurrency / self.num_actors)

    def open(self, held: HeldTrajectory) -> None:
        """Begin the program of a leased trajectory, or go on with the one that waits for it.

        Raises:
            LeaseLost: the trajectory is gone, or somebody else's.
        """
        lease = held.lease
        held.watch = partial(_watch, self._tokenizer)
        row = None
        if lease.epoch > 1:
            row = self._read(lease.trajectory)
            if row is None or row["epoch"] != lease.epoch:
                raise LeaseLost(f"trajectory {lease.trajectory}, epoch {lease.epoch}")
        episode = Episode() if row is None else _episode(row)
        held.left_out = len(episode.tokens) - len(lease.prefix)
        session, epoch = self._parked.pop(lease.trajectory, (None, 0))
        if session is not None:
            history = (*lease.prompt.tolist(), *held.context)
            if lease.epoch == epoch + 1 and not session.over and session.is_at(history):
                turn = held.context[session.turn_start - len(lease.prompt) :] if session.generating else None
                held.attach(session, turn=turn, whole=turn is not None and session.is_whole(turn))
                return
            session.close("it has ended" if session.over else "another program goes on with its trajectory")
        session = self._session(lease, episode, held, [] if row is None else row["turns"])
        held.open(session, unanswered=0, whole=False)

    def let_go(self, held: HeldTrajectory, *, stays: bool) -> list[tuple[str, str]]:
        """A lease has ended; where the trajectory `stays` partial its program waits. Returns what is to be noted."""
        session = held.session
        assert isinstance(session, AgentSession)
        notes = [*session.notes, *(("reward_kept", why) for why in session.rewards.problems)]
        session.notes, session.rewards.problems = [], []
        if stays and held.stop in ("budget", "abort") and not session.over:
            self._parked[held.id] = (session, held.epoch)
            for longest in list(self._parked)[: -self.most]:
                self._drop(longest, "too many programs wait; another one goes on with its trajectory")
        else:
            session.close("its trajectory is complete" if held.stop is not None else "another actor has its lease")
        return notes

    def note_rewards(self, held: Iterable[HeldTrajectory], turns: Callable[[Sequence[Note]], Sequence[bool]]) -> None:
        """Make durable what programs have said of their episodes, and answer them; `turns` says which are fenced."""
        saying = []
        for one in held:
            assert isinstance(one.session, AgentSession)
            one.session.take_arrivals()
            if one.phase != "closed" and one.session.rewards.pending:
                saying.append((one, one.session.rewards))
        new = [(one, rewards) for one, rewards in saying if rewards.unsaid]
        fenced = turns([(one.id, one.epoch, said.num_notes, dict(said.unsaid)) for one, said in new]) if new else []
        stale = {one.id for (one, _), is_fenced in zip(new, fenced, strict=True) if is_fenced}
        for one, rewards in saying:
            said = dict(rewards.unsaid)
            rewards.noted(stale=one.id in stale)
            if said and one.id not in stale and isinstance(one.session, AgentSession):
                one.session.diary.tell("reward", rewards=said)

    def note(self, held: HeldTrajectory, problem: str) -> None:
        """Count what a program failed at.

        Raises:
            PmdflowError: they only fail.
        """
        assert isinstance(held.session, AgentSession)
        silent = problem or f"trajectory {held.id}: it ended without a turn; {held.session.refused}"
        self._failures.note("" if held.session.num_turns else silent)

    def parked(self) -> dict[int, int]:
        """Trajectories whose programs wait for a lease, each with the epoch of the last one."""
        return {id: epoch for id, (_, epoch) in self._parked.items()}

    def drop(self, trajectory: int) -> None:
        """Another actor goes on with a trajectory: end the program that waits here."""
        self._drop(trajectory, "another actor goes on with its trajectory")

    def close(self) -> None:
        """End every program that waits."""
        for trajectory in list(self._parked):
            self.drop(trajectory)

    def _drop(self, trajectory: int, why: str) -> None:
        session, _ = self._parked.pop(trajectory)
        session.close(why)

    def _session(self, lease: Lease, episode: Episode, held: HeldTrajectory, notes: Sequence[Turn]) -> AgentSession:
        control, style = held.control, Style(template_args=self._config.data.sources[0].template_args or {})
        max_chars = (len(lease.prompt) + control.max_tokens) * self._longest
        return AgentSession(
            config=self._agents,
            history=History(self._tokenizer, style, max_chars),
            wording=self._wording(control),
            desk=self.desk,
            start_program=partial(self._launcher.start, lease),
            trajectory=lease.trajectory,
            epoch=lease.epoch,
            prompt_length=len(lease.prompt),
            max_tokens=control.max_tokens,
            record=Record.of(lease.prompt.tolist(), episode),
            diary=Diary(self._launcher.log(lease, SUFFIX)),
            rewards=Rewards(self.desk, rewards_said(notes), num_notes=len(notes)),
            may_die=self._launcher.deaths(lease) < MAX_DEATHS,
        )

    def _wording(self, control: SamplingControl) -> Wording:
        given = self._agents.tools
        return Wording(
            tokenizer=self._tokenizer,
            style=format_of(self._tokenizer.chat_template) if given == "auto" else given,
            model=self._config.run.name,
            ends=self._ends.union(control.stop_token_ids),
            run_stop=control.stop,
            sampling={"temperature": control.temperature, "top_p": control.top_p},
        )


def noted(worker: str, notes: list[tuple[str, str]], held: HeldTrajectory, agents: AgentsConfig) -> list[Event]:
    """What is to be said of an episode, as events of the run."""
    return [
        Event(
            kind=f"agent_{kind}",
            message=f"trajectory {held.id}: {hide(message, agents.args)}",
            attrs={"actor": worker, "trajectory": held.id},
        )
        for kind, message in notes
    ]


def _episode(row: Mapping[str, Any]) -> Episode:
    lengths = [segment[0] for segment in row["segments"]]
    versions = np.repeat([segment[1] for segment in row["segments"]], lengths)
    return Episode(
        tokens=row["tokens"].tolist(),
        observed=[bool(flag) for flag in row["observed"].tolist()],
        logprobs=row["logprobs"].tolist(),
        versions=versions.tolist(),
        forks=[(start, offset) for _, start, offset in row["forks"]],
    )


def _watch(tokenizer: PreTrainedTokenizerBase, stop: Any, history: Any) -> StopText:
    return StopText(tokenizer, stop, history=history)
