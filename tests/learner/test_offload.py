"""A learner that gives its device away and takes it back trains on as if nothing had happened."""

from __future__ import annotations

import pytest
import torch

from pmdflow.learner.aside import Aside
from tests.support.learner import make_batch, make_config, same_weights


def held_bytes(learner) -> int:
    tensors = [*learner._policy.parameters(), *learner._policy.buffers()]
    tensors += [value for state in learner._optimizer.state.values() for value in state.values()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in local}.values())


def test_what_is_put_aside_has_no_memory_and_comes_back():
    whole = torch.arange(12.0)
    view, other = whole[4:8], torch.ones(3, dtype=torch.bfloat16)
    aside = Aside()
    for turn in range(3):
        aside.put([whole, view, other])
        aside.put([whole, view, other])  # a second time changes nothing
        assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        aside.take_back()
        aside.take_back()
        assert torch.equal(whole, torch.arange(12.0) + turn) and torch.equal(other, torch.ones(3, dtype=torch.bfloat16))
        assert view.data_ptr() == whole.data_ptr() + 16
        whole += 1  # what is put aside next is what it is then
    assert torch.equal(view, torch.arange(4.0, 8.0) + 3)


@pytest.mark.parametrize("settings", [{}, {"reset_optimizer": True}, {"lora": {"rank": 2}}])
def test_a_learner_trains_on_as_if_it_had_never_offloaded(start, model_path, tmp_path, settings):
    config = make_config(model_path, **settings)
    plain = start(config)
    for seed in (0, 1, 2):
        plain.train(make_batch(seed=seed))
    expected = plain.weights()
    learner = start(config)
    for seed in (0, 1, 2):
        learner.offload()
        assert held_bytes(learner) == 0
        learner.restore()
        learner.train(make_batch(seed=seed))
        learner.probe()  # which leaves the root's weights gathered
        if seed == 1:
            learner.save(str(tmp_path / "saved"))
    learner.offload()
    learner.await_saved()  # the files are written beside
    learner.restore()
    assert same_weights(learner.weights(), expected)
    learner.load(str(tmp_path / "saved"))
    learner.train(make_batch(seed=2))
    assert same_weights(learner.weights(), expected)


def test_a_frozen_teacher_goes_aside_too(start, model_path):
    learner = start(make_config(model_path, algorithm="opd", teacher=model_path))
    learner.offload()
    tensors = list(learner._teacher.parameters())
    assert sum(tensor.to_local().untyped_storage().nbytes() for tensor in tensors) == 0
    learner.restore()
    assert learner.train(make_batch()).metrics["learner/teacher_tokens"] > 0
