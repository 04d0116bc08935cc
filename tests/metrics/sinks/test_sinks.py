"""Each sink holds what the run recorded, once: at the first try, after a kill, and where a resume went back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.sinks import SinkConfig
from pmdflow.errors import LaunchError
from pmdflow.metrics.companion import require_port
from pmdflow.metrics.history import iterations
from pmdflow.metrics.sinks import command
from pmdflow.metrics.sinks.command import follow
from pmdflow.metrics.sinks.definitions import definitions
from pmdflow.metrics.sinks.process import SinkProcesses
from pmdflow.metrics.sinks.prometheus import PrometheusSink
from pmdflow.metrics.sinks.rows import Rows
from pmdflow.metrics.sinks.tensorboard import TensorboardSink
from tests.support.sinks import KEYS, READERS, Curves, SinkRun, expected, tensorboard_curves

SINKS = [{"name": "wandb", "mode": "offline"}, "tensorboard", "trackio"]


def same(found: Curves, wanted: Curves) -> bool:
    """TensorBoard keeps float32."""
    return found == {
        key: [(step, pytest.approx(value, rel=1e-6)) for step, value in curve] for key, curve in wanted.items()
    }


def wait_for(run: SinkRun, name: str, points: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with suppress(subprocess.CalledProcessError):  # the place has no such run yet
            if len(READERS[name](run.run_dir, run.environment).get(KEYS[0], ())) >= points:
                return
        assert time.monotonic() < deadline, f"{name} has no {points} iterations"
        time.sleep(0.2)


@pytest.mark.timeout(400)  # a dozen processes of libraries that import slowly
@pytest.mark.parametrize("name", sorted(READERS))
def test_what_was_recorded_is_there_once_however_the_sink_ended(name: str, tmp_path: Path) -> None:
    run = SinkRun(tmp_path, *SINKS)
    run.iterate(3, archive=False)
    with run.live():
        process = run.sink(name)
        wait_for(run, name, 3)
        run.iterate(4, archive=False)
        time.sleep(1.5)  # somewhere on its way: the kill may come before, within or after it is sent
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        run.iterate(3, archive=False)
        process = run.sink(name)
        run.iterate(2, archive=False)
    for again in (False, True):
        output, _ = process.communicate(timeout=100)  # nobody owns the run any more: it ends by itself
        assert process.returncode == 0, output
        assert f"{name} has 15 iterations and evaluations" in output
        if not again:
            process = run.sink(name)
    assert same(READERS[name](run.run_dir, run.environment), expected(run.run_dir))


def test_asked_to_end_it_sends_what_is_there(tmp_path: Path) -> None:
    run = SinkRun(tmp_path)
    with run.live():
        process = run.sink("tensorboard")
        run.iterate(5, archive=False)
        wait_for(run, "tensorboard", 2)
        run.iterate(2, archive=False)
        process.terminate()
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert same(tensorboard_curves(run.run_dir, {}), expected(run.run_dir))


def test_a_second_sink_of_one_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SinkRun(tmp_path)
    run.iterate(5, archive=False)
    monkeypatch.setattr(command, "FREE_TIMEOUT_S", 0.1)
    with run.live():
        first = run.sink("tensorboard")
        wait_for(run, "tensorboard", 2)
        answer = CliRunner().invoke(app, ["sink", str(run.run_dir), "tensorboard"])
        assert isinstance(answer.exception, LaunchError)
        assert "a sink tensorboard sends the metrics of" in str(answer.exception)
    output, _ = first.communicate(timeout=100)
    assert first.returncode == 0, output
    assert same(tensorboard_curves(run.run_dir, {}), expected(run.run_dir))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sink_of_a_run_gets_no_ctrl_c_and_only_the_processor_time_that_training_leaves(tmp_path: Path) -> None:
    run = SinkRun(tmp_path)
    (run.run_dir / "logs").mkdir(exist_ok=True)
    with run.live(), SinkProcesses.start(run.run_dir, [SinkConfig(name="tensorboard")]):
        (sink,) = (child for child in psutil.Process().children() if "sink" in child.cmdline())
        assert sink.nice() == 19
        assert os.getpgid(sink.pid) == sink.pid
        assert os.getsid(sink.pid) == os.getsid(0)  # niceness counts within a session where the kernel groups by it


def test_where_a_resume_goes_back_tensorboard_shows_the_surviving_history(tmp_path: Path) -> None:
    run = SinkRun(tmp_path)
    sink, rows = TensorboardSink(run.run_dir), Rows(run.run_dir)
    run.iterate(4, archive=False)
    for row in rows.read():
        sink.send(row)
    run.done = 2
    run.iterate(3, archive=False)
    follow(rows, sink, is_live=lambda: False, told=threading.Event())
    history = iterations(run.run_dir)
    assert sorted(history) == [1, 2, 3, 4, 5]
    curve = [(step, pytest.approx(history[step]["ledger/generated"])) for step in sorted(history)]
    assert tensorboard_curves(run.run_dir, {})["ledger/generated"] == curve


def test_prometheus_scrapes_the_newest_numbers_with_their_definitions(tmp_path: Path) -> None:
    port = require_port("test", "127.0.0.1", 0, hint="")
    run = SinkRun(tmp_path)
    sink, rows = PrometheusSink(run.run_dir, SinkConfig(name="prometheus", port=port)), Rows(run.run_dir)
    run.iterate(2, archive=False)
    seen = list(rows.read())
    for row in seen:
        sink.send(row)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    sink.close()
    newest = {key: value for row in seen for key, value in row.values.items()}
    scraped = {name: family.samples[0].value for name, family in families.items()}
    assert scraped == {"pmdflow_" + key.replace("/", "_"): value for key, value in newest.items()}
    sample = families["pmdflow_rollout_tokens_per_s"]
    assert sample.type == "gauge" and sample.samples[0].labels == {"run": "sums"}
    assert sample.documentation == definitions()["rollout/tokens_per_s"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)


def test_every_number_that_is_recorded_is_defined(tmp_path: Path) -> None:
    run = SinkRun(tmp_path)
    run.iterate(2, archive=False)
    recorded = {key for row in Rows(run.run_dir).read() for key in row.values}
    assert recorded - definitions().keys() - {"iteration", "version"} == {"event/start"}
    assert definitions()["event/KIND"].startswith("events: ")
    assert definitions()["store/trajectories_idle"] == definitions()["store/trajectories_leased"]
    assert definitions()["time/train_s"].startswith("s: ")
    assert definitions()["eval/prompts"].startswith("prompts: ") and "eval/NAME/prompts" in definitions()


def test_rows_are_numbered_alike_whenever_one_looks(tmp_path: Path) -> None:
    run = SinkRun(tmp_path)
    rows = Rows(run.run_dir)
    growing = []
    for _ in range(3):
        run.iterate(2, archive=False)
        growing += rows.read()
    assert growing == list(Rows(run.run_dir).read())
    numbers = [row.number for row in growing if row.kind != "sample"]
    assert numbers == list(range(8)) and len(growing) > len(numbers)


def test_without_an_account_wandb_is_one_line_and_no_question(tmp_path: Path) -> None:
    run = SinkRun(tmp_path, {"name": "wandb", "mode": "online"})
    run.environment |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": ""}
    process = run.sink("wandb")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "\nhint: run `wandb login`, or set `mode: offline`" in output, output
    assert "Traceback" not in output


def test_what_cannot_be_sent_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SinkRun(tmp_path)
    cases = [
        (tmp_path / "nowhere", "tensorboard", "is no run directory"),
        (run.run_dir, "prometheus", "is not running"),
        (run.run_dir, "wandb", "uv sync --extra sinks"),
    ]
    monkeypatch.setattr("pmdflow.config.installed.find_spec", lambda name: None if name == "wandb" else name)
    for path, name, message in cases:
        done = CliRunner().invoke(app, ["sink", str(path), name])
        assert isinstance(done.exception, LaunchError) and message in str(done.exception)
