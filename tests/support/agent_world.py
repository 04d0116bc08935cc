"""One rollout actor without Ray, and the program of one episode, for which a test speaks."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pmdflow.agents.desk import Incoming, Outgoing
from pmdflow.agents.requests import Posted, parse_turn
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.prompts import make_prompts
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.launching import AgentsPlace
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.programs import Programs
from pmdflow.store import TrajectoryStore
from pmdflow.types import Quota
from tests.support.paths import ROOT

ASK = {"role": "user", "content": "1 + 2"}
MAX_TOKENS = 300


class Quiet:
    """A program that the test speaks for."""

    def __init__(self) -> None:
        self.ended: Future[str] = Future()
        self.rewards: dict[str, float] = {}
        self.killed = self.died = False

    def kill(self) -> None:
        self.killed = True


class Life:
    """One rollout actor without Ray, from its lease to its death, and one program."""

    def __init__(
        self, store: TrajectoryStore, engine: TransformersEngine, config: Config, name: str, run_dir: Path
    ) -> None:
        self.store, self.engine, self.program = store, engine, Quiet()
        self.programs = Programs(config, AgentsPlace(address="", secret=b""), run_dir, name, store.trajectory)
        self.programs._launcher.start = lambda lease: self.program  # type: ignore[method-assign, assignment, return-value]
        self.holder = Holder(engine, LeaseTaker(config, self.programs))
        self.name, self.answers, self.notes, self._number = name, dict[str, Outgoing](), list[tuple[str, str]](), 0
        self.gone: list[HeldTrajectory] = []
        self.epoch = 0
        self.lease(new=True)

    def lease(self, *, new: bool = False) -> None:
        (lease,) = self.store.lease(self.name, 0, 1, 5.0)
        self.epoch = lease.epoch if new else self.epoch
        self.holder.join(lease, grant=lease.grant)
        self.id = lease.trajectory

    def send(self, body: Any, *, chat: bool = True, trajectory: int | None = None, **how: Any) -> str:
        self._number += 1
        id = f"{self.name}.{self._number}"
        self.hear(id, body if isinstance(body, Posted) else parse_turn(body, chat=chat, **how), trajectory)
        return id

    def hear(self, id: str, content: Any, trajectory: int | None = None) -> None:
        of = self.id if trajectory is None else trajectory
        self.programs.desk.submit([Incoming(id=id, trajectory=of, epoch=self.epoch, content=content)])

    def step(self) -> None:
        self.holder.fill_slots()
        if self.engine.active():
            self.holder.step()
        for id, reply in self.holder.take_answers().items():
            if reply.done:
                self.programs.note(self.holder[id], reply.problem)
        self.programs.note_rewards(self.holder, lambda notes: [self.store.turn(*note) for note in notes])
        for held in self.holder.forks():
            assert held.fork is not None
            held.forked(self.store.fork(held.id, held.epoch, held.fork).epoch)
        for held in self.holder.resume(self.store.append(self.holder.segments(next_version=0))[1]):
            self.notes += self.programs.let_go(held, stays=True)
            self.gone.append(held)
        self.answers |= {answer.id: answer for answer in self.programs.desk.take_answers(0.0, "gateway")}

    def wait(self, id: str) -> Outgoing:
        for _ in range(2000):
            if id in self.answers:
                return self.answers[id]
            self.step()
        raise AssertionError(f"{id} is not answered")

    def ask(self, *messages: Any, **others: Any) -> dict[str, Any]:
        answer = self.wait(self.send({"messages": list(messages), "max_tokens": 8, **others}))
        assert answer.status == 200, answer
        return dict(answer.body)

    def end(self, problem: str = "") -> None:
        self.program.ended.set_result(problem)
        for _ in range(50):
            self.step()
        assert len(self.holder) == 0


class World:
    def __init__(
        self, tmp_path: Path, engine: TransformersEngine, model: Path, *options: str, group_size: int = 1
    ) -> None:
        settings = [f"model.path={model}", f"data.max_tokens={MAX_TOKENS}", "eval.prompts=2", "rollout.actors=1"]
        agents = ["agents.command=[agent]", *options]
        self.config = load(ROOT / "configs" / "quickstart.yaml", [*settings, *agents]).config
        self.engine, self.number, self.folder = engine, 0, tmp_path / "store"
        self.open()
        self.store.publish(0)
        self.quota(1 << 20)
        prompt = make_prompts(self.config).prompt(0)
        assert len(prompt.tokens) == 1
        self.store.admit("r", prompt, group_size=group_size, max_tokens=MAX_TOKENS, cursor=0)

    def open(self) -> None:
        self.store = TrajectoryStore(
            self.folder, groups_per_iteration=1, lookahead=9, max_staleness=None, min_group_size=1
        )

    def die(self) -> None:
        """Everything is killed: what is on the disk at this moment is all that the next store knows."""
        left = self.folder.with_name(f"{self.folder.name}-{self.number}")
        shutil.copytree(self.folder, left)
        self.store.close()
        self.folder = left
        self.open()
        self.quota(1 << 20)

    def quota(self, tokens: int) -> None:
        self.store.set_quota(Quota(version=0, groups=9, tokens=tokens, tokens_per_segment=None))

    def life(self) -> Life:
        """Another actor takes the lease; the one before it is dead, with whatever it had not sent."""
        if self.number:
            self.store.fence(f"w{self.number}")
            clear(self.engine)
        self.number += 1
        return Life(self.store, self.engine, self.config, f"w{self.number}", self.folder.parent / "run")


def clear(engine: TransformersEngine) -> None:
    """Forget what an actor that is dead has left in it."""
    for id in list(engine._sequences):
        engine.abort(id)


def generated_of(store: TrajectoryStore, id: int) -> int:
    return int((store.trajectory(id)["observed"] == 0).sum())


def answer_of(body: dict[str, Any]) -> dict[str, Any]:
    return dict(body["choices"][0]["message"])
