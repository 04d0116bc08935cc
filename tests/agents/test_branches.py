"""Several requests of one episode at a time: other samples, in other branches, generated beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmdflow.agents.requests import Delivered, Posted
from pmdflow.rollout.engines.transformers.engine import TransformersEngine
from pmdflow.store import TrajectoryStore
from pmdflow.types import Mask
from tests.support.agent_world import ASK, Life, World, answer_of, generated_of

FIRST, RETRY = {"attempt": 0}, {"attempt": 1}


def send(life: Life, *messages: Any, how: Any = FIRST, **others: Any) -> str:
    return life.send({"messages": list(messages), "max_tokens": 8, **others}, **how)


def told(life: Life, ids: list[str]) -> list[dict[str, Any]]:
    answers = [life.wait(id) for id in ids]
    assert {answer.status for answer in answers} == {200}, answers
    return [dict(answer.body) for answer in answers]


def trained(world: World, life: Life) -> tuple[int, float]:
    """Generated tokens of an episode's branches in a claim, each with a gradient once; and the sum of their weights."""
    (unscored,) = world.store.unscored(9, 9.0, 0.0)
    world.store.score(unscored.trajectory, unscored.attempt, "scored", 1.0, {})
    assert world.store.claim(1, 0, 5.0).status == "claimed"
    claim = world.store.read_claim(1)
    generated = sum(
        int(((claim.mask[start:end] & Mask.GENERATED) != 0).sum())
        for start, end in zip(claim.cu_seqlens, claim.cu_seqlens[1:], strict=False)
    )
    return generated, float(claim.episode_shares().sum())


def test_samples_that_are_asked_for_at_once_are_distinct_and_each_token_is_trained_once(world: World) -> None:
    life = world.life()
    bodies = told(life, [send(life, ASK, max_tokens=20) for _ in range(4)])
    assert len({body["id"] for body in bodies}) == 4
    assert len({json.dumps(answer_of(body)) for body in bodies}) > 1
    count = sum(body["usage"]["completion_tokens"] for body in bodies)
    assert generated_of(world.store, life.id) == count
    assert len(world.store.trajectory(life.id)["forks"]) == 3
    life.end()
    assert life.notes == []
    assert trained(world, life) == (count, pytest.approx(1.0))


def test_they_are_generated_at_the_same_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    life = world.life()
    active: list[int] = []
    step = world.engine.step
    monkeypatch.setattr(world.engine, "step", lambda: (active.append(world.engine.active()), step())[1])
    told(life, [send(life, ASK, max_tokens=20), send(life, ASK, max_tokens=20, n=2)])
    assert max(active) == min(3, world.engine.num_slots)
    assert len(active) < 45  # one after another they took 60


def test_what_ran_ahead_has_the_log_probs_of_its_own_history(world: World) -> None:
    life = world.life()
    told(life, [send(life, ASK), send(life, {"role": "user", "content": "9 - 4"}), send(life, ASK, max_tokens=12)])
    row = world.store.trajectory(life.id)
    tokens, said = row["tokens"].tolist(), list[int]()
    starts = [(0, 0), *((start, kept) for _, start, kept in row["forks"])]
    for (start, kept), end in zip(starts, [*(start for start, _ in starts[1:]), len(tokens)], strict=True):
        said = [*said[:kept], *tokens[start:end]]
        expected = world.engine.score([*row["prompt"].tolist(), *said])[-(end - start) :]
        own = row["observed"][start:end] == 0
        assert np.allclose(np.asarray(expected)[own], row["logprobs"][start:end][own], atol=1e-3)
    assert len(starts) == 3


def test_sub_agents_that_take_turns_go_on_in_their_own_conversations(world: World) -> None:
    life = world.life()
    said = {name: [{"role": "user", "content": name}] for name in ("plan", "solve", "check")}
    for turn in range(3):
        ids = {name: send(life, *messages) for name, messages in said.items()}
        for name, body in zip(said, told(life, list(ids.values())), strict=True):
            said[name] += [answer_of(body), {"role": "user", "content": f"and {turn}?"}]
    life.end()
    row = world.store.trajectory(life.id)
    assert int((row["observed"] == 0).sum()) <= 9 * 8
    assert len({note for _, note in life.notes}) <= 1  # other conversations begin; none is rewritten
    generated, weight = trained(world, life)
    assert generated == int((row["observed"] == 0).sum())
    assert weight == pytest.approx(1.0)


