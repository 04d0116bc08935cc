"""Trajectories of several turns: replay, deadlines and keys of environments, and what the learner sees of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.load import load
from pmdflow.config.schema import Config, EnvironmentConfig
from pmdflow.dashboard.trajectories import detail, part_rows
from pmdflow.data.prompts import make_prompts
from pmdflow.data.sampling import SamplingControl
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.environments.calculator import Calculator
from pmdflow.environments.protocol import Environment, Observation, load_environment
from pmdflow.learner.batch import pack
from pmdflow.learner.objective import pmd_loss
from pmdflow.rollout.engine import Output
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.turns import Reply, Session, Turn, split_turns
from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import read_part, write_part
from pmdflow.types import Lease, Mask, Quota, Stop, TrainBatch
from tests.support.paths import ROOT

MODEL = str(ROOT / "configs" / "tiny-calculator")
WAIT_S = 30.0
tokenizer: Any = load_tokenizer(MODEL)
ids = st.integers(2, 300)


@pytest.fixture(scope="module")
def config() -> Config:
    return load(ROOT / "configs" / "calculator.yaml", ["eval.prompts=4"]).config


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(model_path=MODEL, dtype="float32", num_slots=16, threads=1, seed=0, device="cpu")


def make_session(environment: Any, *, said: tuple[int, ...] | None = None, timeout_s: float = 20.0) -> Session:
    return Session(
        make=lambda: environment,
        tokenizer=tokenizer,
        config=EnvironmentConfig(factory="a:b", timeout_s=timeout_s, failure=" = ?\n"),
        key="run/7",
        prompt="1 + 1 =",
        metadata={"answer": "2"},
        said=said,
        turns=[],
    )


def answer_of(session: Session) -> Reply:
    assert session.call is not None
    wait([session.call], timeout=min(WAIT_S, session.config.timeout_s * (2 + len(session.turns)) + 0.01))
    reply = session.poll()
    assert reply is not None
    return reply


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Echo:
    """Answers with how often it was called, as one that keeps state; remembers the keys."""

    def __init__(self, keys: list[str]) -> None:
        self.keys, self.count = keys, 0

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        self.keys.append(key)
        return Observation(text=f"{prompt} {metadata['answer']}")

    def step(self, *, key: str, action: str) -> Observation:
        self.keys.append(key)
        self.count += 1
        if action == "9":
            raise RuntimeError("no such digit")
        return Observation(text=f"{action}: {self.count}", done=action == "7")


@given(first=st.lists(ids, max_size=3), turns=st.lists(st.tuples(st.lists(ids, min_size=1), st.lists(ids, min_size=1))))
def test_the_record_splits_into_its_turns(first: list[int], turns: list[tuple[list[int], list[int]]]) -> None:
    tokens = np.array([*first, *(t for a, o in turns for t in [*a, *o])], np.int32)
    flags = [1] * len(first) + [f for a, o in turns for f in [0] * len(a) + [1] * len(o)]
    said, found = split_turns(tokens, np.array(flags, np.uint8))
    assert said == tuple(first)
    assert found == [Turn(action=tuple(a), observed=tuple(o)) for a, o in turns]


def test_calls_have_keys_of_their_own_and_a_replay_repeats_them() -> None:
    keys: list[str] = []
    session = make_session(Echo(keys))
    session.start(None)
    assert answer_of(session) == Reply(tokens=tokens_of("1 + 1 = 2"))
    session.start(tokens_of("3"))
    assert answer_of(session).tokens == tokens_of("3: 1")
    assert keys == ["run/7/0", "run/7/1"]
    again: list[str] = []
    later = make_session(Echo(again), said=session.said)
    later.turns = list(session.turns)
    later.start(tokens_of("7"))
    assert answer_of(later) == Reply(tokens=tokens_of("7: 2"), done=True)
    assert again == ["run/7/0", "run/7/1", "run/7/2"]


def test_an_environment_that_answers_otherwise_ends_the_trajectory() -> None:
    session = make_session(Echo([]), said=tokens_of("1 + 1 = 2"))
    session.turns = [Turn(action=tokens_of("3"), observed=tokens_of("3: 5"))]
    session.start(tokens_of("4"))
    reply = answer_of(session)
    assert reply.done and not reply.tokens
    assert "run/7" in reply.problem and "'3: 5' before" in reply.problem and "'3: 1'" in reply.problem


def test_a_failing_call_is_read_by_the_model_and_passed_over_in_a_replay() -> None:
    session = make_session(Echo([]), said=tokens_of("1 + 1 = 2"))
    session.start(tokens_of("9"))
    reply = answer_of(session)
    assert reply.tokens == tokens_of(" = ?\n") and not reply.done and "no such digit" in reply.problem
    keys: list[str] = []
    later = make_session(Echo(keys), said=session.said)
    later.turns = list(session.turns)
    later.start(tokens_of("3"))
    assert answer_of(later).tokens == tokens_of("3: 1")
    assert keys == ["run/7/0", "run/7/2"]


class Slow(Echo):
    """Does not answer `8` until it is let go."""

    released = threading.Event()

    def step(self, *, key: str, action: str) -> Observation:
        if action == "8":
            self.released.wait(timeout=WAIT_S)
        return super().step(key=key, action=action)


def test_a_slow_call_has_a_deadline_and_holds_up_nobody() -> None:
    slow, other = make_session(Slow([]), timeout_s=0.05), make_session(Echo([]))
    slow.make = lambda: Slow([])
    slow.start(None)
    answer_of(slow)
    slow.start(tokens_of("8"))
    other.start(None)
    assert answer_of(other).tokens == tokens_of("1 + 1 = 2")
    reply = answer_of(slow)
    assert reply.tokens == tokens_of(" = ?\n") and "within 0.05 s" in reply.problem
    slow.config = slow.config.model_copy(update={"timeout_s": 20.0})
    slow.start(tokens_of("3"))
    assert answer_of(slow).tokens == tokens_of("3: 1")
    Slow.released.set()


def make_held(*, max_tokens: int, session: Session | None) -> HeldTrajectory:
    lease = Lease(
        trajectory=7, group=0, epoch=1, kind="train", metadata={}, text="p", prompt=np.array([5], np.int32),
        prefix=np.zeros(0, np.int32), prefix_observed=np.zeros(0, np.uint8), max_tokens=max_tokens, grant=9,
    )  # fmt: skip
    control = SamplingControl(temperature=1.0, max_tokens=max_tokens)
    return HeldTrajectory(lease=lease, control=control, limit=9, context=[], session=session)


def test_an_answer_that_is_too_long_is_cut_and_ends_the_trajectory() -> None:
    held = make_held(max_tokens=5, session=make_session(Echo([])))
    held.take(Output(id=7, tokens=(11, 12, 13), logprobs=(-1.0, -1.0, -1.0), stop="stop"))
    assert held.phase == "ended" and held.stop is None and held.urgent
    first = held.segment(version=2, next_version=2)
    assert (first.observed, first.tokens.tolist(), held.closed) == (False, [11, 12, 13], False)
    held.answer(Reply(tokens=(21, 22, 23)))
    second = held.segment(version=3, next_version=3)
    assert (second.observed, second.tokens.tolist(), second.offset, second.stop) == (True, [21, 22], 3, "length")
    assert held.closed


def test_a_last_turn_without_room_for_an_answer_ends_the_trajectory() -> None:
    held = make_held(max_tokens=2, session=make_session(Echo([])))
    held.take(Output(id=7, tokens=(11, 12), logprobs=(-1.0, -1.0), stop="stop"))
    assert held.stop == "stop" and held.phase != "ended"


def test_an_end_without_words_is_sent_before_the_trajectory_is_let_go() -> None:
    held = make_held(max_tokens=9, session=make_session(Echo([])))
    held.take(Output(id=7, tokens=(11,), logprobs=(-1.0,), stop="stop"))
    held.segment(version=0, next_version=0)
    held.answer(Reply(done=True))
    assert held.stop == "stop" and not held.closed
    assert held.segment(version=0, next_version=0).stop == "stop" and held.closed


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("so [12 + 30]", " = 42\n"),
        ("[5 - 7 - 1]", " = -3\n"),
        ("[-5]", " = -5\n"),
        ("[1 +]", " = ?\n"),
        ("5]", " = 5\n"),
    ],
)
def test_the_calculator(action: str, text: str) -> None:
    assert Calculator().step(key="k", action=action) == Observation(text=text)
    assert Calculator().step(key="k", action="answer: 42") == Observation(done=True)


def test_a_wrong_factory_is_named() -> None:
    with pytest.raises(ValueError, match=r"environment.factory pmdflow.environments.calculator:Abacus"):
        load_environment(EnvironmentConfig(factory="pmdflow.environments.calculator:Abacus"))
    with pytest.raises(ValueError, match="base"):
        load_environment(EnvironmentConfig(factory="pmdflow.environments.calculator:Calculator", args={"base": 2}))
    environment: Environment = load_environment(EnvironmentConfig(factory=f"{Calculator.__module__}:Calculator"))()
    assert environment.reset(key="k", prompt="", metadata={}) == Observation()


def play(
    held: list[HeldTrajectory], engine: TransformersEngine, taker: LeaseTaker, store: TrajectoryStore | None = None
) -> None:
    """What a rollout actor does, without its waits; with a store everything goes through it."""

    def send() -> None:
        segments = [one.segment(version=0, next_version=0) for one in held if not one.closed]
        if store is not None:
            assert not any(grant.stale for grant in store.append(segments)[1])

    for one in held:
        if one.phase == "waiting":
            engine.add(one.begin())
    while any(not one.closed for one in held):
        for output in engine.step():
            one = next(one for one in held if one.lease.trajectory == output.id)
            one.take(output)
            if output.stop is None and (one.stop is not None or one.phase != "generating"):
                engine.abort(output.id)
        send()
        for one in [one for one in held if not one.closed and one.phase in ("ended", "calling")]:
            assert one.session is not None
            if one.phase == "ended":
                one.session.start(tuple(one.context[one.turn_start :]))
            one.answer(answer_of(one.session))
        send()
        for one in [one for one in held if not one.closed and one.session and one.session.call is None]:
            if one.phase == "answered" or one.lease.trajectory not in engine._sequences:
                taker.watch(one)
                engine.add(one.begin())


@pytest.fixture(scope="module")
def finished(config: Config, engine: TransformersEngine) -> Iterator[tuple[TrajectoryStore, list[HeldTrajectory]]]:
    torch.set_num_threads(1)
    prompts, taker = make_prompts(config), LeaseTaker(config)
    store = TrajectoryStore(None, groups_per_iteration=2, lookahead=1, max_staleness=4)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=2, tokens=10_000, tokens_per_segment=None))
    for cursor in range(2):
        store.admit(f"t{cursor}", prompts.prompt(cursor), cursor=cursor, group_size=8, max_tokens=64)
    leases = store.lease("rollout-0", version=0, max_leases=16, timeout_s=0.0)
    held = [taker.take(lease, limit=lease.max_tokens, version=0) for lease in leases]
    play(held, engine, taker, store)
    yield store, held
    store.close()


@pytest.fixture(scope="module")
def claim(finished: tuple[TrajectoryStore, list[HeldTrajectory]]) -> TrainBatch:
    store, _ = finished
    unscored = store.unscored(99, 9.0, 0.0)
    assert len(unscored) == 16
    for item in unscored:
        store.score(item.trajectory, item.attempt, "scored", float(item.observed.any()))
    assert store.claim(1, 0, 0.0).status == "claimed"
    return store.read_claim(1)


def test_a_model_calls_the_calculator_and_reads_its_answer(claim: TrainBatch) -> None:
    called = 0
    for start, end, length in zip(claim.cu_seqlens, claim.cu_seqlens[1:], claim.prompt_lengths, strict=False):
        tokens, observed = claim.tokens[start + length : end], claim.mask[start + length : end] == 0
        if observed.any():
            called += 1
            _, turns = split_turns(tokens, observed.astype(np.uint8))
            action, answer = tokenizer.decode(turns[0].action), tokenizer.decode(turns[0].observed)
            assert Calculator().step(key="", action=action).text == answer
    assert called >= 2
    assert set(claim.stops.tolist()) <= {Stop.STOP, Stop.LENGTH}


def test_observed_tokens_are_in_no_loss_and_every_record_keeps_them(claim: TrainBatch, tmp_path: Path) -> None:
    first = claim.cu_seqlens[:-1]
    in_prompt = np.zeros(len(claim.tokens), bool)
    for start, length in zip(first, claim.prompt_lengths, strict=True):
        in_prompt[start : start + length] = True
    observed = ~in_prompt & (claim.mask & Mask.GENERATED == 0)
    assert observed.sum() > 0
    assert (claim.mask[observed] == 0).all() and (claim.logprobs[observed] == 0).all()
    assert (claim.versions[observed] == -1).all() and (claim.versions[~observed & ~in_prompt] == 0).all()
    path = write_part(tmp_path, claim, attrs={})
    back = read_part(path)
    assert back.mask.tobytes() == claim.mask.tobytes() and back.versions.tobytes() == claim.versions.tobytes()
    row = max(part_rows(path), key=lambda row: row.reward)
    shown = detail(tmp_path, 1, row.trajectory, None)
    assert shown is not None
    assert row.length == sum(token.generated for token in shown.tokens)
    assert sum(token.hint.startswith("observed") for token in shown.tokens) > 0


def test_u_and_the_length_run_over_generated_tokens_only(claim: TrainBatch) -> None:
    trained = (claim.mask & Mask.TRAINED) != 0
    chosen = tuple(range(len(claim.trajectories)))
    micro = pack(claim, trained=trained, trajectories=chosen)
    generated = claim.mask & Mask.GENERATED != 0
    assert len(micro.targets) == generated.sum()
    rng = np.random.default_rng(0)
    now, reference = (rng.normal(size=len(claim.tokens)) for _ in range(2))
    advantages = rng.normal(size=len(chosen))
    terms = []
    for index, (start, end) in enumerate(zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False)):
        where = np.flatnonzero(generated[start:end]) + start
        u = (now[where] - reference[where]).sum()
        terms.append(0.05 * (advantages[index] / 0.1 - u) ** 2 / len(where))
    order = np.flatnonzero(generated)
    loss = pmd_loss(
        torch.tensor(now[order]), torch.tensor(reference[order]), torch.tensor(advantages),
        torch.tensor(micro.trained), tau=0.1, cu_seqlens=torch.tensor(micro.cu_seqlens),
    )  # fmt: skip
    assert float(loss) == pytest.approx(np.mean(terms))
    # The logit before each generated token predicts it, also behind an observation.
    flat = micro.tokens.reshape(-1)
    assert (flat[micro.positions + 1] == micro.targets).all()


def test_a_trajectory_goes_on_from_any_token_as_if_it_was_never_interrupted(
    config: Config, engine: TransformersEngine, finished: tuple[TrajectoryStore, list[HeldTrajectory]]
) -> None:
    greedy = config.model_copy(update={"eval": config.eval.model_copy(update={"temperature": 0.0})})
    taker, checked = LeaseTaker(greedy), 0
    source = next(one for one in finished[1] if one.session is not None and one.session.turns[0].observed)
    action = source.session.turns[0].action if source.session is not None else ()
    base = replace(source.lease, kind="eval")

    def continued(prefix: tuple[int, ...], flags: list[int]) -> HeldTrajectory:
        lease = replace(base, prefix=np.array(prefix, np.int32), prefix_observed=np.array(flags, np.uint8))
        held = taker.take(lease, limit=64, version=0)
        play([held], engine, taker)
        return held

    whole = continued(action, [0] * len(action))
    answer = whole.session.turns[0].observed if whole.session is not None else ()
    flags = [0] * len(action) + [1] * len(answer)
    flags += [0] * (len(whole.context) - len(flags))
    for cut in range(1, len(whole.context)):
        if flags[cut - 1] == 1 and flags[cut] == 1:
            continue  # an answer is appended whole
        held = continued(tuple(whole.context[:cut]), flags[:cut])
        if cut >= len(action):
            assert held.context == whole.context
            checked += 1
    assert checked >= 4
