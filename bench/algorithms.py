"""Which algorithm learns best on the tiny model? Runs of the quick start in one process; a table, JSON and one plot.

    nice python bench/algorithms.py --runs DIRECTORY --out bench/results/algorithms

Each algorithm first gets ten tries with one seed: five learning rates (`RATES`) with the first of its own settings
(`OWN`), then the others of these at the best rate. The try with the highest held-out reward then runs with fresh
seeds; all algorithms see the same prompts under one seed. The quick start's engine, rewards and learner take turns, so
that neither speed nor load of the machine has an influence: each claim was generated `LAG` versions before it is
trained, about as old as most tokens of the quick start, whole and without segments. The peers of PMD are GRPO, GSPO,
CTPO and BOLT; UCPO, A-NSR and GDPO give PMD other credit. Runs that are finished in `--runs` are read, not repeated.
More settings follow as KEY=VALUE.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pmdflow.config.load import load
from pmdflow.config.schema import Config
from pmdflow.data.prompts import make_prompts
from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.learner.learner import Learner
from pmdflow.reward.rubric import load_rubric
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.make import make_engine
from pmdflow.types import Mask, Prompt, Stop, TrainBatch

SETTINGS = (
    # The short problems of the quick start, four fifths of it: a run takes half a minute instead of two.
    "data.task=reasoning_gym/chain_sum",
    "data.args={min_terms: 3, max_terms: 6, min_digits: 1, max_digits: 1}",
    "data.max_tokens=128",
    "rollout.tokens_per_segment=null",
    "rollout.slots=128",
    "eval.prompts=512",
    "learner.aggregation=seq-mean-token-mean",
)
RATES = ("5.0e-5", "1.0e-4", "2.0e-4", "4.0e-4", "8.0e-4")
OWN: dict[str, tuple[str, ...]] = {
    "pmd_mean": ("tau=0.1", "tau=0.02", "tau=0.5", "tau=0.1 SUM", "tau=0.5 SUM", "tau=1.0 SUM"),
    # At a small tau the baseline is nearly the best reward of the others: right answers get an advantage of about 0
    # and wrong ones of about -1, and a policy that only unlearns falls apart.
    "pmd_partition": ("tau=0.5", "tau=0.25", "tau=1.0", "tau=0.5 SUM", "tau=1.0 SUM", "tau=2.0 SUM"),
    "boltzmann_pmd": ("tau=0.5", "tau=0.25", "tau=1.0", "tau=0.5 SUM", "tau=1.0 SUM", "tau=2.0 SUM"),
    "weighted_sft": ("tau=0.1", "tau=0.05", "tau=0.2", "tau=0.3", "tau=0.02", "tau=0.15"),
    "token_pmd": (
        "tau=0.1",
        "tau=0.02",
        "tau=0.5",
        "tau=0.1 clip_low=0.2 clip_high=0.2",
        "tau=0.5 clip_low=0.2 clip_high=0.2",
        "tau=0.1 clip_low=0.8 clip_high=0.8",
    ),
    "ctpo": (
        "",
        "clip_high=0.4",
        "clip_low=0.4 clip_high=0.4",
        "clip_low=0.1 clip_high=0.1",
        "clip_low=0.3 clip_high=0.3",
        "clip_low=0.8 clip_high=0.8",
    ),
    "grpo": (
        "",
        "clip_high=0.28",
        "clip_low=0.4 clip_high=0.4",
        "clip_low=0.1 clip_high=0.1",
        "clip_low=0.3 clip_high=0.3",
        "clip_low=0.8 clip_high=0.8",
    ),
    # The first bands suit answers of tens of tokens; the paper's, which is the fourth, is for thousands.
    "gspo": (
        "clip_low=0.03 clip_high=0.04",
        "clip_low=0.01 clip_high=0.013",
        "clip_low=0.1 clip_high=0.13",
        "",
        "clip_low=0.02 clip_high=0.027",
        "clip_low=0.05 clip_high=0.067",
    ),
    "ucpo": (
        "tau=0.5 SUM settings.share=0.2",
        "tau=0.5 SUM settings.share=0.1",
        "tau=0.5 SUM settings.share=0.5",
        "tau=1.0 SUM settings.share=0.2",
        "tau=2.0 SUM settings.share=0.2",
        "tau=0.1 settings.share=0.2",
    ),
    "a_nsr": (
        "tau=0.5 SUM",
        "tau=1.0 SUM",
        "tau=0.1",
        "tau=0.5 SUM settings.kappa=0.1",
        "tau=0.5 SUM settings.lambda_min=0.5 settings.lambda_max=0.5",
        "tau=0.5 SUM settings.schedule=accuracy",
    ),
    "gdpo": ("tau=0.5 SUM", "tau=1.0 SUM", "tau=2.0 SUM", "tau=0.1", "tau=0.5", "tau=1.0"),
}
"""Six settings of each algorithm, keys of `learner`; `SUM` sums over the tokens of a sequence, others take means."""
SCAN_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
ITERATIONS = 15
LAG = 1
COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#7f7f7f",
    "#bcbd22",
    "#e377c2",
    "#000000",
)
SMOOTHING = 3
"""Iterations in the moving mean of the training reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run showed."""

    algorithm: str
    settings: tuple[str, ...]
    seed: int
    train: list[float]
    """Mean reward of each iteration's claim."""
    last: float
    """Mean reward of the held-out prompts under the final policy."""
    length: float
    """Mean tokens of these answers."""


