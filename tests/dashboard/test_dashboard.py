"""The dashboard over a run directory: pages, numbers, the stream, and a browser."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from pmdflow.dashboard import panels, trajectories
from pmdflow.dashboard.queries import RunView
from pmdflow.dashboard.server import make_app, serve
from pmdflow.errors import PmdflowError
from pmdflow.metrics.summary import render_summary
from pmdflow.store.archive import write_part
from pmdflow.types import Mask
from tests.support.fixture_run import BUDGET, MAX_STALENESS, FixtureRun, make_batch, span

CHROMIUM = Path("/usr/bin/chromium")
STATIC = Path(panels.__file__).parent / "static"


@pytest.fixture
def run(tmp_path: Path) -> FixtureRun:
    made = FixtureRun(tmp_path / "quick", start=1000.0)
    made.iterate(6, archive=False)
    return made


@pytest.fixture
def archived(run: FixtureRun) -> FixtureRun:
    for iteration in range(1, 7):
        write_part(run.run_dir, make_batch(iteration, length=30 + 3.0 * iteration), attrs={})
    return run


def client_of(run: FixtureRun) -> TestClient:
    return TestClient(make_app(run.run_dir), base_url="http://127.0.0.1")


def view_of(run: FixtureRun, *, later_s: float = 0.0) -> RunView:
    view = RunView(run.run_dir, clock=lambda: run.now + later_s)
    view.refresh()
    return view


@contextmanager
def served(run: FixtureRun) -> Iterator[str]:
    """The real server on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(make_app(run.run_dir), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_the_run_page_says_how_the_run_stands(run: FixtureRun) -> None:
    page = client_of(run).get("/")
    assert page.status_code == 200
    for expected in ("6 / 20", "sums match", "checkpoint", "iteration 5"):
        assert expected in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_every_chart_has_the_recorded_numbers(run: FixtureRun) -> None:
    parts = client_of(run).get("/api/update").json()
    charts = {key.removeprefix("chart:"): value for key, value in parts.items() if key.startswith("chart:")}
    assert set(charts) == {"reward", "length", "delay", "staleness", "budget", "store", "rate", "timeline"}
    train, held_out = charts["reward"]["data"]
    assert train["x"] == [1, 2, 3, 4, 5, 6] and all(0 <= y <= 1 for y in train["y"])
    assert held_out["x"] == [0, 5]
    ages = charts["staleness"]["data"][:-1]
    assert all(sum(shares) == pytest.approx(100) for shares in zip(*(age["y"] for age in ages), strict=True))
    assert f"limit {MAX_STALENESS}" in charts["staleness"]["layout"]["yaxis"]["title"]["text"]
    assert charts["budget"]["data"][1]["y"] == [BUDGET] * 6
    assert len(charts["rate"]["data"][0]["x"]) == 24


@pytest.mark.parametrize(
    ("ending", "later_s", "state", "words"),
    [
        (None, 0, "running", "rollout-bound: the learner waited 40% of the last 24 s"),
        (None, 95, "silent", "no new metric for 1 min 30 s"),
        ("finish", 9999, "finished", "6 iterations in 24 s, held-out reward 0.400 -> 0.632"),
        ("drain", 9999, "stopped", "resumes it"),
    ],
)
def test_the_diagnosis_names_the_state(
    run: FixtureRun, ending: str | None, later_s: float, state: str, words: str
) -> None:
    if ending:
        run.recorder.event(ending, "")
    diagnosis = view_of(run, later_s=later_s).diagnosis()
    assert diagnosis.state == state
    assert words in diagnosis.text


def test_attempts_of_an_evaluation_that_were_not_scored_are_a_tile(run: FixtureRun) -> None:
    assert "not scored" not in client_of(run).get("/").text
    run.recorder.metric("eval", {"eval/round": 6, "eval/reward_mean": 1.0, "eval/prompts": 128, "eval/failed": 3})
    assert "3 of 128" in client_of(run).get("/").text
    run.recorder.event("finish", "")
    assert "3 of 384" in client_of(run).get("/").text  # 3 rounds
    assert "128 prompts; 3 attempts NOT SCORED in 3 rounds" in render_summary(run.run_dir)


@pytest.mark.parametrize("ending", ["finish", "drain", "stop"])
def test_the_tiles_of_a_run_that_has_ended_are_about_all_of_it(run: FixtureRun, ending: str) -> None:
    records = view_of(run).iterations()
    assert dict(view_of(run).facts())["train reward"] == f"{records[-1]['reward/mean']:.3f}"
    run.recorder.event(ending, "")
    tiles, printed = dict(view_of(run).facts()), render_summary(run.run_dir)
    assert (tiles["iterations"], tiles["time"], tiles["rollout busy"]) == ("6 / 20", "24 s", "94%")
    assert tiles["train reward"] == f"{records[0]['reward/mean']:.3f} \u2192 {records[-1]['reward/mean']:.3f}"
    assert tiles["held-out reward"] == "0.400 \u2192 0.632"
    generated = records[-1]["ledger/generated"]
    assert tiles["tokens generated"] == f"{generated:,}" and tiles["tokens/s"] == f"{generated / 24:,.0f}"
    assert f"{tiles['tokens/s']} generated tokens/s" in printed
    masked = sum(record["staleness/masked_share"] for record in records) / 6
    assert tiles["masked tokens"] == f"{100 * masked:.0f}%"
    assert "groups ready" not in tiles
    run.recorder.event("resume", "")
    assert "groups ready" in dict(view_of(run).facts())


def test_the_tiles_of_a_run_that_ended_before_its_first_iteration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: new}\n")
    (tmp_path / "events.jsonl").write_text('{"kind": "stop", "time": 1.0}\n')
    assert "0 / ?" in TestClient(make_app(tmp_path), base_url="http://127.0.0.1").get("/").text


