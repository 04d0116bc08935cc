"""Models fitted to a run whose times are known, and what `pmdflow simulate` makes of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pmdflow.cli import app
from pmdflow.config.gpus import Gpus
from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.config.settle import settle
from pmdflow.errors import PmdflowError
from pmdflow.run.simulation.advice import advise
from pmdflow.run.simulation.calibration import calibrate
from pmdflow.run.simulation.command import short_advice, simulate
from pmdflow.run.simulation.models import LognormalLengths, RecordedLengths
from pmdflow.run.simulation.policies import assumed, configured, shrunk, splits, unit_of, variants
from pmdflow.run.simulation.world import Simulation
from pmdflow.store.archive import parts, read_part
from tests.support.fitted_run import CONTEXT_S, FACTOR, PREFILL_S, SEQUENCE_S, STEP_S, fitted_run
from tests.support.fixture_run import FixtureRun
from tests.support.paths import CONFIGS, ROOT


def recipe(name: str, *overrides: str) -> Config:
    """A shipped configuration as it is on a processor, or on the eight GPUs that it is for."""
    config = load(CONFIGS / f"{name}.yaml", overrides).config
    gpus = None if name == "quickstart" else Gpus(count=8, bytes_each=80 << 30, source="of a test")
    return settle(config, gpus=gpus)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted_run(tmp_path_factory.mktemp("runs") / "fitted")


def test_the_models_are_those_that_made_the_times(run: Path) -> None:
    models = calibrate(run)
    assert models.engine.step_s == pytest.approx(STEP_S, rel=1e-3)
    assert models.engine.sequence_s == pytest.approx(SEQUENCE_S, rel=1e-3)
    assert models.engine.context_s == pytest.approx(CONTEXT_S, rel=1e-3)
    assert models.engine.prefill_s == pytest.approx(PREFILL_S, rel=1e-3)
    assert models.engine.training_factor == pytest.approx(FACTOR, rel=1e-3)
    assert models.learner.train_s(1) == pytest.approx(2.0, abs=0.2)
    assert models.learner.publish_s == pytest.approx(4.0 - 1.6 - 2.0)
    assert isinstance(models.lengths, RecordedLengths)
    batch = read_part(parts(run)[2])
    lengths = (np.diff(batch.cu_seqlens) - batch.prompt_lengths)[:4].tolist()
    assert models.lengths.groups[0] == lengths
    assert "iterations 3 to 10" in models.origin


def test_a_run_that_says_too_little_is_refused(tmp_path: Path) -> None:
    short = FixtureRun(tmp_path / "short", iterations=4, start=1e9)
    short.iterate(4)
    with pytest.raises(PmdflowError, match="2 iterations after the first 2"):
        calibrate(short.run_dir)
    short.iterate(4)
    with open(short.run_dir / "config.yaml", "a") as config:
        config.write("reward: {functions: [{function: 'pmdflow.reward.reasoning_gym:score'}]}\n")
    with pytest.raises(PmdflowError, match="do not say how many tokens"):
        calibrate(short.run_dir)


def test_the_report_compares_modes_and_the_plot_is_whole(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.html"
    config = recipe("quickstart")
    report = simulate(config, run=run, iterations=12, out=out)
    assert f"fitted to iterations 3 to 10 of {run}" in report
    for name in ("as configured", "synchronous", "Kimi k1.5", "APRIL", "DORA", "lookahead 2", "unbounded"):
        assert name in report
    page = out.read_text()
    assert page.startswith("<!doctype html>") and "Plotly.newPlot" in page and page.endswith("</html>\n")
    assert re.search(r"varies +lag-1", report)


def test_the_report_says_whose_tokens_are_masked() -> None:
    config = recipe("quickstart", "scheduler.max_staleness=2")
    lines = simulate(config, run=None, iterations=12, out=None).splitlines()
    begin = lines.index("  masked tokens by decile of length, shortest first")
    shares = lines[begin + 1].removeprefix("  as configured").split()
    assert len(shares) == 10 and all(share.endswith("%") for share in shares) and shares[-1] != "0.0%"


def test_the_command_runs_without_a_run_and_says_what_it_assumes() -> None:
    answer = CliRunner().invoke(app, ["simulate", str(CONFIGS / "k15.yaml"), "--iterations", "8"])
    assert answer.exit_code == 0, answer.output
    assert "assumed: lengths lognormal with median 56" in answer.output


def test_long_answers_are_simulated_in_units_of_several_tokens() -> None:
    config = recipe("cluster")
    models = assumed(config)
    assert unit_of(config) == 64
    given = configured(config, models, iterations=1)
    assert given.max_tokens == 512 and given.engine.step_s == pytest.approx(64 * models.engine.step_s)
    whole, scaled = models.learner.train_s(64_000), given.learner.train_s(1000)
    assert scaled == pytest.approx(whole)
    assert isinstance(given.lengths, LognormalLengths) and given.lengths.p99 == pytest.approx(512)


def test_the_processors_are_divided_otherwise_and_all_used() -> None:
    given = configured(recipe("gpu8"), assumed(recipe("gpu8")), iterations=1)
    ranks = 8 - given.actors
    for name, settings in splits(given, recipe("gpu8")):
        actors, others = map(int, name.split(" + "))
        assert actors + others == 8 and settings.actors == actors
        assert settings.learner.token_s * others == pytest.approx(given.learner.token_s * ranks)
    assert dict(variants(given))["synchronous"].scheduler.lookahead == 0


def test_a_division_counts_the_gpus_of_an_engine_and_leaves_whole_replicas() -> None:
    wide = recipe("gpu8", "rollout.tensor_parallel=2", "rollout.actors=2", "learner.ranks=4", "learner.replicas=2")
    found = [name for name, _ in splits(configured(wide, assumed(wide), iterations=1), wide)]
    assert found == ["1 + 6", "3 + 2"]


def test_devices_that_engines_and_learner_share_are_not_divided() -> None:
    shared = recipe("gpu8", "cluster.gpus=4x80GiB", "rollout.actors=4", "learner.ranks=4")
    assert not list(splits(configured(shared, assumed(shared), iterations=1), shared))
    pairs = ("cluster.gpus=4x80GiB", "rollout.actors=4", "learner.ranks=4")
    in_turn = recipe("synchronous", "cluster.colocate=true", *pairs)
    advice = advise(in_turn, assumed(in_turn), iterations=2)
    assert not advice.divided and "nothing runs ahead" in advice.lines[0]
    assert [result.name for result in advice.results] == ["as configured", "synchronous", "Kimi k1.5", "APRIL"]


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (["scheduler.lookahead=0", "scheduler.extra_groups=8"], ["scheduler.extra_groups=0"]),
        (["scheduler.lookahead=1", "scheduler.versions=2"], ["scheduler.versions=null"]),
        (
            ["scheduler.lookahead=0", "scheduler.policy=pmdflow.run.policies:synchronous"],
            ["scheduler.policy=null"],
        ),
    ],
)
def test_what_is_advised_can_be_set(given: list[str], changes: list[str]) -> None:
    config = recipe("quickstart", *given)
    (line,) = (line for line in short_advice(config, seconds=100) if line.startswith("scheduler."))
    advised = line.partition(": ")[0].replace(" or more", "").split(", ")
    assert set(changes) <= set(advised)
    recipe("quickstart", *given, *advised)  # no contradiction


@pytest.mark.parametrize(("median", "p99"), [(100.0, 1000.0), (20.0, 30.0)])
def test_the_mean_of_cut_lognormal_lengths(median: float, p99: float) -> None:
    lengths = LognormalLengths(median=median, p99=p99)
    drawn = np.array([lengths.group(np.random.default_rng(seed), 64) for seed in range(4000)], float)
    assert np.minimum(drawn, p99).mean() == pytest.approx(lengths.mean(p99), rel=0.03)
    assert np.percentile(drawn, 99) == pytest.approx(p99, rel=0.06)


def test_advice_names_its_models_and_what_it_would_gain(run: Path) -> None:
    config = recipe("quickstart", "scheduler.lookahead=0", "scheduler.max_staleness=0")
    lines = short_advice(config, seconds=100)
    assert lines[0].startswith("by models assumed: lengths lognormal")
    assert lines[1].startswith("as configured: ")
    assert any("scheduler.lookahead=" in line and "times the tokens a second" in line for line in lines[2:])
    assert short_advice(config, run=run, seconds=100)[0].startswith("by models fitted to iterations 3 to 10")


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        (
            ["scheduler.max_staleness=8", "scheduler.lookahead=0"],
            "scheduler.lookahead=2: 4",
        ),  # 58 % of what is possible
        (["scheduler.groups_per_iteration=8"], "scheduler.lookahead=3, scheduler.max_staleness=8: 1."),
    ],
)
def test_what_is_better_is_advised_though_it_is_not_the_best_that_could_be(given: list[str], advised: str) -> None:
    few = ("scheduler.groups_per_iteration=4", "scheduler.tokens_per_iteration=40000")  # an answer takes several claims
    config = recipe("quickstart", *few, *given)
    assert any(line.startswith(advised) for line in advise(config, assumed(config), iterations=12).lines)


def test_advice_ends_in_time_and_says_what_it_left_out() -> None:
    config = recipe("cluster")
    (line,) = advise(config, assumed(config), seconds=0.0).lines
    assert re.search(r"\b(\d+) of \1 simulations were left out", line)


def test_a_part_of_a_large_job_takes_as_long_as_the_whole() -> None:
    config = recipe("gpu8")
    whole = configured(config, assumed(config), iterations=24)
    smaller, part = shrunk(whole, trajectories=64)
    assert part > 1 and smaller.scheduler.groups_per_iteration * part == whole.scheduler.groups_per_iteration
    small_s, whole_s = (Simulation(each).run().steady(skip=4).iteration_s for each in (smaller, whole))
    assert small_s == pytest.approx(whole_s, rel=0.25)
    assert shrunk(whole, trajectories=10**6) == (whole, 1)


def test_a_part_of_a_large_job_has_its_part_of_the_extra_groups() -> None:
    config = recipe("gpu8", "scheduler.lookahead=0", "scheduler.extra_groups=64")
    smaller, part = shrunk(configured(config, assumed(config), iterations=1), trajectories=64)
    assert part > 1 and smaller.scheduler.extra_groups == -(-64 // part)


def test_the_rows_of_the_heavy_tail_have_the_bounds_of_their_names() -> None:
    spec = importlib.util.spec_from_file_location("bench_heavy_tail", ROOT / "bench" / "heavy_tail.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = dict(script.rows(script.setting(iterations=1)))
    assert rows["unbounded"].max_staleness is None and rows["unbounded"].scheduler.lookahead == 8
    ages = {name: settings.max_staleness for name, settings in rows.items() if name.startswith("lookahead")}
    assert ages == {name: int(name.partition("age ")[2].split(",")[0]) for name in ages}
    assert rows["lookahead 2, age 4, window 96"].window == 96
