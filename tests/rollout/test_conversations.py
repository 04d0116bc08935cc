"""Trajectories that talk to a calculator, through a real engine and store, and what the learner sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.dashboard.trajectories import detail, part_rows
from pmdflow.data.prompts import make_prompts
from pmdflow.environments.calculator import Calculator
from pmdflow.learner.batch import pack
from pmdflow.learner.objective import pmd_loss
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.turns import split_turns
from pmdflow.store import TrajectoryStore
from pmdflow.store.archive import read_part, write_part
from pmdflow.types import Grant, Lease, Mask, Quota, Segment, Stop, TrainBatch
from tests.support.environments import MODEL, tokenizer
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def config() -> Config:
    return load(ROOT / "configs" / "calculator.yaml", ["eval.prompts=4"]).config


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(model_path=MODEL, dtype="float32", num_slots=16, threads=1, seed=0, device="cpu")


def play(
    leases: Sequence[Lease],
    engine: TransformersEngine,
    taker: LeaseTaker,
    append: Callable[[Sequence[Segment]], Sequence[Grant]],
) -> list[HeldTrajectory]:
    """Hold leases until all are over."""
    holder, gone = Holder(engine, taker), []
    for lease in leases:
        holder.join(lease, grant=lease.grant)
    while len(holder):
        holder.fill_slots()
        if engine.active():
            holder.step()
        else:
            holder.wait_answer()
        holder.take_answers()
        gone += holder.resume(append(holder.segments(next_version=0)))
    return gone


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
    yield store, play(leases, engine, taker, lambda segments: store.append(segments)[1])
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
        (held,) = play([lease], engine, taker, lambda segments: [grant(segment) for segment in segments])
        return held

    def grant(segment: Segment) -> Grant:
        return Grant(trajectory=segment.trajectory, stale=False, tokens=64)

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
