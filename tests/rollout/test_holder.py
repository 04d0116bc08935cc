"""Held trajectories against a real store: budgets, new weights, fenced and vanished workers, failing environments."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.prompts import make_prompts
from pmdflow.environments.protocol import Observation
from pmdflow.reward.runner import RewardRunner, ScoreItem
from pmdflow.rollout.engines.simulated import SimulatedEngine
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.turns import Turn, split_turns
from pmdflow.store import TrajectoryStore
from pmdflow.types import Prompt, Quota, Segment, Stop
from tests.support.environments import Moody, fails_to_begin, tokenizer, tokens_of
from tests.support.paths import ROOT

GROUPS, SIZE, SLOTS = 2, 3, 4
EOS = SimulatedEngine.EOS


def make_config(environment: str, *overrides: str) -> Config:
    factory = f"environment.factory=tests.support.environments:{environment}"
    return load(ROOT / "configs" / "calculator.yaml", [factory, "environment.timeout_s=60", *overrides]).config


MOODY = make_config("Moody", f"rollout.stop_token_ids=[{EOS}]")
LOADED = ("_tokenizer", "_ends", "_environment", "_speech")
"""What takes long to load, and is the same for every worker."""
TAKER = LeaseTaker(MOODY)


@dataclass
class World:
    """A store, the worker that is alive, and what may happen to them."""

    rng: random.Random
    max_tokens: int
    tokens: int
    """Budget of a version."""
    tokens_per_segment: int | None
    grant_tokens: int
    worker: int = 0
    version: int = 0
    store: TrajectoryStore = field(init=False)
    engine: SimulatedEngine = field(init=False)
    taker: LeaseTaker = field(init=False)
    holder: Holder = field(init=False)

    def __post_init__(self) -> None:
        self.store = TrajectoryStore(
            None, groups_per_iteration=GROUPS, lookahead=0, max_staleness=None, grant_tokens=self.grant_tokens
        )
        self.publish(0)
        for number in range(GROUPS):
            prompt = Prompt(id=str(number), text="", tokens=np.array([5, 6], np.int32))
            self.store.admit(str(number), prompt, cursor=number, group_size=SIZE, max_tokens=self.max_tokens)
        self.start()

    def publish(self, version: int) -> None:
        self.store.publish(version)
        self.store.set_quota(
            Quota(version=version, groups=GROUPS, tokens=self.tokens, tokens_per_segment=self.tokens_per_segment)
        )

    def start(self) -> None:
        """A worker with nothing but the newest weights."""
        self.engine = SimulatedEngine(num_slots=SLOTS, seed=self.worker, median_tokens=6.0)
        self.engine.load_weights(self.version, {}, on_new_weights="keep_kv")
        if self.worker:
            self.taker.close_environments()
        self.taker = LeaseTaker(MOODY, None, self.store.trajectory)
        vars(self.taker).update({name: getattr(TAKER, name) for name in LOADED})
        self.holder = Holder(self.engine, self.taker)

    def lease(self) -> None:
        wanted = SLOTS + 1 - self.holder.num_open
        if wanted > 0:
            for lease in self.store.lease(str(self.worker), self.version, wanted, 0.0):
                self.holder.join(lease, grant=lease.grant)

    def step(self) -> None:
        self.holder.fill_slots()
        if self.engine.active():
            assert self.holder.step() > 0

    def answer(self) -> None:
        if self.holder.num_calling:
            self.holder.wait_answer()
            self.holder.take_answers()

    def append(self, segments: list[Segment]) -> None:
        """What was said of episodes, then the segments."""
        self.note()
        for held in self.holder.resume(self.store.append(segments)[1]):
            self.taker.let_go(held, stays=True)

    def note(self) -> None:
        for note in self.holder.notes():
            self.store.turn(*note, wait=False)

    def send(self) -> None:
        self.append(self.holder.segments(next_version=self.version))

    def send_urgent(self) -> None:
        """What is not urgent stays unsent, and goes on."""
        quiet = {one.id: len(one.tokens) for one in self.holder._held.values() if not one.urgent}
        segments = self.holder.segments(next_version=self.version, urgent=True)
        assert all(len(self.holder._held[id].tokens) == count for id, count in quiet.items())
        assert self.holder.urgent is False and quiet.keys().isdisjoint(one.trajectory for one in segments)
        self.append(segments)

    def swap(self) -> None:
        self.version += 1
        self.publish(self.version)
        segments = self.holder.segments(next_version=self.version)
        self.engine.load_weights(self.version, {}, on_new_weights="keep_kv")
        self.append(segments)

    def fence(self) -> None:
        """The worker lives on and learns of it from the store."""
        self.store.fence(str(self.worker))
        self.worker += 1

    def vanish(self) -> None:
        self.fence()
        self.start()

    def vanish_amidst(self) -> None:
        """What was said is noted, the rest lost."""
        self.note()
        self.vanish()

    def drop_parked(self) -> None:
        """Others may have gone on with what waits."""
        for id in list(self.taker.parked()):
            self.taker.drop(id)

    def give_back(self) -> None:
        self.holder.abort()
        self.send()
        assert len(self.holder) == 0

    def run(self) -> None:
        """Let things happen until every trajectory is complete."""
        often, seldom = [self.lease, self.step, self.step, self.answer, self.send_urgent], [self.swap, self.fence]
        seldom += [self.vanish, self.vanish_amidst, self.give_back, self.drop_parked, self.send, self.send]
        for _ in range(10_000):
            if self.store.counts().trajectories_unscored == GROUPS * SIZE:
                return
            self.rng.choice(often if self.rng.random() < 0.97 else seldom)()
            held = self.holder._held.values()
            assert self.engine._sequences.keys() == {one.id for one in held if one.phase == "generating"}
        raise AssertionError(f"not complete: {self.store.counts()}")


def answers(id: int, turns: list[Turn]) -> Iterator[Observation]:
    """What the environment says to each turn, by its keys; a failed call is answered with `environment.failure`."""
    for number, turn in enumerate(turns, 1):
        try:
            yield Moody().step(key=f"{MOODY.run.name}/{id}/{number}", action=str(tokenizer.decode(turn.action)))
        except ConnectionError:
            assert MOODY.environment is not None
            yield Observation(text=MOODY.environment.failure)


def check_record(row: dict[str, Any], *, max_tokens: int) -> None:
    """The stored tokens are an alternation of turns and of the answers that belong to them."""
    id, said, turns = row["trajectory"], *split_turns(row["tokens"], row["observed"])
    try:
        first = Moody().reset(key=f"{MOODY.run.name}/{id}/0", prompt="", metadata={})
    except ConnectionError:
        assert (len(row["tokens"]), row["stop"]) == (0, Stop.STOP)
        return
    full = len(row["tokens"]) == max_tokens
    pairs = [(said, first), *zip((turn.observed for turn in turns), answers(id, turns), strict=True)]
    for number, (observed, says) in enumerate(pairs, 1):
        whole, is_last = tokens_of(says.text), number == len(pairs)
        assert observed == whole or (is_last and full and observed == whole[: len(observed)])
        assert (says.done or full) if is_last else not says.done
    check_notes(row, [says for _, says in pairs], turns, max_tokens=max_tokens)
    for turn in turns:
        assert EOS not in turn.action[:-1]
        ends = turn.action[-1] in (EOS, tokenizer.eos_token_id) or "]" in tokenizer.decode(turn.action[-1:])
        assert ends or turn is turns[-1]


def check_notes(row: dict[str, Any], answers: list[Observation], turns: list[Turn], *, max_tokens: int) -> None:
    """What was said of it is there once, each where it was said."""
    expected, offset = [], 0
    for turn, says in zip([None, *turns], answers, strict=False):
        offset += 0 if turn is None else len(turn.action)
        if turn is not None and not turn.observed and len(row["tokens"]) == max_tokens:
            break  # the last turn filled the trajectory, and was not answered
        rewards = dict(says.metrics) | ({} if says.reward is None else {"reward": says.reward})
        if rewards or says.key is not None:
            expected.append((offset, rewards, says.key))
        offset += len(turn.observed) if turn is not None else len(tokens_of(says.text))
    assert row["turns"] == expected


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_tokens=st.integers(1, 40),
    tokens=st.integers(20, 200),
    tokens_per_segment=st.none() | st.integers(2, 12),
    grant_tokens=st.integers(1, 9),
)
def test_whatever_happens_the_store_holds_turns_and_their_answers(
    seed: int, max_tokens: int, tokens: int, tokens_per_segment: int | None, grant_tokens: int
) -> None:
    Moody.salt = seed
    world = World(random.Random(seed), max_tokens, tokens, tokens_per_segment, grant_tokens)
    world.run()
    for group in world.store.groups():
        for id in group["trajectories"]:
            check_record(world.store.trajectory(id), max_tokens=max_tokens)
    world.store.close()


def test_a_trajectory_whose_environment_never_begins_is_complete_empty_and_judged() -> None:
    config = make_config("SometimesBegins", "eval.prompts=1")
    prompts, engine = make_prompts(config), SimulatedEngine(num_slots=9, median_tokens=6.0)
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=None, max_attempts=1)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=2, tokens=999, tokens_per_segment=None))
    for cursor in range(2):
        store.admit(f"t{cursor}", prompts.prompt(cursor), cursor=cursor, group_size=4, max_tokens=64)
    store.admit("eval-0", prompts.held_out(1)[0], kind="eval", group_size=1, max_tokens=64)
    holder, problems = Holder(engine, LeaseTaker(config)), []
    for lease in store.lease("rollout-0", version=0, max_leases=9, timeout_s=0.0):
        holder.join(lease, grant=lease.grant)
    while len(holder):
        holder.fill_slots()
        holder.step()
        holder.wait_answer()
        problems += [reply.problem for reply in holder.take_answers().values() if reply.problem]
        holder.resume(store.append(holder.segments(next_version=0))[1])
    unscored = store.unscored(99, 9.0, 0.0)
    empty = {item.trajectory for item in unscored if not len(item.tokens)}
    assert empty == {id for id in range(9) if fails_to_begin(f"calculator/{id}/0")} == {2, 5, 7, 8}
    assert sorted(problems) == [
        f"calculator/{id}: the trajectory ends: ConnectionError: no server" for id in sorted(empty)
    ]
    assert all(item.stop == Stop.STOP for item in unscored if item.trajectory in empty)
    with RewardRunner(config.reward) as runner:
        scores = runner.map([ScoreItem(completion="", prompt="", metadata=item.metadata) for item in unscored])
    (failing,) = {item.group for item in unscored if item.trajectory == 5}
    for item, scored in zip(unscored, scores, strict=True):
        assert (scored.outcome, scored.reward) == ("invalid", 0.0) and "no 'answer:'" in scored.message
        store.score(item.trajectory, item.attempt, "infra_failure" if item.group == failing else scored.outcome)
    (held_out,) = store.eval_results("eval-", 0.0) or []
    assert (held_out.reward, held_out.length, held_out.first_version, held_out.last_version) == (0.0, 0, None, None)
    assert store.claim(1, 0, 0.0).status == "claimed"
    claim = store.read_claim(1)
    assert claim.trajectories.tolist() == [0, 1, 2, 3]
    assert (np.diff(claim.cu_seqlens) == claim.prompt_lengths).tolist() == [False, False, True, False]
    store.close()


@pytest.mark.nightly
@settings(max_examples=600, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_tokens=st.integers(1, 60),
    tokens=st.integers(20, 400),
    tokens_per_segment=st.none() | st.integers(2, 20),
    grant_tokens=st.integers(1, 20),
)
def test_whatever_happens_long(
    seed: int, max_tokens: int, tokens: int, tokens_per_segment: int | None, grant_tokens: int
) -> None:
    test_whatever_happens_the_store_holds_turns_and_their_answers.hypothesis.inner_test(
        seed, max_tokens, tokens, tokens_per_segment, grant_tokens
    )