def test_the_diagnosis_finds_idle_rollout_and_balance(tmp_path: Path) -> None:
    for name, idle_s, words in (("a", 40, "learner-bound: rollout actors were idle 40%"), ("b", 5, "balanced")):
        made = FixtureRun(tmp_path / name, start=0.0)
        made.now = 100.0
        generating = {"actor": "rollout-0", "name": "generate", "start": 0.0, "end": 100.0 - idle_s}
        made.recorder.spans([generating, {**generating, "name": "wait_lease", "start": 100.0 - idle_s, "end": 100.0}])
        made.recorder.metric("sample", {})
        assert words in view_of(made).diagnosis().text


def test_a_wait_of_the_controller_is_not_the_learners(tmp_path: Path) -> None:
    """In runs of older versions both are called `wait_claim`."""
    for name in ("wait_groups", "wait_claim"):
        made = FixtureRun(tmp_path / name, start=0.0)
        made.now = 100.0
        waits = span(name, 0.0, 70.0, "controller"), span("wait_claim", 0.0, 30.0, "learner-0")
        made.recorder.spans([span("generate", 0.0, 90.0), *waits])
        made.recorder.metric("sample", {})
        assert "rollout-bound: the learner waited 30% of" in view_of(made).diagnosis().text


def test_an_empty_directory_waits_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: new}\n")
    client = TestClient(make_app(tmp_path), base_url="http://127.0.0.1")
    assert "waiting for the first metric" in client.get("/").text
    assert client.get("/api/update").json()["chart:timeline"]["data"] == []
    assert "No archived trajectory matches" in client.get("/trajectories").text
    with pytest.raises(PmdflowError, match="missing is no run directory"):
        make_app(tmp_path / "missing")


def test_a_busy_port_is_one_clear_line(run: FixtureRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PmdflowError, match=f"port {port} of 127.0.0.1 is taken") as caught:
            serve([run.run_dir], host="127.0.0.1", port=port)
    message, hint = str(caught.value).split("\n\nhint: ")
    assert "--port" in hint and "\n" not in message + hint


def test_torn_and_damaged_lines_do_not_hide_the_rest(run: FixtureRun) -> None:
    for name in ("metrics", "spans", "events"):
        with (run.run_dir / f"{name}.jsonl").open("a") as file:
            file.write('garbage\n{"kind": "iteration"}\n{"time": 1, "ki')
    assert "6 / 20" in client_of(run).get("/").text
    assert len(client_of(run).get("/api/update").json()["chart:reward"]["data"][0]["x"]) == 6


