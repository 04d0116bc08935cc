"""The advice on the page of a run: searched in the background, now and then."""

from __future__ import annotations

from pathlib import Path

from starlette.testclient import TestClient

from pmdflow.dashboard.advice import DEADLINE_S, FIRST_S, REFRESH_S, AdviceView
from pmdflow.dashboard.server import make_app
from tests.support.fitted_run import fitted_run
from tests.support.fixture_run import FixtureRun


def test_advice_is_searched_after_a_while_and_only_with_news(tmp_path: Path) -> None:
    now = [0.0]
    view = AdviceView(fitted_run(tmp_path / "fitted"), clock=lambda: now[0])
    assert view.lines(revision=1) == []
    now[0] = FIRST_S
    assert view.lines(revision=1) == []
    view.wait(DEADLINE_S)
    found = view.lines(revision=1)
    assert found[0].startswith("by models fitted to iterations 3 to 10") and found[1].startswith("as configured: ")
    now[0] += REFRESH_S - 1
    assert view.lines(revision=2) is found
    now[0] += 1
    (tmp_path / "fitted" / "metrics.jsonl").unlink()
    assert view.lines(revision=2) is found
    view.wait(DEADLINE_S)
    assert view.lines(revision=2) == found, "a search that finds nothing takes nothing away"


def test_a_run_that_says_too_little_has_a_page_without_advice(tmp_path: Path) -> None:
    run = FixtureRun(tmp_path / "short")
    run.iterate(2)
    client = TestClient(make_app(run.run_dir), base_url="http://127.0.0.1")
    assert client.get("/api/update").json()["html:advice"].strip() == ""
