"""Does the page of a long run on many actors come as fast as that of a short one?

Takes the directory of a finished run, such as the quick start's, and makes one of 1,000 iterations on 32 actors out
of its records: the same ones over and over, later, and each actor's spans for all. Then the pages of both are opened
in the same Chromium, one after the other, each time by a new visitor: at once after the server's start, and again.

    uv run pmdflow up configs/quickstart.yaml
    uv run python bench/dashboard.py runs/quickstart
    uv run python bench/dashboard.py runs/quickstart --keep runs/long --shots shots    # also its screenshots

Exits with 1 if the first paint takes more than 3 times as long.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = "/usr/bin/chromium"
ITERATIONS, ACTORS = 1000, 32
MOST = 3.0
"""Times the short run's first paint."""
STARTS, VISITS = 3, 2
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
DRAWN = "document.querySelectorAll('.js-plotly-plot').length >= 7"
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_long(short: Path, long: Path) -> None:
    """The records of a run, again and again, until there are enough iterations."""
    long.mkdir(parents=True)
    shutil.copy(short / "config.yaml", long)
    metrics, spans, events = (read(short / f"{name}.jsonl") for name in ("metrics", "spans", "events"))
    done = sum(record["kind"] == "iteration" for record in metrics)
    begin, end = metrics[0]["time"], metrics[-1]["time"]
    lifecycle = ("start", "resume", "finish", "drain", "stop")
    ending = next(event for event in reversed(events) if event["kind"] in lifecycle)
    with (
        (long / "metrics.jsonl").open("w") as metric_file,
        (long / "spans.jsonl").open("w") as span_file,
        (long / "events.jsonl").open("w") as event_file,
    ):
        for lap in range(-(-ITERATIONS // done)):
            later, first = lap * (end - begin), lap * done
            for record in metrics:
                moved = record | {"time": record["time"] + later}
                for key in ("iteration", "version", "eval/round"):
                    if key in record:
                        moved[key] = record[key] + first
                if moved.get("iteration", 0) <= ITERATIONS:
                    metric_file.write(json.dumps(moved) + "\n")
            for span in spans:
                moved = span | {"start": span["start"] + later, "end": span["end"] + later}
                actors = [f"rollout-{n}" for n in range(ACTORS)] if span["actor"] == "rollout-0" else [span["actor"]]
                span_file.writelines(json.dumps(moved | {"actor": actor}) + "\n" for actor in actors)
            for event in events:
                if lap == 0 or event["kind"] not in lifecycle:
                    event_file.write(json.dumps(event | {"time": event["time"] + later}) + "\n")
        event_file.write(json.dumps(ending | {"time": ending["time"] + later}) + "\n")
    parts = sorted((short / "archive").glob("part-*.zarr"))
    (long / "archive").mkdir()
    for number in range(ITERATIONS if parts else 0):
        (long / "archive" / f"part-{number + 1:06d}.zarr").symlink_to(parts[number % len(parts)].absolute())


@contextmanager
def served(run: Path) -> Iterator[str]:
    """`pmdflow dashboard`, in a process of its own; its link."""
    command = [sys.executable, "-m", "pmdflow.cli", "dashboard", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("dashboard: ").strip()
        finally:
            process.terminate()


def visit(browser: Browser, url: str) -> tuple[float, float]:
    """Milliseconds from the click to the first paint, and until every chart is drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_function(f"() => {DRAWN}", timeout=60_000)
    drawn = 1000 * (time.perf_counter() - began)
    paint = float(page.evaluate(PAINT))
    context.close()
    return paint, drawn


def measure(browser: Browser, runs: dict[str, Path]) -> dict[str, dict[str, list[float]]]:
    """First paint and drawn charts of each run, of first and later visits; runs take turns."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for _ in range(STARTS):
        for name, run in runs.items():
            with served(run) as url:
                for number in range(VISITS):
                    paint, drawn = visit(browser, url)
                    when = "first visit" if number == 0 else "later visits"
                    found[name].setdefault(f"first paint, {when}", []).append(paint)
                    found[name].setdefault(f"charts drawn, {when}", []).append(drawn)
    return found


def shoot(browser: Browser, run: Path, folder: Path) -> None:
    """Pages in both widths, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(run) as url:
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2} if size == "phone" else {}
                context = browser.new_context(viewport=viewport, color_scheme=scheme, **phone)  # type: ignore[arg-type]
                page = context.new_page()
                page.goto(url)
                page.wait_for_function(f"() => {DRAWN}", timeout=60_000)
                page.screenshot(path=folder / f"run-{size}-{scheme}.png", full_page=True)
                page.goto(f"{url}/trajectories")
                page.screenshot(path=folder / f"table-{size}-{scheme}.png")
                link = page.locator("table.rows tbody td a").first
                if link.count():
                    link.click()
                    page.wait_for_selector(".tokens")
                    page.screenshot(path=folder / f"trajectory-{size}-{scheme}.png")
                context.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--keep", type=Path, help="where the long run is made, and stays")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        long = arguments.keep or Path(folder) / "long"
        if not long.exists():
            make_long(arguments.run, long)
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        found = measure(browser, {"short": arguments.run, "long": long})
        for name, run in {"short": arguments.run, "long": long}.items():
            if arguments.shots:
                shoot(browser, run, arguments.shots / name)
    worst = 0.0
    for what, short_ms in found["short"].items():
        medians = statistics.median(short_ms), statistics.median(found["long"][what])
        ratio = medians[1] / medians[0]
        worst = max(worst, ratio if what.startswith("first paint") else 0.0)
        print(f"{what:28} short {medians[0]:6.0f} ms   long {medians[1]:6.0f} ms   {ratio:.2f} x")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
