"""Supervised sequences and the entropy bonus beside the policy objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmdflow.learner.advantage import pmd_mean
from pmdflow.learner.supervised import SupervisedData
from pmdflow.types import Mask
from tests.support.learner import assert_metrics_alike, make_batch, make_config
from tests.support.paths import TINY
from tests.support.whole import Whole

torch.set_num_threads(1)


def test_entropy_bonus_and_supervised_loss(start, model_path):
    batch = make_batch()
    whole = Whole(model_path, batch)
    rows = [
        (np.array([3, 4], np.int32), np.array([5, 6, 7], np.int32)),
        (np.array([9], np.int32), np.array([8], np.int32)),
    ]
    pmd = whole.first_step(tau=0.5, advantages=pmd_mean(batch.rewards, batch.groups))
    entropy = torch.cat([whole.entropies[index][whole.trained[index]] for index in whole.active()]).mean()
    completions = []
    for prompt, completion in rows:
        tokens = np.concatenate([prompt, completion])
        completions.append(whole.scores(tokens, np.ones(len(tokens), np.float32))[0][-len(completion) :].mean())
    # Three sequences of two rows: the first comes again.
    supervised = -(2 * completions[0] + completions[1]) / 3
    config = make_config(model_path, steps_per_iteration=1, entropy_weight=0.7, ptx_weight=0.3, ptx_sequences=3)
    learner = start(config)
    learner._ptx = SupervisedData(rows=rows, sequences=3)
    metrics = learner.train(batch).metrics
    every = torch.cat([whole.entropies[index] for index in whole.active()]).mean().item()
    expected = {
        "learner/loss": (pmd - 0.7 * entropy).item(),
        "learner/ptx_loss": supervised.item(),
        "learner/grad_norm": whole.grad_norm(pmd - 0.7 * entropy + 0.3 * supervised),
        "learner/entropy": every,
    }
    assert_metrics_alike(metrics, expected, size=1 + 0.7 + 0.3)
    behavior = start(make_config(model_path, steps_per_iteration=1, anchor="behavior"))
    assert_metrics_alike(behavior.train(batch).metrics, {"learner/entropy": every})


def test_supervised_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "1 + 2 = ?", "completion": "3"}\n\n{"prompt": "2 + 2 = ?", "completion": "4"}\n')
    data = SupervisedData.of(make_config(str(TINY), ptx_data=str(path), ptx_sequences=3))
    first, second = data.batch(0), data.batch(1)
    np.testing.assert_array_equal(first.tokens[: first.cu_seqlens[1]], first.tokens[first.cu_seqlens[2] :])
    np.testing.assert_array_equal(second.tokens[: second.cu_seqlens[1]], first.tokens[slice(*first.cu_seqlens[1:3])])
    for batch in (first, second):
        for start_, end, prompt in zip(batch.cu_seqlens, batch.cu_seqlens[1:], batch.prompt_lengths, strict=False):
            flags = (batch.mask[start_:end] & Mask.TRAINED) != 0
            assert not flags[:prompt].any()
            assert flags[prompt:].all()
            assert end - start_ - prompt == 2, "the digit and the end of sequence"
    for text, match in (
        ('{"prompt": "x"}', ":1: needs"),
        ("", "holds no line"),
        ('{"prompt": "", "completion": ""}', ":1:"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            SupervisedData.of(make_config(str(TINY), ptx_data=str(path)))
    with pytest.raises(ValueError, match="cannot read"):
        SupervisedData.of(make_config(str(TINY), ptx_data=str(tmp_path / "none.jsonl")))