def test_other_hosts_are_refused(run: FixtureRun) -> None:
    assert TestClient(make_app(run.run_dir), base_url="http://evil.example").get("/").status_code == 400


def test_the_table_filters_sorts_and_pages(archived: FixtureRun) -> None:
    every = trajectories.search(archived.run_dir, trajectories.Filter())
    assert len(every) == 6 * 16
    wanted = trajectories.Filter(reward_min=0.5, length_min=40, multi_version=True, sort="length")
    some = trajectories.search(archived.run_dir, wanted)
    assert some == sorted(
        (row for row in every if row.reward >= 0.5 and row.length >= 40 and row.versions >= 2),
        key=lambda row: -row.length,
    )
    assert 0 < len(some) < len(every)
    client = client_of(archived)
    assert "96 trajectories" in client.get("/trajectories").text
    assert "page 2 of 2" in client.get("/trajectories?page=7&sort=nonsense&reward_min=x").text
    assert "16 trajectories" in client.get("/trajectories?iteration=3").text


def test_table_rows_agree_with_the_claim(run: FixtureRun) -> None:
    batch = make_batch(6, length=30 + 18.0, reward=0.4 + 0.5)
    write_part(run.run_dir, batch, attrs={})
    for i, row in enumerate(trajectories.part_rows(run.run_dir / "archive" / "part-000006.zarr")):
        own = slice(int(batch.cu_seqlens[i]) + int(batch.prompt_lengths[i]), int(batch.cu_seqlens[i + 1]))
        assert (row.trajectory, row.group, row.reward) == (batch.trajectories[i], batch.groups[i], batch.rewards[i])
        assert row.length == own.stop - own.start
        assert row.versions == len(set(batch.versions[own].tolist()))
        assert row.prompt_id == batch.prompt_ids[i]


def test_a_trajectory_shows_each_token_with_its_version(archived: FixtureRun) -> None:
    row = next(row for row in trajectories.search(archived.run_dir, trajectories.Filter(multi_version=True)))
    page = client_of(archived).get(f"/trajectories/{row.iteration}/{row.trajectory}").text
    tokens = page.split('<div class="tokens">')[1].split("</div>")[0]
    assert tokens.count('class="tok v') == row.length
    assert tokens.count("boundary") >= row.versions
    assert f"v{row.first_version}: " in page and f"v{row.last_version}: " in page
    assert "logprob -" in tokens
    assert "&lt;b&gt;" in page and "<b>" not in tokens  # a token of the fixture is markup
    assert client_of(archived).get("/trajectories/6/1").status_code == 404
    assert client_of(archived).get("/trajectories/99/1").status_code == 404


def test_masked_tokens_say_why(run: FixtureRun) -> None:
    batch = make_batch(7, groups=16, size=8)
    write_part(run.run_dir, batch, attrs={})
    victim = next(
        i for i in range(len(batch.rewards))
        if (batch.mask[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] & Mask.OVER_AGE).any()
    )  # fmt: skip
    page = client_of(run).get(f"/trajectories/7/{batch.trajectories[victim]}").text
    assert "over-age" in page and "without a gradient" in page


def test_without_the_tokenizer_ids_are_shown(archived: FixtureRun) -> None:
    (archived.run_dir / "model" / "tokenizer.json").unlink()
    batch = make_batch(6, length=30 + 18.0)
    page = client_of(archived).get(f"/trajectories/6/{batch.trajectories[0]}").text
    assert "token ids are shown" in page


def test_text_of_a_run_is_escaped(run: FixtureRun) -> None:
    attack = "<script>alert(1)</script>"
    run.recorder.event(attack, attack)
    write_part(run.run_dir, make_batch(8), attrs={})
    client = client_of(run)
    texts = [client.get("/").text, json.dumps(client.get("/api/update").json())]
    texts.append(client.get("/trajectories", params={"iteration": attack, "reward_min": f'"{attack}'}).text)
    assert all(attack not in text for text in texts)
    assert "&lt;script&gt;alert" in texts[0]


