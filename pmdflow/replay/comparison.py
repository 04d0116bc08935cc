"""Two settings on the same stored rollouts and the same weights: what each makes of every claim."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pmdflow.config.load import load_run
from pmdflow.config.schema import Config
from pmdflow.errors import PmdflowError
from pmdflow.learner.assessment import Assessment
from pmdflow.learner.checkpoint.manifest import manifest_at
from pmdflow.learner.learner import Learner
from pmdflow.learner.view import State
from pmdflow.replay.claims import claim_to_train, claims_after
from pmdflow.replay.rescoring import Rescorer, rewards_differ
from pmdflow.types import TrainBatch

FIXED = {"run", "model", "data", "rollout", "environment", "scheduler"}
"""Sections in which the two may not differ: they made the rollouts, or are the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One claim under both settings."""

    iteration: int
    first: Assessment
    second: Assessment

    @property
    def correlation(self) -> float:
        """Of the advantages of both; NaN where one has no spread."""
        one, other = self.first.advantages, self.second.advantages
        if len(one) < 2 or not (one.std() > 0 and other.std() > 0):
            return float("nan")
        return float(np.corrcoef(one, other)[0, 1])

    @property
    def cosine(self) -> float:
        """Of the gradients of the whole claim; NaN where one is zero."""
        norm = float(np.linalg.norm(self.first.gradient) * np.linalg.norm(self.second.gradient))
        return float(self.first.gradient @ self.second.gradient) / norm if norm else float("nan")


def compare(run: Path, first: Sequence[str], second: Sequence[str], *, start: int, out: Path | None) -> int:
    """Print what two settings make of each claim; the policy follows the first.

    Args:
        run: Run directory.
        first: Overrides of the one setting.
        second: Overrides of the other.
        start: Iteration of the checkpoint to begin from; 0 is the initial weights.
        out: An HTML file for the plot.

    Raises:
        PmdflowError: nothing to replay, or the two differ in more than the learner and its rewards.
    """
    pairs = pairs_of(run, first, second, start=start)
    names = (", ".join(first) or "as recorded", ", ".join(second) or "as recorded")
    table = Table("iteration", *COLUMNS, title=f"{run.name}: A {names[0]}; B {names[1]}")
    for pair in pairs:
        table.add_row(str(pair.iteration), *(show(pair) for show in COLUMNS.values()))
    Console(soft_wrap=True).print(table)
    if out is not None:
        out.write_text(_page(names, pairs))
        print(f"plot: {out}")  # noqa: T201
    return 0


def pairs_of(run: Path, first: Sequence[str], second: Sequence[str], *, start: int) -> list[Pair]:
    """Both settings on every claim, in one process and on one rank; raises as `compare`."""
    recorded = load_run(run).config
    configs = [_one_rank(load_run(run, overrides).config) for overrides in (first, second)]
    for section in sorted(FIXED):
        if getattr(configs[0], section) != getattr(configs[1], section):
            raise PmdflowError(
                f"the two settings differ in {section}: only learner and reward can be compared on the same rollouts",
                hint="train both runs, and compare them with `pmdflow dashboard A B`",
            )
    if configs[0].learner.scorers != configs[1].learner.scorers:
        raise PmdflowError(
            "the two settings differ in learner.scorers, of which the learner has one set", hint="give them to both"
        )
    claims = claims_after(run, start)
    batches = [claim_to_train(path, anew=None) for _, path in claims]
    judged = [_judged(config, recorded, batches) for config in configs]
    learner = Learner(config=configs[0], rank=0)
    learner.setup(learner.address())
    try:
        if start:
            learner.load(str(manifest_at(run / "checkpoints", start).directory))
        states: list[State | None] = [learner.state, None]
        return [_pair(learner, configs, states, pair) for pair in zip(*judged, strict=True)]
    finally:
        learner.close()


def _pair(
    learner: Learner, configs: Sequence[Config], states: list[State | None], batches: Sequence[TrainBatch]
) -> Pair:
    """Assess a claim under both, then train it under the first; `states` are those of the two algorithms."""
    learner.adopt(configs[1], states[1])
    second = learner.assess(batches[1])
    learner.adopt(configs[0], states[0])
    first = learner.assess(batches[0])
    learner.train(batches[0])
    states[:] = learner.state, second.state
    return Pair(iteration=batches[0].iteration, first=first, second=second)


def _one_rank(config: Config) -> Config:
    learner = config.learner.model_copy(update={"ranks": 1, "replicas": 1})
    return config.model_copy(update={"learner": learner})


def _judged(config: Config, recorded: Config, batches: Sequence[TrainBatch]) -> list[TrainBatch]:
    """The claims, by the reward functions of a configuration, and dealt anew where its steps are others."""
    if rewards_differ(config, recorded):
        ids = {name for batch in batches for name in batch.prompt_ids}
        last = max(int(batch.groups.max(initial=0)) for batch in batches)
        with Rescorer(config, prompt_ids=ids, last_group=last) as rescorer:
            batches = [rescorer.judge(batch) for batch in batches]
    same = config.learner.steps_per_iteration == recorded.learner.steps_per_iteration
    return [batch if same else replace(batch, plan=None) for batch in batches]


def _both(value: Callable[[Assessment], float], digits: str) -> Callable[[Pair], str]:
    return lambda pair: f"{value(pair.first):{digits}} | {value(pair.second):{digits}}"


COLUMNS: dict[str, Callable[[Pair], str]] = {
    "loss": _both(lambda one: one.loss, "+.4g"),
    "mean |advantage|": _both(lambda one: float(np.abs(one.advantages).mean()), ".4f"),
    "mean weight": _both(lambda one: float(one.weights.mean()) if len(one.weights) else 0.0, ".3f"),
    "ESS share": _both(lambda one: one.ess_share, ".3f"),
    "gradient norm": _both(lambda one: float(np.linalg.norm(one.gradient)), ".4g"),
    "advantages' correlation": lambda pair: f"{pair.correlation:+.3f}",
    "gradients' cosine": lambda pair: f"{pair.cosine:+.3f}",
}


def _page(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    from plotly.graph_objects import Figure, Scatter

    iterations = [pair.iteration for pair in pairs]
    lines = Figure(
        [
            Scatter(x=iterations, y=[pair.cosine for pair in pairs], name="gradients' cosine"),
            Scatter(x=iterations, y=[pair.correlation for pair in pairs], name="advantages' correlation"),
            *(
                Scatter(x=iterations, y=[which(pair).ess_share for pair in pairs], name=f"ESS share of {name}")
                for name, which in (("A", attrgetter("first")), ("B", attrgetter("second")))
            ),
        ]
    )
    lines.update_layout(xaxis_title="iteration", yaxis_range=[-1.05, 1.05], template="plotly_white")
    points = Figure(
        [
            Scatter(
                x=np.concatenate([pair.first.advantages for pair in pairs]),
                y=np.concatenate([pair.second.advantages for pair in pairs]),
                mode="markers",
                marker={"opacity": 0.4},
            )
        ]
    )
    points.update_layout(xaxis_title="advantage under A", yaxis_title="advantage under B", template="plotly_white")
    figures = lines.to_html(full_html=False, include_plotlyjs=True) + points.to_html(
        full_html=False, include_plotlyjs=False
    )
    title = html.escape(f"A: {names[0]}; B: {names[1]}")
    head = f"<head><meta charset='utf-8'><title>{title}</title></head>"
    return f"<!doctype html><html lang='en'>{head}<body><h1>{title}</h1>{figures}</body></html>"