class Rollout:
    """The quick start's engine and rewards, without actors and store."""

    def __init__(self, config: Config) -> None:
        """Load the model, with the weights of version 0."""
        self._config = config
        self.engine = make_engine(config, seed=config.run.seed)
        self.prompts = make_prompts(config)
        self._rubric = load_rubric(config.reward)
        self._tokenizer = load_tokenizer(config.model.path)

    def answer(self, prompts: Sequence[Prompt], *, temperature: float) -> TrainBatch:
        """Answer every prompt once; each run of equal prompts is a group."""
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        stops = np.zeros(len(prompts), np.uint8)
        waiting = deque(range(len(prompts)))
        held = 0
        while waiting or held:
            while waiting and held < self.engine.num_slots:
                self.engine.add(self._request(waiting[0], prompts[waiting.popleft()], temperature))
                held += 1
            for output in self.engine.step():
                tokens[output.id] += output.tokens
                logprobs[output.id] += output.logprobs
                if output.stop is not None:
                    stops[output.id] = Stop[output.stop.upper()]
                    held -= 1
        return self._batch(prompts, tokens, logprobs, stops, temperature)

    def _request(self, number: int, prompt: Prompt, temperature: float) -> Request:
        most = self._config.data.max_tokens
        return Request(id=number, tokens=prompt.tokens, limit=most, remaining=most, temperature=temperature)

    def _batch(
        self,
        prompts: Sequence[Prompt],
        tokens: list[list[int]],
        logprobs: list[list[float]],
        stops: np.ndarray[Any, np.dtype[np.uint8]],
        temperature: float,
    ) -> TrainBatch:
        flags = Mask.GENERATED | Mask.TRAINED
        sizes = [(len(prompt.tokens), len(own)) for prompt, own in zip(prompts, tokens, strict=True)]

        def columns(before: float, of: Sequence[Sequence[float]], dtype: type) -> np.ndarray[Any, Any]:
            return np.concatenate([[*[before] * p, *own] for (p, _), own in zip(sizes, of, strict=True)]).astype(dtype)

        def constant(before: float, after: float, dtype: type) -> np.ndarray[Any, Any]:
            return columns(before, [[after] * n for _, n in sizes], dtype)

        rewards = np.array([self._reward(p, own) for p, own in zip(prompts, tokens, strict=True)])
        ids = {prompt.id: number for number, prompt in enumerate(prompts)}
        return TrainBatch(
            iteration=0,
            version=0,
            tokens=np.concatenate([[*p.tokens, *own] for p, own in zip(prompts, tokens, strict=True)]).astype(np.int32),
            logprobs=columns(0.0, logprobs, np.float32),
            versions=constant(-1, self.engine.version, np.int32),
            temperatures=constant(1.0, temperature, np.float32),
            mask=constant(0, flags, np.uint8),
            cu_seqlens=np.cumsum([0, *(p + n for p, n in sizes)]).astype(np.int64),
            prompt_lengths=np.array([p for p, _ in sizes], np.int32),
            groups=np.array([ids[prompt.id] for prompt in prompts]),
            trajectories=np.arange(len(prompts)),
            rewards=rewards,
            components={"score": rewards},
            stops=stops,
            prompt_ids=tuple(prompt.id for prompt in prompts),
        )

    def _reward(self, prompt: Prompt, tokens: list[int]) -> float:
        completion = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scored = self._rubric(completion=completion, prompt=prompt.text, metadata=prompt.metadata)
        assert scored.outcome != "infra_failure", scored.message
        return scored.reward


