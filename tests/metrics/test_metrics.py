"""Spans, recorder, history, live view and summary."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.metrics.history import History, JsonLines, iterations
from pmdflow.metrics.intervals import UNRECORDED, covered_s, overlap_s, seconds_by_name, union
from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.spans import SpanBuffer
from pmdflow.metrics.summary import batch_metrics, busy_share, ledger_gap, overlap_share, render_summary
from pmdflow.types import Mask, Stop, TrainBatch
from tests.support.fixture_run import MAX_STALENESS, FixtureRun, make_batch

pairs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda p: (min(p), max(p))), max_size=12)


def span(name: str, start: float, end: float, actor: str = "rollout-0") -> dict[str, Any]:
    return {"actor": actor, "name": name, "start": start, "end": end, "attrs": {}}


def test_spans_are_drained_once_and_in_the_documented_form() -> None:
    ticks = iter([1.0, 2.5])
    buffer = SpanBuffer("rollout-0", clock=lambda: next(ticks))
    with buffer.span("generate", version=3) as attrs:
        attrs["tokens"] = 7
    drained = buffer.drain()
    assert drained == [span("generate", 1.0, 2.5) | {"attrs": {"version": 3, "tokens": 7}}]
    assert buffer.drain() == []


def test_a_span_ends_when_its_body_raises() -> None:
    buffer = SpanBuffer("learner-0")
    with pytest.raises(RuntimeError), buffer.span("step"):
        raise RuntimeError
    assert [s["name"] for s in buffer.drain()] == ["step"]


def test_a_full_buffer_drops_the_oldest_and_counts() -> None:
    buffer = SpanBuffer("reward", capacity=3)
    threads = [threading.Thread(target=lambda: [buffer.add("score", i, i + 1) for i in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buffer.drain()) == 3
    assert buffer.dropped == 4 * 50 - 3
    with pytest.raises(ValueError, match="capacity is 0"):
        SpanBuffer("reward", capacity=0)


def test_records_are_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with Recorder(tmp_path, clock=lambda: 5.0) as recorder:
        values = {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": {2: np.int64(3)}}
        recorder.metric("iteration", {"iteration": 1, **values})
        recorder.spans([span("generate", 1.0, 2.0)])
        recorder.event("start", "hello", path=tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"time": 5.0, "kind": "iteration", "iteration": 1, "a": None, "b": [1.0, None], "c": {"2": 3}}
    assert json.loads((tmp_path / "spans.jsonl").read_text())["name"] == "generate"
    assert json.loads((tmp_path / "events.jsonl").read_text())["path"] == str(tmp_path)


@pytest.mark.parametrize("torn", ['{"time": 1, "ki', "x" * 200_000, ""])
def test_a_torn_last_line_is_cut_off_at_opening(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"time": 0, "kind": "sample"}\n' + torn)
    with Recorder(tmp_path, clock=lambda: 1.0) as recorder:
        recorder.metric("sample", {})
    assert [json.loads(line)["time"] for line in file.read_text().splitlines()] == [0, 1.0]


def test_a_full_disk_and_an_unwritable_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        Recorder(tmp_path) as recorder,
        pytest.raises(PmdflowError, match=r"(?s)metrics\.jsonl: No space left.*hint: .*resumes"),
    ):
        recorder.metric("sample", {})
    with pytest.raises(PmdflowError, match=r"missing/metrics\.jsonl"):
        Recorder(tmp_path / "missing")


def test_readers_wait_for_the_rest_of_a_line_and_skip_damage(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = JsonLines(file)
    assert reader.read() == []
    file.write_text('{"a": 1}\nnot json\n[1]\n{"a"')
    assert reader.read() == [{"a": 1}]
    with file.open("a") as handle:
        handle.write(": 2}\n")
    assert reader.read() == [{"a": 2}]
    assert reader.read() == []
    assert JsonLines(file, tail_bytes=12).read() == [{"a": 2}]


def test_a_resume_supersedes_iterations_and_their_evaluations(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.metric("eval", {"eval/round": 0, "eval/reward_mean": 0.1})
        for number, reward in ((1, 0.1), (2, 0.2), (3, 0.3)):
            recorder.metric("iteration", {"iteration": number, "reward/mean": reward})
        recorder.metric("eval", {"eval/round": 3, "eval/reward_mean": 0.3})
        recorder.metric("iteration", {"iteration": 2, "reward/mean": 0.9})
    history = History(tmp_path)
    assert history.update()
    assert {i: r["reward/mean"] for i, r in history.iterations.items()} == {1: 0.1, 2: 0.9}
    assert list(history.evals) == [0]
    assert not history.update()
    assert iterations(tmp_path) == history.iterations


def test_history_keeps_a_bounded_number_of_samples(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"time": {i}, "kind": "sample"}}\n' for i in range(20_000)))
    history = History(tmp_path)
    history.update()
    assert len(history.samples) < 8192
    assert history.samples[0]["time"] == 0 and history.samples[-1]["time"] > 19_900


@given(pairs, pairs)
def test_interval_arithmetic_agrees_with_cells(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    cells = [{c for low, high in side for c in range(low, high)} for side in (first, second)]
    assert covered_s(union(first)) == len(cells[0])
    assert overlap_s(union(first), union(second)) == len(cells[0] & cells[1])


@given(pairs, pairs)
def test_each_second_of_an_actor_has_one_name(work: list[tuple[int, int]], waits: list[tuple[int, int]]) -> None:
    spans = [span("generate", *pair) for pair in work] + [span("wait_lease", *pair) for pair in waits]
    seconds = seconds_by_name(spans, 10, 40)
    assert sum(seconds.values()) == pytest.approx(30)
    covered = {c for low, high in work for c in range(low, high)} & set(range(10, 40))
    assert seconds.get("generate", 0) == pytest.approx(len(covered))
    assert busy_share(spans, "rollout", 10, 40) == (pytest.approx(len(covered) / 30) if spans else None)


def test_nested_spans_belong_to_the_inner_one() -> None:
    spans = [span("outer", 0, 10), span("inner", 2, 4), span("wait_grant", 9, 12)]
    assert seconds_by_name(spans, 0, 15) == {"outer": 8, "inner": 2, "wait_grant": 2, UNRECORDED: 3}


def test_busy_share_averages_the_actors_of_a_prefix() -> None:
    spans = [span("generate", 0, 10), span("generate", 0, 5, "rollout-1"), span("wait_lease", 5, 10, "rollout-1")]
    assert busy_share(spans, "rollout", 0, 10) == 0.75
    assert busy_share(spans, "learner", 0, 10) is None


def test_overlap_is_step_time_with_generation() -> None:
    spans = [span("step", 0, 4, "learner-0"), span("step", 6, 10, "learner-0"), span("generate", 2, 8)]
    assert overlap_share(spans) == 0.5
    assert overlap_share(spans[2:]) is None


def test_batch_metrics_agree_with_a_plain_loop() -> None:
    batch = make_batch(9, groups=16, size=8)
    values = batch_metrics(batch)
    lengths, multi, masked, ages = [], 0, 0, dict[str, int]()
    for i in range(len(batch.rewards)):
        own = slice(int(batch.cu_seqlens[i]) + int(batch.prompt_lengths[i]), int(batch.cu_seqlens[i + 1]))
        lengths.append(own.stop - own.start)
        multi += len(set(batch.versions[own].tolist())) > 1
        for flag, version in zip(batch.mask[own], batch.versions[own], strict=True):
            if flag & Mask.TRAINED:
                ages[str(batch.version - version)] = ages.get(str(batch.version - version), 0) + 1
            else:
                masked += 1
    assert values["trajectory/length_mean"] == pytest.approx(np.mean(lengths))
    assert values["trajectory/length_p90"] == pytest.approx(np.percentile(lengths, 90))
    assert values["trajectory/multi_version_share"] == multi / len(lengths) > 0
    assert values["staleness/tokens"] == dict(sorted(ages.items()))
    assert values["staleness/max"] <= MAX_STALENESS
    assert values["staleness/masked_share"] == pytest.approx(masked / sum(lengths)) and masked > 0
    assert values["trajectory/stop_share"] == np.mean(batch.stops == Stop.STOP)
    assert values["reward/mean"] == batch.rewards.mean()


def test_masked_share_by_decile_follows_length() -> None:
    count, prompt = 20, 2
    lengths = np.arange(1, count + 1)[::-1]
    totals = lengths + prompt
    cu_seqlens = np.concatenate(([0], np.cumsum(totals)))
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], totals)
    generated = position >= prompt
    longest_two = np.repeat(lengths > 18, totals)
    mask = np.where(longest_two, Mask.GENERATED | Mask.OVER_AGE, Mask.GENERATED | Mask.TRAINED)
    zeros = np.zeros(len(position))
    batch = TrainBatch(
        iteration=1, version=0, tokens=zeros.astype(np.int32), logprobs=zeros.astype(np.float32),
        versions=np.where(generated, 0, -1).astype(np.int32), temperatures=zeros.astype(np.float32) + 1,
        mask=np.where(generated, mask, 0).astype(np.uint8), cu_seqlens=cu_seqlens.astype(np.int64),
        prompt_lengths=np.full(count, prompt, np.int32), groups=np.zeros(count, np.int64),
        trajectories=np.arange(count), rewards=np.zeros(count), components={}, stops=np.ones(count, np.uint8),
        prompt_ids=("p",) * count,
    )  # fmt: skip
    assert batch_metrics(batch)["staleness/masked_share_by_decile"] == [0.0] * 9 + [1.0]


def test_the_summary_states_learning_ledger_staleness_and_time(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.iterate(10, archive=False)
    text = render_summary(tmp_path)
    assert "held-out reward   0.400 (v0) -> 0.757 (v10), 128 prompts" in text
    assert "(iteration 1 -> 10)" in text and "10 in 40 s" in text
    assert "sums match" in text
    assert f"(limit: {MAX_STALENESS})" in text and " 0 tokens over the limit" in text
    assert "rollout busy after start-up            93.9%" in text
    assert "wait_claim 39.4%" in text and "wait_lease" in text
    assert "generation during learner steps        100.0% of step time" in text


def test_the_summary_counts_what_is_wrong(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path)
    run.iterate(1, archive=False)
    run.recorder.metric(
        "iteration", {"iteration": 2, "staleness/tokens": {"0": 5, "9": 3}, "ledger/generated": 10, "ledger/trained": 7}
    )
    text = render_summary(tmp_path)
    assert "3 tokens over the limit" in text
    assert "SUM DIFFERS by 3" in text
    assert ledger_gap({"generated": 10, "trained": 10, "prompt": 4}) == 0


def test_a_run_without_an_iteration_has_a_summary(tmp_path: Path) -> None:
    assert "no iteration was finished" in render_summary(tmp_path)


def view_of(*, terminal: bool) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    raw = {
        "run": {"name": "demo", "iterations": 60}, "model": {"path": "m"}, "data": {"task": "t.jsonl", "max_tokens": 9},
        "reward": {"functions": [{"function": "a:b"}]},
        "scheduler": {"groups_per_iteration": 4, "tokens_per_iteration": 8192},
    }  # fmt: skip
    console = Console(file=out, force_terminal=terminal, width=120)
    config = Config.model_validate(raw)
    return LiveView(config=config, dashboard_url="http://127.0.0.1:1", console=console), out


def test_without_a_terminal_every_iteration_is_a_line_of_fixed_columns() -> None:
    view, out = view_of(terminal=False)
    with view:
        view.update({"scheduler/tokens_spent": 5})
        view.evaluation({"eval/reward_mean": 0.4})
        for number in (9, 10):
            view.iteration({"iteration": number, "reward/mean": 0.5, "time/iteration_s": 4.0, "time/claim_wait_s": 1.0})
        view.event("checkpoint", "iteration 10")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "demo  dashboard: http://127.0.0.1:1"
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[3].split()[:3] == ["10/60", "0.500", "0.400"] and "25%" in lines[3]
    assert lines[4] == "checkpoint: iteration 10"


def test_a_terminal_shows_budget_groups_and_bubbles() -> None:
    view, out = view_of(terminal=True)
    with view:
        view.update({"scheduler/tokens_spent": 4096, "scheduler/tokens_budget": 8192, "store/groups_ready": 3})
        view.iteration({"iteration": 12, "reward/mean": 0.5, "rollout/busy_share": 0.93})
        view.event("actor_died", "rollout-0 [red] was killed")
    text = out.getvalue()
    for expected in (
        "http://127.0.0.1:1",
        "12/60",
        "4,096/8,192 tokens",
        "groups ready 3",
        "93%",
        "rollout-0 [red] was killed",
    ):
        assert expected in text
