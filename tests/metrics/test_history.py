"""What the JSON lines of a run say, read while they grow."""

from __future__ import annotations

from pathlib import Path

from pmdflow.metrics.history import History, JsonLines, iterations
from pmdflow.metrics.recorder import Recorder


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


def test_a_round_that_was_over_before_its_iteration_was_recorded_again_stays(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for version, undone in ((2, True), (5, False)):
            for given, key in (({}, "eval/version"), ({"eval/set": "hard"}, "eval/hard/version")):
                recorder.metric("eval", {"eval/round": 2, "undone": undone, **given, key: version})
            recorder.metric("iteration", {"iteration": 2, "version": version})
    history = History(tmp_path)
    history.update()
    assert not history.evals[2]["undone"]
    assert not history.eval_sets["hard"][2]["undone"]


def test_history_keeps_a_bounded_number_of_samples(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"time": {i}, "kind": "sample"}}\n' for i in range(20_000)))
    history = History(tmp_path)
    history.update()
    assert len(history.samples) < 8192
    assert history.samples[0]["time"] == 0 and history.samples[-1]["time"] > 19_900
