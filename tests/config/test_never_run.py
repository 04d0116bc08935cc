"""What was never run is named by the dry run, and the README lists the same, each with its proof."""

from __future__ import annotations

from pmdflow.config.gpus import Gpus
from pmdflow.config.load import load
from pmdflow.config.never_run import NEVER_RUN, never_run
from pmdflow.config.settle import settle
from tests.support.footprints import FOOTPRINTS
from tests.support.paths import CONFIGS, ROOT

GPUS = Gpus(count=1, bytes_each=80 << 30, source="of a test")


def said(name: str, gpus: Gpus | None, *overrides: str) -> str:
    config = load(CONFIGS / f"{name}.yaml", overrides).config
    model = FOOTPRINTS.get(config.model.path)
    return "\n".join(never_run(settle(config, gpus=gpus, model=model), gpus))


def test_a_plan_names_what_it_uses_that_was_never_run() -> None:
    alone = said("gpu", GPUS)
    assert "vLLM on a GPU" in alone and "on one GPU" in alone and "NCCL: sharding" not in alone
    cluster = said("cluster", Gpus(count=32, bytes_each=80 << 30, source="of a test"))
    assert "NCCL: sharding" in cluster and "real machines" in cluster and "on one GPU" not in cluster
    assert said("quickstart", None) == ""


def test_the_readme_lists_all_of_it_with_what_would_prove_each() -> None:
    section = (ROOT / "README.md").read_text().partition("## Never run")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == [
        f"| {one.what} | {one.proof} |" for one in NEVER_RUN
    ]
