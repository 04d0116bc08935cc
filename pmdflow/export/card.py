"""The model card of an export: which run, data and versions made it, and how it learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pmdflow.config.imports import shown
from pmdflow.config.recorded import recorded_meta, recorded_settings
from pmdflow.metrics.history import History

CURVE_ROWS = 20
"""Most rows of the curve's table."""
_SHOWN = (
    ("data", "task"), ("data", "group_size"), ("data", "max_tokens"), ("learner", "algorithm"), ("learner", "tau"),
    ("learner", "lr"), ("learner", "lora"), ("scheduler", "groups_per_iteration"), ("scheduler", "lookahead"),
    ("scheduler", "max_staleness"),
)  # fmt: skip
"""Settings that a reader wants to know. The others may hold what is not for everybody."""


def model_card(run: Path, *, iteration: int, version: int, dtype: str, adapter: bool) -> str:
    """A `README.md` with the metadata that the Hub reads. Settings are shown as written: `${NAME}` is not resolved.

    Args:
        run: Run directory.
        iteration: That of the checkpoint.
        version: Policy version of the weights.
        dtype: Type of the weights.
        adapter: The folder holds adapters, not a whole model.
    """
    config, hub = recorded_settings(run), hub_model(run)
    data = ModelCardData(
        base_model=None if hub is None else hub[0],
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["pmdflow", "reinforcement-learning", *(["lora"] if adapter else [])],
    )
    what = "Low-rank adapters for" if adapter else "Trained from"
    name = "@".join(hub) if hub is not None else Path(str((config.get("model") or {}).get("path", ""))).name
    summary = f"{what} `{name}` by online policy mirror descent with pmdflow: policy version {version}, {dtype}.\n"
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {run.absolute().name}, iteration {iteration}\n",
        summary,
        "| setting | value |\n|---|---|",
        *_settings(config),
        "\n| made with | version |\n|---|---|",
        *_versions(run),
        "\nRewards are means over the trained answers and over the held-out prompts; lengths are generated tokens.\n",
        "| iterations | reward | length | held-out reward |\n|---:|---:|---:|---:|",
        *_curve(run, iteration),
    ]
    return "\n".join(lines) + "\n"


def hub_model(run: Path) -> tuple[str, str] | None:
    """Id and commit of the run's model if it is one of the Hub's; None for a folder of this machine."""
    model: dict[str, str] = (recorded_meta(run).get("inputs") or {}).get("model") or {}
    return (model["id"], model["commit"]) if "id" in model else None


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    for section, key in _SHOWN:
        value = (config.get(section) or {}).get(key)
        if (section, key) == ("data", "task"):
            value = _tasks(value)
        if (section, key) == ("learner", "algorithm") and value is not None:
            value = shown(str(value))
        if value is not None:
            yield f"| `{section}.{key}` | {_cell(value)} |"
    names = ", ".join(dict.fromkeys(_rewards(config)))
    yield f"| rewards | {names} |"


def _rewards(config: Mapping[str, Any]) -> Iterator[str]:
    """Every function that judged a prompt of training, without the folder of its module."""
    data = config.get("data") or {}
    sources = data["task"] if isinstance(data.get("task"), list) else []
    for functions in ((config.get("reward") or {}).get("functions"), *(of.get("reward") for of in (data, *sources))):
        for item in functions or []:
            yield f"{_cell(shown(str(item.get('function'))))} x {item.get('weight', 1.0):g}"


def _tasks(task: Any) -> str:
    """The data, without its arguments and without where files lie."""
    names = [source.get("task") for source in task] if isinstance(task, list) else [task]
    shown = [str(name) for name in names]
    return ", ".join(name if name.startswith(("reasoning_gym/", "hf:")) else Path(name).name for name in shown)


def _versions(run: Path) -> Iterator[str]:
    meta = recorded_meta(run)
    hardware, packages = meta.get("hardware") or {}, meta.get("packages") or {}
    versions = {"pmdflow": meta.get("pmdflow"), **packages}
    versions |= {name: hardware.get(name) for name in ("torch", "transformers")}
    yield from (f"| {name} | {version} |" for name, version in versions.items() if version)


def _curve(run: Path, iteration: int) -> Iterator[str]:
    history = History(run, max_spans=0)
    history.update()
    numbers = [number for number in sorted({0, *history.iterations}) if number <= iteration]
    for number in _thinned(numbers):
        record, held_out = history.iterations.get(number, {}), history.evals.get(number, {})
        cells = (record.get("reward/mean"), record.get("trajectory/length_mean"), held_out.get("eval/reward_mean"))
        yield f"| {number} | " + " | ".join("" if cell is None else f"{cell:.4g}" for cell in cells) + " |"


def _thinned(numbers: Sequence[int]) -> list[int]:
    """Evenly spaced ones, the first and the last among them."""
    if len(numbers) <= CURVE_ROWS:
        return list(numbers)
    return [numbers[round(row * (len(numbers) - 1) / (CURVE_ROWS - 1))] for row in range(CURVE_ROWS)]


def _cell(value: Any) -> str:
    return f"`{value}`".replace("|", "\\|")
