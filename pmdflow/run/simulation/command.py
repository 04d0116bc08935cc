"""`pmdflow simulate`: how a configuration would run, and what would run better."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from pmdflow.config.schema import Config
from pmdflow.metrics.text import number, percent
from pmdflow.run.simulation.advice import SKIPPED, Result, advise
from pmdflow.run.simulation.calibration import calibrate
from pmdflow.run.simulation.policies import assumed, unit_of


def simulate(config: Config, *, run: Path | None, iterations: int, out: Path | None) -> str:
    """Simulate a configuration and its alternatives; the report as text.

    Args:
        config: The configuration.
        run: A run of the same model and machine, to which engine, learner and lengths are fitted; None assumes some.
        iterations: Iterations of each simulation.
        out: An HTML file for the plot.

    Raises:
        PmdflowError: the run does not say enough.
    """
    models = assumed(config) if run is None else calibrate(run)
    advice = advise(config, models, iterations=iterations)
    results, divided, unit = advice.results, advice.divided, unit_of(config)
    if out is not None:
        out.write_text(_page(config, results, unit))
    engine, learner, given = models.engine, models.learner, results[0].settings
    step = f"{engine.step_s * 1e3:.2f} ms a step + {engine.sequence_s * 1e3:.3f} ms a sequence in it"
    slower = f", {engine.training_factor:.2f} times that while the learner trains" if engine.training_factor > 1 else ""
    trains = (
        f"{learner.iteration_s:.3g} s + {learner.token_s * 1e6:.3g} us a token, {learner.publish_s:.3g} s to publish"
    )
    lines = [
        f"simulation of {config.run.name}, {iterations} iterations a policy, the first {SKIPPED} left out",
        f"  models    {models.origin}",
        f"  engine    {step}{slower}; {given.actors} rollout actors of {given.engine.slots} slots",
        f"  learner   {trains}",
        *([f"  unit      {unit} tokens: answers are long, so that times are exact to as many"] if unit > 1 else []),
        "",
        *_table(results, unit),
        "",
        *_masked_table(results),
        *(["  rollout actors + learner ranks, as configured otherwise", *_table(divided, unit), ""] if divided else []),
        *(f"  {line}" for line in advice.lines),
        *([f"  plot: {out}"] if out is not None else []),
    ]
    return "\n".join(lines)


def short_advice(config: Config, *, run: Path | None = None, seconds: float) -> list[str]:
    """What would run better, by models of `run` or assumed ones, found within some seconds.

    Raises:
        PmdflowError: the run does not say enough.
    """
    models = assumed(config) if run is None else calibrate(run)
    return [f"by models {models.origin}", *advise(config, models, seconds=seconds).lines]


def _table(results: Sequence[Result], unit: int) -> list[str]:
    head = (
        f"  {'policy':<14} {'s/iter':>8} {'tokens/s':>9} {'rollout':>8} {'learner':>8} {'age':>5} {'most':>4} "
        f"{'masked':>7} {'passed':>6} {'varies':>6} {'lag-1':>6}  rollout waits for"
    )
    rows = []
    for result in results:
        steady = result.steady
        waits = ", ".join(f"{cause} {percent(share)}" for cause, share in result.waits if share >= 0.005)
        rows.append(
            f"  {result.name:<14} {steady.iteration_s:>8.3g} {steady.tokens_per_s * unit:>9,.0f} "
            f"{percent(result.rollout_busy):>8} {percent(steady.learner_busy):>8} {steady.staleness_mean:>5.2f} "
            f"{steady.staleness_max:>4} {percent(steady.masked_share, 1):>7} "
            f"{steady.passed:>6} {number(steady.variation, 2):>6} {number(steady.lag_1, 2):>6}  {waits}"
        )
    return [head, *rows]


def _masked_table(results: Sequence[Result]) -> list[str]:
    """Whose tokens are masked, where any are."""
    rows = [
        f"  {result.name:<14} " + " ".join(f"{percent(share, 1):>6}" for share in result.steady.masked_by_decile)
        for result in results
        if result.steady.masked_share > 0
    ]
    return ["  masked tokens by decile of length, shortest first", *rows, ""] if rows else []


def _page(config: Config, results: Sequence[Result], unit: int) -> str:
    """Throughput against age and masked tokens, and where the rollout actors' time goes."""
    from plotly.graph_objects import Bar, Figure, Scatter

    names = [result.name for result in results]
    curve = Figure(
        [
            Scatter(
                name=f"{result.name}, {percent(result.steady.masked_share, 1)} masked",
                x=[result.steady.staleness_mean],
                y=[result.steady.tokens_per_s * unit],
                mode="markers",
                marker={"size": 14, "symbol": place},
            )
            for place, result in enumerate(results)
        ]
    )
    curve.update_layout(
        xaxis_title="mean age of a trained token, iterations", yaxis_title="generated tokens a second",
        yaxis_rangemode="tozero", template="plotly_white",
    )  # fmt: skip
    causes = list(dict.fromkeys(cause for result in results for cause, _ in result.waits))
    shares = {result.name: dict(result.waits) for result in results}
    bars = [Bar(name="generating", x=names, y=[result.rollout_busy for result in results])]
    bars += [
        Bar(name=f"waits: {cause}", x=names, y=[shares[name].get(cause, 0.0) for name in names]) for cause in causes
    ]
    times = Figure(bars)
    times.update_layout(
        barmode="stack", yaxis_tickformat=".0%", yaxis_title="rollout actors' time", template="plotly_white"
    )
    title = html.escape(f"pmdflow simulate: {config.run.name}")
    figures = curve.to_html(full_html=False, include_plotlyjs=True) + times.to_html(
        full_html=False, include_plotlyjs=False
    )
    return f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><h1>{title}</h1>{figures}</html>\n"