def scan(algorithm: str, **where: Any) -> list[Run]:
    """All tries of an algorithm: the learning rates, then its other settings at the best of them."""
    own, *others = map(_settings, OWN[algorithm])
    tries = [train(algorithm, (*own, f"learner.lr={rate}"), seed=SCAN_SEED, **where) for rate in RATES]
    best = _best(tries).settings[-1]
    return tries + [train(algorithm, (*other, best), seed=SCAN_SEED, **where) for other in others]


def _settings(own: str) -> tuple[str, ...]:
    return tuple(f"learner.{key}" for key in own.replace("SUM", "aggregation=seq-mean-token-sum").split())


def _best(tries: list[Run]) -> Run:
    return max(tries, key=lambda run: run.last)


def train(algorithm: str, own: tuple[str, ...], *, seed: int, config: str, runs: Path, settings: list[str]) -> Run:
    """Train an algorithm with settings of its own, unless that run is finished already."""
    name = ",".join([algorithm, *(setting.removeprefix("learner.") for setting in own)])
    file = runs / f"{name}-seed{seed}.json"
    if file.exists():
        return Run(**json.loads(file.read_text()))
    given = [*SETTINGS, *settings, f"run.seed={seed}", f"learner.algorithm={algorithm}", *own]
    loaded = load(config, given).config
    rollout, learner = Rollout(loaded), Learner(config=loaded, rank=0)
    learner.setup(learner.address())
    waiting: deque[TrainBatch] = deque()
    rewards: list[float] = []
    cursors = iter(range((ITERATIONS + LAG) * loaded.scheduler.groups_per_iteration))
    for iteration in range(1, ITERATIONS + 1):
        while len(waiting) <= LAG:
            group = [rollout.prompts.prompt(next(cursors)) for _ in range(loaded.scheduler.groups_per_iteration)]
            members = [prompt for prompt in group for _ in range(loaded.data.group_size)]
            waiting.append(rollout.answer(members, temperature=loaded.rollout.temperature))
        batch = replace(waiting.popleft(), iteration=iteration, version=iteration - 1)
        learner.train(batch)
        rewards.append(float(batch.rewards.mean()))
        weights = learner.weights()
        assert weights is not None
        rollout.engine.load_weights(iteration, weights, on_new_weights="keep_kv")
    learner.close()
    held_out = rollout.answer(rollout.prompts.held_out(loaded.eval.prompts), temperature=loaded.eval.temperature)
    length = float((held_out.mask != 0).sum() / len(held_out.rewards))
    last = float(held_out.rewards.mean())
    run = Run(algorithm=algorithm, settings=own, seed=seed, train=rewards, last=last, length=length)
    runs.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(run)) + "\n")
    return run


