"""Charts as plotly dictionaries: pure functions of records, colour-blind-safe, readable on light and dark."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pmdflow.dashboard.queries import RunView, column
from pmdflow.metrics.spans import is_bubble

Figure = dict[str, Any]

# Okabe and Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#8A8F98"

TIMELINE_WINDOW_S = 120.0
HEIGHT = 270
"""Pixels of a chart; as `.chart` in style.css."""
_MOST_POINTS = 700
_FEW_ITERATIONS = 12
_GRID = "rgba(128,128,128,0.18)"
SPAN_COLOURS: Mapping[str, str] = {
    "generate": GREEN, "apply_weights": PURPLE, "step": BLUE, "reference": SKY, "publish": PURPLE,
    "checkpoint": YELLOW, "score": GREEN, "start": GREY, "archive": GREY, "wait_lease": ORANGE, "wait_grant": YELLOW,
    "wait_environment": VERMILION, "wait_claim": VERMILION, "wait_controller": ORANGE, "wait_unscored": ORANGE,
    "wait_groups": ORANGE, "wait_weights": VERMILION, "offload": GREY, "wait_device": ORANGE, "wait_evaluation": SKY,
}  # fmt: skip
"""Colour of every span, in the order of the legend."""
_OTHER_COLOURS = (SKY, GREEN, PURPLE, BLUE, ORANGE, GREY)
_AGE_COLOURS = (BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILION, PURPLE)


def figures(view: RunView) -> dict[str, Figure]:
    """Every chart of the run page, by the id of its element."""
    with view.lock:
        iterations, evals, samples = view.iterations(), view.evals(), thin(view.history.samples)
        origin, limit = view.origin(), view.setting("scheduler", "max_staleness")
        return {
            "reward": reward(iterations, evals, view.eval_sets()),
            "length": length(iterations),
            "delay": delay(iterations),
            "staleness": staleness(iterations, limit),
            "budget": budget(iterations),
            "store": store(samples, origin),
            "rate": rate(samples, origin),
            "timeline": timeline(list(view.history.spans), origin),
        }


def reward(
    iterations: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    sets: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Figure:
    """Mean reward of each claim, and of held-out prompts and evaluation sets at the iteration of their round."""
    x = column(iterations, "iteration")
    data = [
        make_line("train mean", x, column(iterations, "reward/mean"), BLUE),
        {
            **make_line("held-out", column(evals, "eval/round"), column(evals, "eval/reward_mean"), VERMILION),
            "mode": "lines+markers",
            "marker": {"size": 9, "symbol": "diamond"},
            "line": {"color": VERMILION, "width": 1.5, "dash": "dot"},
        },
    ]
    for index, (name, rounds) in enumerate(sorted(sets.items())):
        x, y = column(rounds, "eval/round"), column(rounds, f"eval/{name}/reward_mean")
        data.append({**make_line(name, x, y, _OTHER_COLOURS[index % len(_OTHER_COLOURS)]), "mode": "lines+markers"})
    return {"data": data, "layout": make_layout(iteration_axis(iterations), "reward")}


def length(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Generated tokens of a trajectory: mean and 90th percentile of each claim, and the mean in order of admission."""
    x = column(iterations, "iteration")
    in_order = column(iterations, "trajectory/length_in_order_mean")
    data = [
        make_line("mean", x, column(iterations, "trajectory/length_mean"), BLUE),
        make_line("in order of admission", x, in_order, SKY, dash="dot"),
        make_line("90th percentile", x, column(iterations, "trajectory/length_p90"), ORANGE, dash="dash"),
    ]
    return {
        "data": data,
        "layout": make_layout(iteration_axis(iterations), "tokens") | {"yaxis": _axis("tokens", rangemode="tozero")},
    }


