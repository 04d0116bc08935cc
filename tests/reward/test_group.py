"""Group rewards at the claim: answers compared by their keys, history of a prompt, and who breaks the rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.function import bind
from pmdflow.reward.group import remembers
from pmdflow.reward.judged import Judged, answer_key
from pmdflow.reward.rubric import Rubric
from pmdflow.reward.total import total_rewards
from pmdflow.types import Branches, TrainBatch
from tests.support.learner import make_batch


def majority(view, history):
    """1 for the most frequent answer."""
    keys, counts = np.unique(view.answers["lengths.longer"], return_counts=True)
    return {"majority": (view.answers["lengths.longer"] == keys[counts.argmax()]).astype(float)}


@remembers(2)
def seen(view, history, scale=1.0):
    return {
        "visits": np.full(len(view.rewards), scale * len(history)),
        "last": np.full(len(view.rewards), _last(history)),
    }


def _last(history) -> float:
    return history[-1]["correct"] if history else 0.0


def broken(view, history):
    return {"bad": np.zeros(1)}


def config(*names: str, **options) -> RewardConfig:
    group = [{"function": f"tests.reward.test_group:{name}", "weight": 0.5} for name in names]
    return RewardConfig.model_validate(
        {"functions": [{"function": "tests.support.lengths:longer"}], "group": group, **options}
    )


@pytest.fixture
def batch() -> TrainBatch:
    made = make_batch(groups=2)
    answers = np.array([answer_key(text) for text in ("4", "4", "5", "7", "8", "8")])
    components = {"lengths.longer": np.ones(6), "lengths.longer.answer": answers}
    return replace(made, rewards=np.array([1.0, 1, 0, 0, 1, 1]), components=components)


def test_answers_of_a_group_are_compared(batch) -> None:
    rewards = total_rewards(batch, config("majority"))
    np.testing.assert_array_equal(rewards.total - rewards.task, [0.5, 0.5, 0, 0, 0.5, 0.5])
    assert rewards.metrics()["reward/group_test_group.majority.majority_mean"] == pytest.approx(4 / 6)
    assert set(rewards.components) == {"lengths.longer", "test_group.majority.majority"}, "keys are no rewards"
    assert rewards.weights == {"lengths.longer": 1.0, "test_group.majority.majority": 0.5}
    np.testing.assert_array_equal(total_rewards(batch, config()).total, batch.rewards)


def test_an_answer_is_stored_beside_its_value() -> None:
    def read(*, completion):
        return Judged(value=float(completion == "4"), answer=completion or None)

    rubric = Rubric(functions=[bind(read, name="read")], invalid=0.0, max_abs=10.0)
    scored = rubric(completion="4")
    assert scored.reward == 1 and scored.components == {"read": 1.0, "read.answer": answer_key("4")}
    assert rubric(completion="").components == {"read": 0.0}
    keys = [answer_key(str(number)) for number in range(1000)]
    assert len(set(keys)) == 1000 and all(key == int(key) and 0 <= key < 2**53 for key in keys)


def test_history_of_a_prompt_is_remembered_and_bounded(batch) -> None:
    memory, visits = {}, []
    for iteration in range(1, 5):
        rewards = total_rewards(replace(batch, iteration=iteration), config("seen"), memory)
        memory = rewards.memory
        visits.append(rewards.components["test_group.seen.visits"][0])
        assert rewards.components["test_group.seen.last"][0] == (pytest.approx(2 / 3) if iteration > 1 else 0)
    assert visits == [0, 1, 2, 2]
    assert [one["iteration"] for one in memory["p0"]] == [3, 4]
    assert sorted(count for _, count in memory["p0"][0]["answers"]["lengths.longer"]) == [1, 2]
    assert total_rewards(batch, config("majority")).memory == {}, "nothing is kept that nobody asks for"


def test_branches_have_the_reward_of_their_episode(batch) -> None:
    parents = np.array([-1, 0, -1, -1, -1, -1])
    branches = Branches(episodes=np.array([0, 0, 2, 3, 4, 5]), parents=parents, fork_offsets=np.zeros(6, np.int32))
    rewards = total_rewards(replace(batch, branches=branches), config("majority"))
    assert rewards.total[0] == rewards.total[1]
    assert len(rewards.components["test_group.majority.majority"]) == 6


def test_a_group_reward_that_breaks_a_rule_is_named(batch) -> None:
    with pytest.raises(ValueError, match=r"test_group\.broken: 'bad' is .* for the 3 episodes of p0"):
        total_rewards(batch, config("broken"))
    with pytest.raises(ValueError, match="has no 'absent'"):
        total_rewards(batch, config("absent"))
