"""The dashboard of a live run in a real browser, and the run's end: charts grow, Ctrl-C twice stops at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from tests.support.runs import Up, small_config

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
POINTS = """() => Array.from(document.querySelectorAll('.js-plotly-plot')).flatMap(p => p.data)
    .reduce((n, trace) => n + ((trace.x && trace.x.length) || 0), 0)"""
"""Points of all charts."""


def test_charts_grow_while_the_run_goes_on_until_it_is_told_twice_to_stop(tmp_path: Path) -> None:
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI must have chromium"
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    up = Up(tmp_path, small_config(tmp_path, run__iterations=200, dashboard__port=0))
    problems: list[str] = []
    hosts: set[str | None] = set()

    def on_console(message: Any) -> None:
        if message.type == "error":
            problems.append(message.text)

    up.wait_for(lambda: "http://127.0.0.1:" in up.output, "the link")
    found = re.search(r"http://127\.0\.0\.1:\d+", up.output)
    assert found is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        up.wait_for(lambda: len(up.iterations()) >= 1, "the first iteration")
        page.goto(found.group())
        page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length > 3", timeout=30_000)
        before = page.evaluate(POINTS)
        page.wait_for_function(f"before => ({POINTS})() > before + 10", arg=before, timeout=60_000)
        page.wait_for_function("() => Number(document.body.dataset.updates) >= 3", timeout=60_000)
        browser.close()
    assert problems == []
    assert hosts <= {"127.0.0.1", None}
    os.kill(up.process.pid, signal.SIGINT)
    up.wait_for(lambda: "draining" in up.output, "the first answer")
    os.kill(up.process.pid, signal.SIGINT)
    assert up.wait(30) in (0, 130), up.output
