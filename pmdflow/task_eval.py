"""`pmdflow eval`: one checkpoint on one task, n samples a prompt: avg@n and pass@k with confidence intervals."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pmdflow.errors import WaitTimeout
from pmdflow.metrics.confidence import bootstrap_mean, wilson
from pmdflow.reward.rubric import Scored
from pmdflow.reward.runner import RewardRunner, ScoreItem
from pmdflow.rollout.control import SamplingControl, control_for
from pmdflow.rollout.engine import Output, Request, RolloutEngine
from pmdflow.rollout.stop_text import StopText
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STALL_TIMEOUT_S = 600.0
"""Generation without a token for this long is given up."""


@dataclass(slots=True)
class Sample:
    """One attempt at a prompt."""

    completion: str
    tokens: int
    stop: str
    reward: float | None = None
    """None when scoring failed for good."""
    outcome: str = ""
    components: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    """Why it could not be scored."""


@dataclass(slots=True)
class _Running:
    tokens: list[int]
    stop_text: StopText | None


def evaluate(
    *,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    runner: RewardRunner,
    prompts: Sequence[Prompt],
    samples: int,
    defaults: SamplingControl,
) -> list[list[Sample]]:
    """Generate and score `samples` attempts at every prompt; rewards are made beside generation.

    Raises:
        WaitTimeout: nothing was generated, or an attempt not scored, for too long.
    """
    waiting = deque(range(len(prompts) * samples))
    running: dict[int, _Running] = {}
    done: list[list[Sample]] = [[] for _ in prompts]
    scores: list[tuple[Sample, Future[Scored]]] = []
    last = time.monotonic()
    while waiting or running:
        while waiting and len(running) < engine.num_slots:
            id = waiting.popleft()
            running[id] = _begin(engine, tokenizer, id, prompts[id // samples], defaults)
        for output in engine.step():
            last = time.monotonic()
            sample = _take(engine, tokenizer, running, output)
            if sample is not None:
                prompt = prompts[output.id // samples]
                done[output.id // samples].append(sample)
                item = ScoreItem(completion=sample.completion, prompt=prompt.text, metadata=prompt.metadata)
                scores.append((sample, runner.submit(item)))
        if time.monotonic() - last > STALL_TIMEOUT_S:
            raise WaitTimeout(f"{len(running)} attempts: no token was generated for {STALL_TIMEOUT_S:g} s")
    for scored, future in scores:
        _score(scored, future)
    return done


def _begin(
    engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, id: int, prompt: Prompt, defaults: SamplingControl
) -> _Running:
    control = control_for(prompt.metadata, defaults)
    engine.add(
        Request(
            id=id,
            tokens=prompt.tokens,
            limit=control.max_tokens,
            remaining=control.max_tokens,
            temperature=control.temperature,
            top_p=control.top_p,
            min_tokens=control.min_tokens,
            stop_token_ids=control.stop_token_ids,
        )
    )
    stop_text = StopText(tokenizer, control.stop, ignored=control.min_tokens) if control.stop else None
    return _Running(tokens=[], stop_text=stop_text)


def _take(
    engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, running: dict[int, _Running], output: Output
) -> Sample | None:
    """The finished attempt, if `output` ends it."""
    held, stop = running[output.id], output.stop
    end = held.stop_text.find(output.tokens) if held.stop_text is not None else None
    held.tokens += output.tokens if end is None else output.tokens[: end + 1]
    if end is not None:
        stop = "stop"
        engine.abort(output.id)
    if stop is None:
        return None
    del running[output.id]
    text = str(tokenizer.decode(held.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Sample(completion=text, tokens=len(held.tokens), stop=stop)


def _score(sample: Sample, future: Future[Scored]) -> None:
    try:
        scored = future.result(timeout=STALL_TIMEOUT_S)
    except TimeoutError as error:
        raise WaitTimeout(f"an attempt was not scored within {STALL_TIMEOUT_S:g} s") from error
    sample.outcome, sample.message, sample.components = scored.outcome, scored.message, dict(scored.components)
    sample.reward = None if scored.outcome == "infra_failure" else scored.reward


def pass_at_k(*, attempts: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k attempts passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k is above the number of attempts.

    Source: arXiv:2107.03374 eq. 1.

    Example:
        >>> pass_at_k(attempts=4, passed=1, k=2)
        0.5
    """
    if not 1 <= k <= attempts:
        raise ValueError(f"pass@{k} needs at least {k} attempts and k >= 1; there are {attempts}")
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


def summarize(results: Sequence[Sequence[Sample]], *, ks: Sequence[int], pass_reward: float) -> dict[str, Any]:
    """avg@n, and pass@k for each of `ks`, with 95 % intervals over prompts.

    Attempts that could not be scored are in neither. The interval of avg@n is a bootstrap over prompts, that of pass@k
    Wilson's with as many trials as prompts: attempts at one prompt are no independent evidence.
    """
    rewards = [[s.reward for s in samples if s.reward is not None] for samples in results]
    means = [float(np.mean(values)) for values in rewards if values]
    flat = [sample for samples in results for sample in samples]
    summary: dict[str, Any] = {
        "prompts": len(results),
        "attempts": len(flat),
        "infra_failures": sum(sample.reward is None for sample in flat),
        "invalid": sum(sample.outcome == "invalid" for sample in flat),
        "tokens": sum(sample.tokens for sample in flat),
        "length_mean": float(np.mean([sample.tokens for sample in flat])),
        "stops": dict(Counter(sample.stop for sample in flat)),
        "avg": _interval(float(np.mean(means)), *bootstrap_mean(means), prompts=len(means)) if means else None,
        "pass": {},
    }
    for k in ks:
        passes = [
            pass_at_k(attempts=len(values), passed=sum(value >= pass_reward for value in values), k=k)
            for values in rewards
            if len(values) >= k
        ]
        if passes:
            mean = float(np.mean(passes))
            summary["pass"][str(k)] = _interval(mean, *wilson(mean, len(passes)), prompts=len(passes))
    return summary


def _interval(mean: float, low: float, high: float, *, prompts: int) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "prompts": prompts}


def write_results(
    out: Path, prompts: Sequence[Prompt], results: Sequence[Sequence[Sample]], summary: Mapping[str, Any]
) -> None:
    """Write `samples.jsonl`, a line a prompt, and `summary.json`."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
        for prompt, samples in zip(prompts, results, strict=True):
            row = {"prompt_id": prompt.id, "prompt": prompt.text, "samples": [asdict(sample) for sample in samples]}
            file.write(json.dumps(row) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """The summary as a table."""
    table = Table("metric", "value", "95 % interval", "prompts", title=f"{summary['checkpoint']} on {summary['task']}")
    rows = {f"avg@{summary['samples']}": summary["avg"]} | {f"pass@{k}": v for k, v in summary["pass"].items()}
    for name, value in rows.items():
        if value is not None:
            bounds = f"{value['low']:.4f} to {value['high']:.4f}"
            table.add_row(name, f"{value['mean']:.4f}", bounds, str(value["prompts"]))
    console.print(table)
    console.print(
        f"{summary['attempts']} attempts, {summary['length_mean']:.1f} tokens on average, "
        f"{summary['invalid']} invalid, {summary['infra_failures']} not scored, {summary['tokens_per_s']:,.0f} tokens/s"
    )