def table(runs: list[Run]) -> str:
    """Final held-out reward, best first: mean and standard error over seeds, and what is missing to the best."""
    by_seed = {name: {run.seed: run for run in runs if run.algorithm == name} for name in _ranked(runs)}
    best = next(iter(by_seed.values()))
    lines = [
        "| algorithm | own settings | held-out, last | behind the best | train, last 5 | tokens | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seeds in by_seed.items():
        found = list(seeds.values())
        behind = [best[seed].last - run.last for seed, run in seeds.items() if seed in best]
        lines.append(
            f"| {name} | {_short(found[0])} | {_mean([run.last for run in found])} "
            f"| {_mean(behind) if seeds is not best else '-'} "
            f"| {_mean([float(np.mean(run.train[-5:])) for run in found])} "
            f"| {np.mean([run.length for run in found]):.0f} | {len(found)} |"
        )
    return "\n".join(lines)


def _short(run: Run) -> str:
    return " ".join(setting.removeprefix("learner.") for setting in run.settings)


def _ranked(runs: list[Run]) -> list[str]:
    names = dict.fromkeys(run.algorithm for run in runs)
    return sorted(names, key=lambda name: -float(np.mean([run.last for run in runs if run.algorithm == name])))


def _mean(values: list[float]) -> str:
    """The mean, and its standard error where there are several."""
    error = f" +- {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


LEFT, RIGHT, TOP, BOTTOM = 50, 520, 40, 360
"""Of the left panel, in the plot's units."""


def plot(runs: list[Run]) -> str:
    """As SVG: training reward by iteration, mean and range over seeds; and the final held-out reward of each seed."""
    body = _axes()
    for index, name in enumerate(_ranked(runs)):
        found = [run for run in runs if run.algorithm == name]
        color = COLORS[list(OWN).index(name)]
        smooth = np.array([np.convolve(run.train, np.ones(SMOOTHING) / SMOOTHING, "valid") for run in found])
        across = [_x(SMOOTHING + step) for step in range(smooth.shape[1])]
        outline = _points(across + across[::-1], [*smooth.max(0), *smooth.min(0)[::-1]])
        column, mean = RIGHT + 75 + 50 * index, _y(float(np.mean([run.last for run in found])))
        body += [
            f'<polygon points="{outline}" fill="{color}" opacity="0.12"/>',
            f'<polyline points="{_points(across, smooth.mean(0))}" fill="none" stroke="{color}" stroke-width="2"/>',
            *(f'<circle cx="{column}" cy="{_y(run.last):.1f}" r="4" fill="{color}"/>' for run in found),
            f'<line x1="{column - 14}" y1="{mean:.1f}" x2="{column + 14}" y2="{mean:.1f}" stroke="{color}"/>',
            f'<text transform="translate({column - 6},{BOTTOM + 14}) rotate(40)" fill="{color}">{escape(name)}</text>',
        ]
    style = 'font-family="sans-serif" font-size="13" fill="#222"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 450" {style}>'
    return "\n".join([head, '<rect width="1020" height="450" fill="white"/>', *body, "</svg>"])


def _axes() -> list[str]:
    rewards = np.linspace(0, 1, 6)
    iterations = range(SMOOTHING, ITERATIONS + 1, SMOOTHING)
    return [
        f'<text x="{LEFT}" y="25" font-weight="bold">training reward, mean of {SMOOTHING} iterations</text>',
        f'<text x="{RIGHT + 60}" y="25" font-weight="bold">held-out reward after {ITERATIONS} iterations</text>',
        *(f'<line x1="{LEFT}" y1="{_y(r):.1f}" x2="970" y2="{_y(r):.1f}" stroke="#ddd"/>' for r in rewards),
        *(f'<text x="{LEFT - 8}" y="{_y(r) + 4:.1f}" text-anchor="end">{r:.1f}</text>' for r in rewards),
        *(f'<text x="{_x(i):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{i}</text>' for i in iterations),
    ]


def _x(iteration: float) -> float:
    return LEFT + (RIGHT - LEFT) * iteration / ITERATIONS


def _y(reward: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * reward


def _points(across: Iterable[float], rewards: Iterable[float]) -> str:
    return " ".join(f"{x:.1f},{_y(reward):.1f}" for x, reward in zip(across, rewards, strict=True))


def main() -> None:
    """Run what is missing, one after the other, and write table, JSON and plot after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/algorithms"), help="file names without ending")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"config": options.config, "runs": options.runs, "settings": options.settings}
    scans: dict[str, list[Run]] = {}
    for algorithm in OWN:
        scans[algorithm] = scan(algorithm, **where)
        print(algorithm, *(f"{_short(run)} {run.last:.3f}" for run in scans[algorithm]), sep="; ", flush=True)
    runs: list[Run] = []
    for seed in SEEDS:
        for algorithm, tries in scans.items():
            best = tuple(_best(tries).settings)
            runs.append(train(algorithm, best, seed=seed, **where))
            results = {
                "settings": [*SETTINGS, *options.settings],
                "scan": [asdict(run) for part in scans.values() for run in part],
                "runs": [asdict(run) for run in runs],
            }
            options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".svg").write_text(plot(runs))
            print(table(runs), flush=True)


if __name__ == "__main__":
    main()