def test_each_retry_joins_the_request_that_it_is_of(world: World) -> None:
    life = world.life()
    first, second = send(life, ASK), send(life, ASK)
    retries = [send(life, ASK, how=RETRY), send(life, ASK, how=RETRY)]
    one, two, *again = told(life, [first, second, *retries])
    assert [body["id"] for body in again] == [one["id"], two["id"]]
    assert one["id"] != two["id"]
    (later,) = told(life, [send(life, ASK, how={"attempt": 2})])
    assert later["id"] == two["id"]  # nobody has read either: the last is the likeliest


def test_a_retry_of_what_was_lost_before_it_came_is_not_answered_with_what_another_has_read(world: World) -> None:
    life = world.life()
    first = send(life, ASK)
    (body,) = told(life, [first])
    life.hear(first, Delivered())
    (other,) = told(life, [send(life, ASK, how=RETRY)])
    assert other["id"] != body["id"]
    (key,) = told(life, [send(life, ASK, how={**FIRST, "idempotency_key": "k"})])
    (again,) = told(life, [send(life, ASK, how={**RETRY, "idempotency_key": "k"})])
    (another,) = told(life, [send(life, ASK, how={**RETRY, "idempotency_key": "l"})])
    assert key == again
    assert len({body["id"], other["id"], key["id"], another["id"]}) == 4


@pytest.mark.parametrize("steps", [1, 3, 6, 9, 12, 20])
def test_a_death_among_them_generates_nothing_durable_again(world: World, steps: int) -> None:
    life = world.life()
    for _ in range(3):
        send(life, ASK, max_tokens=10)
    for _ in range(steps):
        life.step()
    before = world.store.trajectory(life.id)
    life = world.life()
    bodies = told(life, [send(life, ASK, max_tokens=10) for _ in range(3)])
    after = world.store.trajectory(life.id)
    assert after["tokens"][: len(before["tokens"])].tobytes() == before["tokens"].tobytes()
    assert len({body["id"] for body in bodies}) == 3
    assert generated_of(world.store, life.id) == sum(body["usage"]["completion_tokens"] for body in bodies)


def test_a_spent_budget_and_other_weights_end_what_runs_ahead(world: World) -> None:
    life = world.life()
    world.quota(6)
    ids = [send(life, ASK, max_tokens=20) for _ in range(3)]
    for _ in range(60):
        life.step()
    assert life.programs.parked()
    assert world.engine.active() == 0
    assert generated_of(world.store, life.id) <= 6  # grants bound what is stored, whatever ran ahead
    world.quota(1 << 20)
    life.lease()
    life.step()
    life.holder.forget_ahead()
    bodies = told(life, ids)
    assert generated_of(world.store, life.id) == sum(body["usage"]["completion_tokens"] for body in bodies)


def test_what_runs_ahead_takes_no_slot_from_another_episode(
    tmp_path: Path, engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    world = World(tmp_path, engine, folders[""], group_size=engine.num_slots)
    life = world.life()
    for _ in range(engine.num_slots):
        send(life, ASK, max_tokens=60)
    for _ in range(3):
        life.step()
    leases = world.store.lease(life.name, 0, engine.num_slots - 1, 5.0)
    for lease in leases:
        life.holder.join(lease, grant=lease.grant)
        life.send({"messages": [ASK], "max_tokens": 60}, trajectory=lease.trajectory)
    life.step()
    life.holder.fill_slots()
    assert all(held.phase == "generating" for held in life.holder), [held.phase for held in life.holder]
    for held in list(life.holder):
        life.holder.drop(held.id)
    assert engine.active() == 0
    world.store.close()


def test_everything_at_once_is_correct_whatever_its_order(world: World) -> None:
    rng = np.random.default_rng(0)
    life = world.life()
    ids, texts = list[str](), ["1 + 2", "3 - 1", "9"]
    for _ in range(40):
        what = int(rng.integers(6))
        text = texts[int(rng.integers(3))]
        if what < 3 and len(ids) < 12:
            n, tokens = int(rng.integers(1, 3)), int(rng.integers(1, 6))
            ids.append(send(life, {"role": "user", "content": text}, n=n, max_tokens=tokens))
        elif what == 3:
            life.send(Posted(rewards={f"r{rng.integers(4)}": 1.0}))
        for _ in range(int(rng.integers(4))):
            life.step()
    bodies = told(life, ids)
    assert len({body["id"] for body in bodies}) == len(ids)
    assert generated_of(world.store, life.id) == sum(body["usage"]["completion_tokens"] for body in bodies)
    assert isinstance(world.store, TrajectoryStore)
    life.end()