def delay(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Iterations from admission to claim: mean, and those of the shortest and of the longest tenth of each claim."""
    x = column(iterations, "iteration")
    deciles = [record.get("trajectory/delay_by_decile") or [None] for record in iterations]
    data = [
        make_line("mean", x, column(iterations, "trajectory/delay_mean"), BLUE),
        make_line("longest tenth", x, [decile[-1] for decile in deciles], VERMILION, dash="dash"),
        make_line("shortest tenth", x, [decile[0] for decile in deciles], GREEN, dash="dot"),
    ]
    layout = make_layout(iteration_axis(iterations), "iterations")
    return {"data": data, "layout": layout | {"yaxis": _axis("iterations", rangemode="tozero")}}


def staleness(iterations: Sequence[Mapping[str, Any]], limit: int | None) -> Figure:
    """Share of the tokens with a gradient by staleness, stacked over iterations; masked tokens as a line."""
    histograms = [record.get("staleness/tokens") or {} for record in iterations]
    totals = [sum(histogram.values()) or 1 for histogram in histograms]
    x = column(iterations, "iteration")
    data: list[Figure] = []
    for age in sorted({int(age) for histogram in histograms for age in histogram}):
        over = limit is not None and age > limit
        share = [100 * h.get(str(age), 0) / total for h, total in zip(histograms, totals, strict=True)]
        data.append({
            "type": "bar", "name": f"{age} OVER THE LIMIT" if over else f"{age}", "x": x, "y": share,
            "marker": {"color": "#FF0000" if over else _AGE_COLOURS[age % len(_AGE_COLOURS)], "line": {"width": 0}},
            "hovertemplate": f"staleness {age}: %{{y:.1f}} %<extra></extra>",
        })  # fmt: skip
    masked = [None if m is None else 100 * m for m in column(iterations, "staleness/masked_share")]
    data.append(make_line("masked", x, masked, "#FF5CB8", dash="dot"))
    title = "no limit" if limit is None else f"limit {limit}"
    layout = make_layout(iteration_axis(iterations), f"% of tokens ({title})")
    return {"data": data, "layout": layout | {"barmode": "stack", "bargap": 0.12}}


def budget(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens spent under each iteration's version, against its budget."""
    x = column(iterations, "iteration")
    spent = {
        "type": "bar", "name": "spent", "x": x, "y": column(iterations, "scheduler/tokens_spent"),
        "marker": {"color": SKY, "line": {"width": 0}},
    }  # fmt: skip
    limit = make_line("budget", x, column(iterations, "scheduler/tokens_budget"), VERMILION, dash="dash")
    limit["line"]["shape"] = "hvh"
    layout = make_layout(iteration_axis(iterations), "tokens") | {
        "yaxis": _axis("tokens", rangemode="tozero"),
        "bargap": 0.12,
    }
    return {"data": [spent, limit], "layout": layout}


def store(samples: Sequence[Mapping[str, Any]], origin: float) -> Figure:
    """Trajectories in the store by state, stacked, and groups ready to be claimed, over time."""
    x = _since(samples, origin)
    states = (("leased", GREEN), ("idle", SKY), ("unscored", ORANGE))
    data = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "trajectories", "name": name, "x": x,
            "y": column(samples, f"store/trajectories_{name}"), "line": {"color": colour, "width": 0.8},
        }
        for name, colour in states
    ]  # fmt: skip
    ready = make_line("groups ready", x, column(samples, "store/groups_ready"), BLUE)
    ready["line"]["shape"] = "hv"
    layout = make_layout(_axis("seconds since the start", tickformat=","), "trajectories, groups")
    return {"data": [*data, ready], "layout": layout | {"yaxis": _axis("trajectories, groups", rangemode="tozero")}}


def rate(samples: Sequence[Mapping[str, Any]], origin: float) -> Figure:
    """Generated tokens a second over time."""
    line = make_line("tokens/s", _since(samples, origin), column(samples, "rollout/tokens_per_s"), GREEN)
    layout = make_layout(_axis("seconds since the start", tickformat=","), "tokens/s")
    return {"data": [line], "layout": layout | {"yaxis": _axis("tokens/s", rangemode="tozero")}}


def timeline(spans: Sequence[Mapping[str, Any]], origin: float, window_s: float = TIMELINE_WINDOW_S) -> Figure:
    """A lane an actor over the newest `window_s` seconds; bubbles are hatched and named by their cause."""
    end = max((span["end"] for span in spans), default=origin)
    start = max(min((span["start"] for span in spans), default=origin), end - window_s)
    recent = [span for span in spans if span["end"] > start]
    bars: defaultdict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for span in _merged(recent, gap_s=window_s / 1000):
        bars[span[1]].append((span[0], max(span[2], start), span[3]))
    actors = sorted({span["actor"] for span in recent}, key=_lane)
    data = [_bars(name, bars[name], origin) for name in sorted(bars, key=_work_first)]
    layout = make_layout(_axis("seconds since the start", tickformat=","), "") | {
        "barmode": "overlay", "bargap": 0.25, "hovermode": "closest",
        "xaxis": _axis(
            "seconds since the start", tickformat=",", range=[start - origin, max(end - origin, start - origin + 1)]
        ),
        "yaxis": _axis("", categoryorder="array", categoryarray=actors[::-1], type="category", automargin=True),
        "height": max(130 + 34 * len(actors), HEIGHT),
    }  # fmt: skip
    return {"data": data, "layout": layout}