def test_the_stream_delivers_growth(run: FixtureRun) -> None:
    with served(run) as url, httpx.stream("GET", f"{url}/events", timeout=20) as response:
        messages = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        first = next(messages)
        assert len(first["chart:reward"]["data"][0]["x"]) == 6
        run.iterate()
        grown = next(message for message in messages if "chart:reward" in message)
        assert grown["chart:reward"]["data"][0]["x"][-1] == 7
        assert len(grown["chart:store"]["data"][0]["x"]) > len(first["chart:store"]["data"][0]["x"])
        run.recorder.event("finish", "done")
        last = next(message for message in messages if "finished" in message.get("html:diagnosis", ""))
        assert "chart:reward" not in last  # only what changed is sent


def test_scripts_stay_small_and_local() -> None:
    assert len((STATIC / "charts.js").read_text().splitlines()) <= 150
    for file in (*STATIC.iterdir(), *(STATIC.parent / "templates").iterdir()):
        assert "//" not in file.read_text().replace("// ", ""), file


def test_the_script_of_the_installed_package_is_served(run: FixtureRun) -> None:
    response = client_of(run).get("/plotly.min.js")
    assert response.status_code == 200 and len(response.content) > 10**6


@pytest.mark.browser
def test_charts_grow_in_a_browser_that_asks_no_other_host(tmp_path: Path) -> None:
    if not CHROMIUM.exists():
        reason = f"{CHROMIUM} is not installed (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    run = FixtureRun(tmp_path / "quick", start=time.time() - 30)
    run.iterate(5, archive=False)
    run.iterate()
    with served(run) as url, chromium_page() as (page, problems, requests):
        page.goto(url)
        wait_for_points(page, 6)
        run.iterate()
        wait_for_points(page, 7)
        run.iterate()
        wait_for_points(page, 8)
        assert int(page.evaluate("document.body.dataset.updates")) >= 3
        legend, toolbar = hovered_boxes(page)
        assert toolbar["width"] > 50  # it is there
        assert toolbar["y"] + toolbar["height"] <= legend["y"] or legend["x"] + legend["width"] <= toolbar["x"]
        page.click("#theme")
        page.goto(f"{url}/trajectories?multi_version=1")
        page.click("table.rows tbody tr:first-child td a")
        page.wait_for_selector(".tokens .tok.prompt")
        assert page.locator(".tokens .boundary").count() >= 2
        assert problems == []
        assert {httpx.URL(address).host for address in requests} == {"127.0.0.1"}


@contextmanager
def chromium_page() -> Iterator[tuple[Any, list[str], list[str]]]:
    """A page, what its console complained about, and every address it asked for."""
    from playwright.sync_api import sync_playwright

    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    arguments = [f"--{flag}" for flag in (*flags, "disable-sync", "no-first-run")]
    problems: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        page = browser.new_page()
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("data:", "blob:")) else requests.append(r.url))
        try:
            yield page, problems, requests
        finally:
            browser.close()


def hovered_boxes(page: Any) -> tuple[Any, Any]:
    """Where the legend and the toolbar of a chart are while the mouse is over it, in a narrow window."""
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_timeout(500)
    page.hover("#chart-reward", position={"x": 150, "y": 150})
    page.wait_for_timeout(500)
    boxes = [page.locator(f"#chart-reward {part}").first.bounding_box() for part in (".legend", ".modebar")]
    return boxes[0], boxes[1]


def wait_for_points(page: Any, number: int) -> None:
    page.wait_for_function(
        "n => (document.getElementById('chart-reward').data || [{x: []}])[0].x.length === n", arg=number, timeout=30_000
    )


def test_the_page_of_a_long_run_is_seen_before_its_files_are_read(
    run: FixtureRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, go = RunView.refresh, threading.Event()

    def slowly(self: RunView) -> int:
        assert go.wait(30)
        return read(self)

    monkeypatch.setattr(RunView, "refresh", slowly)
    client = client_of(run)
    page = client.get("/")
    assert page.status_code == 200 and "Reading the files of the run" in page.text and "chart-reward" in page.text
    go.set()
    assert "6 / 20" in client.get("/api/update").json()["html:facts"]
    assert "sums match" in client.get("/").text
