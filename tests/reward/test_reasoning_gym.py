"""The verifiers of reasoning-gym."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from pmdflow.data import GymPrompts
from pmdflow.data import gym as gym_data
from pmdflow.reward import reasoning_gym
from pmdflow.reward.rubric import InvalidCompletion


def gym(name: str, **args: Any) -> GymPrompts:
    return GymPrompts(
        name=name, args=args, seed=0, num_held_out=0, tokenize=lambda text: np.zeros(len(text), dtype=np.int32)
    )


def judge(completion: str, metadata: Any) -> float:
    stored = msgpack.unpackb(msgpack.packb(dict(metadata)))
    return reasoning_gym.score(completion=completion, prompt="", metadata=stored)


def test_only_exactly_right_answers_count() -> None:
    metadata = gym("chain_sum").prompt(0).metadata
    right = metadata["answer"]
    assert judge(f"1. a step\nanswer: {right}", metadata) == 1.0
    assert judge(f"answer: 7\nno, ANSWER:\n  {right}  \n", metadata) == 1.0
    assert judge(f"answer: {right}\nno, answer: {int(right) + 1}", metadata) == 0.0
    assert judge(f"answer: I think {right}", metadata) == 0.0  # partial credit in reasoning-gym
    assert judge("\u0130\u0130 answer: " + right, metadata) == 1.0  # its lower case is longer


@pytest.mark.parametrize("completion", ["", "42", "the answer is 42", "answer:", "answer: 4\nanswer: \n"])
def test_no_answer_is_invalid(completion: str) -> None:
    with pytest.raises(InvalidCompletion):
        judge(completion, gym("chain_sum").prompt(0).metadata)


def test_an_answer_on_which_the_verifier_trips_is_invalid() -> None:
    with pytest.raises(InvalidCompletion, match="ValueError"):
        judge("answer: none", gym("prime_factorization").prompt(0).metadata)


def test_composite_is_judged_by_the_data_set_of_the_entry() -> None:
    source = gym("composite", datasets=[{"name": "chain_sum"}, {"name": "spell_backward"}])
    prompts = [source.prompt(cursor) for cursor in range(12)]
    assert {prompt.metadata["dataset"] for prompt in prompts} == {"chain_sum", "spell_backward"}
    for prompt in prompts:
        assert judge(f"answer: {prompt.metadata['answer']}", prompt.metadata) == 1.0
        assert judge("answer: -0.5", prompt.metadata) == 0.0


@pytest.mark.parametrize("name", ["rearc", "graph_color", "countdown", "knights_knaves", "letter_counting"])
def test_entries_survive_the_store(name: str) -> None:
    """Their verifiers compare tuples, look up integer keys or hold NumPy scalars."""
    prompt = gym(name).prompt(0)
    entry = gym_data.make_dataset(name=name, args={}, seed=gym(name)._base)[0]
    assert gym_data.unpack(msgpack.unpackb(msgpack.packb(prompt.metadata["metadata"]))) == entry["metadata"]
    if entry["answer"] is not None:
        assert judge(f"answer: {entry['answer']}", prompt.metadata) == 1.0


@pytest.mark.parametrize("value", [2**80, -(2**63), (1, (2,)), {1: "a", (2, 3): [None]}, {}, [True, 0.5], {"a": {}}])
def test_pack_is_lossless(value: Any) -> None:
    assert gym_data.unpack(msgpack.unpackb(msgpack.packb(gym_data.pack(value)))) == value


def test_metadata_of_another_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"lacks .*'dataset'"):
        reasoning_gym.score(completion="answer: 1", prompt="", metadata={"answer": "1"})
