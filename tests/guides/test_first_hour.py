"""The first hour of somebody new, with README alone: own prompts, own reward, a model that transformers loads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.guides import steps
from tests.support.paths import ROOT

README = steps(ROOT / "README.md")
FILES = {"jsonl": "prompts.jsonl", "python": "my_reward.py", "yaml": "own.yaml"}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_from_an_own_task_to_an_exported_model(tmp_path: Path) -> None:
    program = shutil.which("pmdflow", path=str(Path(sys.executable).parent))  # as a shell finds it, not `python -m`
    assert program is not None
    for language, name in FILES.items():
        (text,) = [step.text for step in README if step.language == language]
        (tmp_path / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = [step for step in README if step.language == "command" and re.search(r"\bown\b", " ".join(step.arguments))]
    commands = [["init"], *(step.arguments for step in own), ["status", "runs/own"]]
    for arguments in commands:
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    assert "20 of 20" in done.stdout or "iterations        20" in done.stdout, done.stdout
    first, last = re.search(r"train reward +([\d.]+) -> ([\d.]+)", done.stdout).groups()
    assert float(last) > float(first), done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "own-hf").config.model_type == "qwen3"
