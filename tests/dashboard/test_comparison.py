"""Several runs on one page."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from pmdflow.dashboard.comparison import CHARTS, Comparison
from pmdflow.dashboard.server import make_app
from pmdflow.errors import LaunchError
from tests.support.fixture_run import FixtureRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[FixtureRun]:
    folder = tmp_path_factory.mktemp("runs")
    made = [FixtureRun(folder / name, start=1000.0 * (i + 1)) for i, name in enumerate(("a", "b", "c"))]
    for i, run in enumerate(made):
        run.iterate(3 + i, archive=False)
    change(made[1].run_dir, "scheduler", max_staleness=9, note="<b>bold</b>")
    return made


def change(run: Path, section: str, **values: object) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def client_of(runs: list[FixtureRun]) -> TestClient:
    return TestClient(make_app(*(run.run_dir for run in runs)), base_url="http://127.0.0.1")


def test_every_chart_has_a_line_a_run_in_one_colour(runs: list[FixtureRun]) -> None:
    parts = client_of(runs).get("/api/update").json()
    charts = {key.removeprefix("chart:"): value["data"] for key, value in parts.items() if key.startswith("chart:")}
    assert set(charts) == {*CHARTS, "held-out"}
    for lines in charts.values():
        assert [line["name"] for line in lines] == ["a", "b", "c"]
    assert [len(line["x"]) for line in charts["reward"]] == [3, 4, 5]
    assert [line["x"] for line in charts["held-out"]] == [[0], [0], [0, 5]]
    colours = {tuple(line["line"]["color"] for line in lines) for lines in charts.values()}
    assert len(colours) == 1 and len(set(*colours)) == 3
    values = [y for lines in charts.values() for line in lines for y in line["y"]]
    assert None not in values  # every key is one that runs record


def test_numbers_are_of_the_whole_of_each_run_whatever_its_state(tmp_path: Path) -> None:
    made = [FixtureRun(tmp_path / name, start=1.0) for name in ("ended", "living")]
    for run in made:
        run.iterate(2, archive=False)
    made[0].finish()
    made[1].recorder.metric("eval", {"eval/round": 2, "eval/reward_mean": 1.0, "eval/prompts": 128, "eval/failed": 3})
    _, rows = Comparison([run.run_dir for run in made]).facts()
    assert dict(rows)["iterations"] == ["0 / 20", "0 / 20"]  # nothing is read before `refresh`
    comparison = Comparison([run.run_dir for run in made])
    comparison.refresh()
    _, rows = comparison.facts()
    table = dict(rows)
    assert table["tokens/s"][0] == table["tokens/s"][1] and table["time"] == ["8 s", "8 s"]
    assert table["held-out not scored"] == ["-", "3 of 256"]


def test_only_settings_that_differ_are_shown(runs: list[FixtureRun]) -> None:
    found = dict(Comparison([run.run_dir for run in runs]).differences())
    assert found["scheduler.max_staleness"] == ["3", "9", "3"]
    assert found["scheduler.note"] == ["-", "<b>bold</b>", "-"]
    assert set(found) == {"scheduler.max_staleness", "scheduler.note", "run.name", "model.path"}
    page = client_of(runs).get("/").text
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page and "/trajectories" not in page


def test_runs_of_one_name_are_told_apart_by_their_paths(runs: list[FixtureRun], tmp_path: Path) -> None:
    other = FixtureRun(tmp_path / "a", start=1.0)
    assert Comparison([runs[0].run_dir, other.run_dir]).names() == [str(runs[0].run_dir), str(other.run_dir)]


def test_a_run_that_has_only_begun_is_compared_too(runs: list[FixtureRun], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: new}\n")
    client = TestClient(make_app(tmp_path, runs[0].run_dir), base_url="http://127.0.0.1")
    assert "waiting" in client.get("/").text
    assert client.get("/api/update").json()["chart:reward"]["data"][0]["x"] == []


def test_one_that_is_no_run_is_named(runs: list[FixtureRun], tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="missing is no run directory"):
        make_app(runs[0].run_dir, tmp_path / "missing")
