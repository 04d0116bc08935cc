"""Every recipe passes the checks of `pmdflow up --dry-run`: its model and data sets by id, from a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from pmdflow.config.load import load
from tests.support.data import CHAT_TEMPLATE, save_tokenizer
from tests.support.hub import Hub
from tests.support.paths import CONFIGS, ROOT, TINY

RECIPES = ("math", "code", "tool", "long2short", "lora", "gpu", "gpu8", "cluster", "agent", "python_tool")
IN_TURN = "gpu cluster.colocate=true scheduler.lookahead=0 cluster.gpus=1x80GiB"
"""As config/CONFIGURATION.md has it."""
MOST_LINES = 40
DRY_RUN = """
import json, sys
from pmdflow.config.load import load
from pmdflow.errors import PmdflowError
from pmdflow.run.inputs import dry_run
said = {}
for job in sys.argv[1:]:
    name, *settings = job.split()
    try:
        said[job] = dry_run(load(f"configs/{name}.yaml", ["run.dir=never", *settings]))
    except PmdflowError as error:
        said[job] = error.report()
print(json.dumps(said))
"""


def model_files(folder: Path) -> dict[str, bytes]:
    """The tiny model with the positions of a large one, a byte-level tokenizer and a chat template."""
    save_tokenizer(folder, chat_template=CHAT_TEMPLATE)
    config = json.loads((TINY / "config.json").read_text()) | {"max_position_embeddings": 1 << 17}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the dry run says of each, all in one process."""
    directory = tmp_path_factory.mktemp("recipes")
    problems: list[dict[str, Any]] = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1), "level": 1} for i in range(300)]
    parquet.write_table(pyarrow.Table.from_pylist(problems), directory / "train.parquet")
    lines = "".join(json.dumps({**row, "problem": f"What is {row['problem']}"}) + "\n" for row in problems)
    files = model_files(directory / "model")
    with Hub(directory / "home") as hub:
        for name in {load(CONFIGS / f"{recipe}.yaml").config.model.path for recipe in RECIPES}:
            hub.push(name, files)
        train = {"data/train-0.parquet": (directory / "train.parquet").read_bytes()}
        hub.push("nlile/hendrycks-MATH-benchmark", train, kind="datasets")
        hub.push("HuggingFaceH4/MATH-500", {"test.jsonl": lines.encode()}, kind="datasets")
        done = subprocess.run(
            [sys.executable, "-c", DRY_RUN, *RECIPES, IN_TURN],
            capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | hub.environment,
        )  # fmt: skip
        assert not hub.asked("safetensors"), "a dry run downloads no weights"
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_says_what_it_was_tried_at_and_passes_the_dry_run(
    name: str, dry_runs: dict[str, str]
) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert len(text.splitlines()) < MOST_LINES
    head = text.partition("\nrun:")[0]
    assert "ot tried" in head or any(character.isdigit() for character in head)
    assert dry_runs[name].endswith("nothing was started"), dry_runs[name]
    notes = dry_runs[name].partition("\nnotes\n")[2].partition("\n\n")[0].splitlines()
    assert [note for note in notes if "downloaded by `up`" not in note and "never run: " not in note] == []


def test_one_gpu_is_enough_in_turn(dry_runs: dict[str, str]) -> None:
    assert dry_runs[IN_TURN].endswith("nothing was started"), dry_runs[IN_TURN]


def test_the_recipes_are_the_jobs_that_people_bring() -> None:
    configs = {name: load(CONFIGS / f"{name}.yaml").config for name in RECIPES}
    rewards = {name: config.reward.functions[0].function for name, config in configs.items()}
    assert rewards["math"] == rewards["long2short"] == "pmdflow.reward.math:score"
    assert rewards["code"] == "pmdflow.reward.code:score"
    assert configs["tool"].environment is not None and configs["lora"].learner.lora is not None
    assert configs["long2short"].reward.length_weight > 0
    assert configs["cluster"].cluster.address == "auto"
