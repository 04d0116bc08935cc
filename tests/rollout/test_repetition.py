"""The repetition detector: loops and cycles are found where they begin to be ones, lists and tables are let go on."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmdflow.config.sequences import RepetitionConfig
from pmdflow.data.sampling import SamplingControl
from pmdflow.rollout.engine import Output
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.repetition import RepetitionDetector
from pmdflow.store import TrajectoryStore
from pmdflow.types import Prompt, Quota, Stop
from tests.support.paths import ROOT

SMALL = RepetitionConfig(ngram=3, copies=3, min_tokens=12, window=64, max_distinct=0.2)
tokens_lists = st.lists(st.integers(0, 3), max_size=120)


def load_texts() -> ModuleType:
    path = ROOT / "bench" / "repetition_texts.py"
    spec = importlib.util.spec_from_file_location("repetition_texts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def is_loop(tokens: list[int], config: RepetitionConfig) -> bool:
    """Whether a list ends in enough copies of one block, a part of one counted."""
    for period in range(1, min(config.window, len(tokens) // 2) + 1):
        run = next((i for i in range(len(tokens) - period) if tokens[-1 - i] != tokens[-1 - i - period]), None)
        span = period + (len(tokens) - period if run is None else run)
        if span >= max(config.copies * period, config.min_tokens):
            return True
    return False


@given(lead=st.lists(st.integers(100, 10**6), unique=True, max_size=80), period=st.integers(1, 40))
def test_a_loop_is_found_with_its_last_needed_token(lead: list[int], period: int) -> None:
    needed = max(SMALL.copies * period, SMALL.min_tokens)
    loop = [token % period for token in range(needed + 5)]
    assert RepetitionDetector(SMALL).find(lead + loop[:needed - 1]) is None  # fmt: skip
    assert RepetitionDetector(SMALL).find(lead + loop) == len(lead) + needed - 1


@given(tokens=tokens_lists)
def test_what_is_found_as_a_loop_is_one(tokens: list[int]) -> None:
    loops_only = SMALL.model_copy(update={"max_distinct": 1e-9})
    found = RepetitionDetector(loops_only).find(tokens)
    if found is not None:
        assert is_loop(tokens[: found + 1], loops_only)


@given(tokens=tokens_lists, cuts=st.lists(st.integers(0, 120), max_size=4))
def test_pieces_are_as_good_as_the_whole(tokens: list[int], cuts: list[int]) -> None:
    whole = RepetitionDetector(SMALL).find(tokens)
    detector, seen = RepetitionDetector(SMALL), 0
    for low, high in itertools.pairwise(sorted([0, *(min(cut, len(tokens)) for cut in cuts), len(tokens)])):
        found = detector.find(tokens[low:high])
        if found is not None:
            assert whole == low + found
            return
        seen = high
    assert whole is None and seen == len(tokens)


@given(tokens=tokens_lists, cut=st.integers(0, 120))
def test_a_continuation_finds_what_the_uninterrupted_finds(tokens: list[int], cut: int) -> None:
    whole = RepetitionDetector(SMALL).find(tokens)
    if whole is None or whole >= cut:
        found = RepetitionDetector(SMALL, history=tokens[:cut]).find(tokens[cut:])
        assert found == (None if whole is None else whole - cut)


def test_a_cycle_in_random_order_is_found_and_random_text_is_not() -> None:
    rng = random.Random(0)
    blocks = [[10 * block + i for i in range(8)] for block in range(2)]
    cycle = [token for _ in range(40) for token in rng.choice(blocks)]
    cycles_only = SMALL.model_copy(update={"max_distinct": 0.45, "copies": 40})
    found = RepetitionDetector(cycles_only).find(cycle)
    assert found is not None and found >= SMALL.window
    assert RepetitionDetector(SMALL).find([rng.randrange(50) for _ in range(4000)]) is None


@pytest.mark.parametrize("kind", ["legitimate", "looping"])
def test_generated_texts(kind: str) -> None:
    texts = load_texts()
    counts = (
        {"num_legitimate": 64, "num_looping": 0} if kind == "legitimate" else {"num_legitimate": 0, "num_looping": 25}
    )
    for text in texts.generated(seed=1, **counts):
        found = RepetitionDetector(RepetitionConfig()).find(list(text.text.encode()))
        if text.loop_start is None:
            assert found is None, (text.kind, text.text[:found])
        elif text.kind in ("exact_loop", "long_loop"):
            assert found is not None and found >= text.loop_start, text.kind


def test_a_repeating_trajectory_is_ended_and_stored_as_such() -> None:
    loops = RepetitionConfig(ngram=2, copies=3, min_tokens=6)
    store = TrajectoryStore(None, groups_per_iteration=1, lookahead=1, max_staleness=4)
    store.publish(0)
    store.set_quota(Quota(version=0, groups=1, tokens=100, tokens_per_segment=None))
    prompt = Prompt(id="p", text="?", tokens=np.array([5], np.int32))
    store.admit("a", prompt, cursor=0, group_size=2, max_tokens=50)
    control = SamplingControl(temperature=1.0, max_tokens=50)
    segments = []
    for lease, tokens in zip(store.lease("rollout-0", 0, 2, 0.0), ([7, 8] * 4, [7, 8, 7, 9]), strict=True):
        held = HeldTrajectory(lease=lease, control=control, limit=9, context=[], repetition=RepetitionDetector(loops))
        held.take(Output(id=lease.trajectory, tokens=tokens, logprobs=[-1.0] * len(tokens), stop=None), version=0)
        assert held.end_repetition() == (len(tokens) == 8)
        segments.append(held.segment(version=0, next_version=0))
    store.append(segments)
    assert [segment.stop for segment in segments] == ["repetition", None]
    assert [len(segment.tokens) for segment in segments] == [6, 4]
    assert [item.stop for item in store.unscored(9, 1.0, 0.0)] == [Stop.REPETITION]