def thin(records: Sequence[Mapping[str, Any]], most: int = _MOST_POINTS) -> list[Mapping[str, Any]]:
    """At most about `most` records, evenly, the last one kept."""
    stride = -(-len(records) // most) or 1
    return list(records[::-1][::stride][::-1])


def _merged(spans: Sequence[Mapping[str, Any]], *, gap_s: float) -> list[tuple[str, str, float, float]]:
    """Spans of one actor and name that nearly touch, as one: (actor, name, start, end)."""
    merged: list[tuple[str, str, float, float]] = []
    ordered = sorted(spans, key=lambda span: (str(span["actor"]), str(span["name"]), span["start"]))
    for span in ordered:
        actor, name = str(span["actor"]), str(span["name"])
        if merged and merged[-1][:2] == (actor, name) and span["start"] - merged[-1][3] < gap_s:
            merged[-1] = (actor, name, merged[-1][2], max(merged[-1][3], span["end"]))
        else:
            merged.append((actor, name, span["start"], span["end"]))
    return merged


def _bars(name: str, spans: Sequence[tuple[str, float, float]], origin: float) -> Figure:
    bubble = is_bubble(name)
    marker: Figure = {"color": _colour(name), "line": {"width": 0}}
    if bubble:
        marker["pattern"] = {"shape": "/", "size": 5, "solidity": 0.35, "fillmode": "overlay"}
    return {
        "type": "bar", "orientation": "h", "marker": marker,
        "name": f"bubble: {name.removeprefix('wait_')}" if bubble else name,
        "y": [actor for actor, _, _ in spans],
        "base": [round(start - origin, 3) for _, start, _ in spans],
        "x": [round(end - start, 3) for _, start, end in spans],
        "hovertemplate": f"%{{y}} {name}: %{{x:.2f}} s from %{{base:.1f}} s<extra></extra>",
    }  # fmt: skip


def _colour(name: str) -> str:
    """That of the name; of one that another version gave, a colour that follows from the name alone."""
    return SPAN_COLOURS.get(name) or _OTHER_COLOURS[zlib.crc32(name.encode()) % len(_OTHER_COLOURS)]


def _lane(actor: str) -> tuple[int, int, str]:
    roles = ("rollout", "reward", "store", "controller", "learner")
    role = next((i for i, role in enumerate(roles) if actor.startswith(role)), len(roles))
    number = actor.rpartition("-")[2]
    return role, int(number) if number.isdecimal() else 0, actor


def _work_first(name: str) -> tuple[bool, int, str]:
    order = list(SPAN_COLOURS)
    return is_bubble(name), order.index(name) if name in order else len(order), name


def _since(records: Sequence[Mapping[str, Any]], origin: float) -> list[float]:
    return [round(record["time"] - origin, 1) for record in records]


def make_line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, dash: str = "solid") -> Figure:
    """A trace of one curve."""
    line: Figure = {"color": colour, "width": 2, "dash": dash}
    few = len(x) < 3  # a line of one point is invisible
    return {"type": "scatter", "mode": "lines+markers" if few else "lines", "name": name, "x": x, "y": y, "line": line}


def _axis(title: str, **options: Any) -> Figure:
    return {
        "title": {"text": title, "font": {"size": 11}, "standoff": 6}, "gridcolor": _GRID, "zeroline": False,
        "linecolor": _GRID, "automargin": True, "tickfont": {"size": 11}, **options,
    }  # fmt: skip


def iteration_axis(iterations: Sequence[Mapping[str, Any]]) -> Figure:
    """The axis of charts over these iterations."""
    whole = {"dtick": 1} if len(iterations) <= _FEW_ITERATIONS else {}  # else there are ticks between iterations
    return _axis("iteration", **whole)


def make_layout(x: Figure, y: str) -> Figure:
    """The layout that charts share: the axis `x`, and one with the title `y`."""
    return {
        "xaxis": x, "yaxis": _axis(y), "height": HEIGHT, "margin": {"l": 8, "r": 8, "t": 6, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "hovermode": "x unified",
        "legend": {
            "orientation": "h", "traceorder": "normal", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11},
        },
        "uirevision": "keep",  # zoom survives updates
    }  # fmt: skip
