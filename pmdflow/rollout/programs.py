"""The agent programs of one rollout actor: one for each lease, alive as long as its episode is wanted here."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmdflow.agents.desk import Desk
from pmdflow.agents.history import History
from pmdflow.agents.keys import Credential
from pmdflow.agents.program import Program
from pmdflow.agents.record import Episode, Record
from pmdflow.agents.session import AgentSession
from pmdflow.agents.tools import format_of
from pmdflow.config.agents import AgentsConfig
from pmdflow.config.schema import Config
from pmdflow.config.variables import hide, resolve
from pmdflow.data.messages import Style
from pmdflow.data.stop_text import StopText
from pmdflow.data.tokenizer import end_ids, load_tokenizer
from pmdflow.errors import PmdflowError
from pmdflow.metrics.report import Event
from pmdflow.rollout.held import HeldTrajectory, LeaseLost
from pmdflow.types import Lease

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_DEATHS = 3
"""A trajectory whose programs are killed so often here ends where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentsPlace:
    """Where the programs of a run find its gateway."""

    address: str
    """`http://HOST:PORT`."""
    secret: bytes
    """Signs their keys."""


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
        self._config, self._agents, self._place, self._read = config, config.agents, place, read
        self._run_dir, self._worker = run_dir, worker
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.path)
        self._ends = end_ids(config.model.path)
        self._longest = max(map(len, self._tokenizer.get_vocab()))
        """Characters of the longest token."""
        self._parked: dict[int, tuple[AgentSession, int]] = {}
        """By trajectory, with the epoch of the lease that was given back."""
        self._deaths: Counter[int] = Counter()
        """Programs that were killed, of each trajectory that is not complete."""
        self._failures: list[str] = []
        """What programs failed at since one of them asked for a turn."""

    @property
    def most(self) -> int:
        """Programs that this actor may run at a time."""
        return math.ceil(self._agents.concurrency / self._config.rollout.num_actors)

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
        session = self._session(lease, episode, held)
        session.is_judged = row is not None and len(row["turns"]) > 0
        held.open(session, unanswered=0, whole=False)

    def let_go(self, held: HeldTrajectory, *, stays: bool) -> list[tuple[str, str]]:
        """A lease has ended; where the trajectory `stays` partial its program waits. Returns what is to be noted."""
        session = held.session
        assert isinstance(session, AgentSession)
        notes, session.notes = session.notes, []
        if stays and held.stop in ("budget", "abort") and not session.over:
            self._parked[held.id] = (session, held.epoch)
        else:
            session.close("its trajectory is complete" if held.stop is not None else "another actor has its lease")
            self._deaths[held.id] += held.stop == "abort" and stays
            if held.stop not in ("budget", "abort"):
                self._deaths.pop(held.id, None)
        return notes

    def rewards(self, held: HeldTrajectory) -> Mapping[str, float]:
        """What is to be noted of an episode that ends: what was said of it first stands."""
        session = held.session
        assert isinstance(session, AgentSession)
        return {} if session.is_judged else session.rewards

    def note(self, held: HeldTrajectory, problem: str) -> None:
        """Count what a program failed at.

        Raises:
            PmdflowError: they only fail.
        """
        assert isinstance(held.session, AgentSession)
        if held.session.num_turns:
            self._failures.clear()
            return
        self._failures.append(problem or f"trajectory {held.id}: it ended without a turn; {held.session.refused}")
        if len(self._failures) >= self._agents.max_failures_in_a_row:
            named = self._agents.program or " ".join(self._agents.command or ())
            raise PmdflowError(
                f"{len(self._failures)} agent programs ({named}) ended in a row without a request "
                f"(agents.max_failures_in_a_row); the first: {self._failures[0]}",
                hint="mend the program; what is stored stays, and `pmdflow up` goes on",
            )

    def parked(self) -> dict[int, int]:
        """Trajectories whose programs wait for a lease, each with the epoch of the last one."""
        return {id: epoch for id, (_, epoch) in self._parked.items()}

    def drop(self, trajectory: int) -> None:
        """Another actor goes on with a trajectory: end the program that waits here."""
        session, _ = self._parked.pop(trajectory)
        session.close("another actor goes on with its trajectory")

    def close(self) -> None:
        """End every program that waits."""
        for trajectory in list(self._parked):
            self.drop(trajectory)

    def _session(self, lease: Lease, episode: Episode, held: HeldTrajectory) -> AgentSession:
        control, style = held.control, Style(template_args=self._config.data.sources[0].template_args or {})
        max_chars = (len(lease.prompt) + control.max_tokens) * self._longest
        return AgentSession(
            config=self._agents,
            tokenizer=self._tokenizer,
            history=History(self._tokenizer, style, max_chars),
            style=format_of(self._tokenizer.chat_template) if self._agents.tools == "auto" else self._agents.tools,
            desk=self.desk,
            start_program=partial(self._start, lease),
            trajectory=lease.trajectory,
            epoch=lease.epoch,
            model=self._config.run.name,
            prompt_length=len(lease.prompt),
            max_tokens=control.max_tokens,
            record=Record.of(lease.prompt.tolist(), episode),
            ends=self._ends.union(control.stop_token_ids),
            run_stop=control.stop,
            may_die=self._deaths[lease.trajectory] < MAX_DEATHS,
            sampling={"temperature": control.temperature, "top_p": control.top_p},
        )

    def _start(self, lease: Lease) -> Program:
        agents, named = self._agents, f"{lease.trajectory}-{lease.epoch}"
        key = Credential(self._worker, lease.trajectory, lease.epoch).key(self._place.secret)
        text = lease.text if lease.text is not None else self._tokenizer.decode(lease.prompt.tolist())
        task = {
            "prompt": text,
            "metadata": dict(lease.metadata),
            "messages": lease.metadata.get("messages"),
            "model": self._config.run.name,
            "args": resolve(agents.args),
        }
        address = f"{self._place.address}/episodes/{lease.trajectory}/v1"
        host = self._place.address.rpartition("//")[2].rpartition(":")[0]
        start = partial(
            Program.start,
            agents.command or [sys.executable, "-m", "pmdflow.agents.function", str(agents.program)],
            env={"OPENAI_BASE_URL": address, "OPENAI_API_KEY": key, **_without_proxy(host)},
            task=task,
            work=self._run_dir / "agents" / named,
            log=self._run_dir / "logs" / "agents" / f"{named}.log",
            timeout_s=agents.timeout_s,
        )
        try:
            return start()
        except (OSError, RuntimeError) as error:  # this machine has no process or no room left: it may have later
            return Program.failed(f"it could not be started: {error}")


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


def _without_proxy(host: str) -> dict[str, str]:
    """The gateway is asked directly, besides whatever else is."""
    return {name: ",".join(filter(None, [os.environ.get(name), host])) for name in ("NO_PROXY", "no_proxy")}
