"""A realistic run directory, written by the real recorder and archive from random claims."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pmdflow.metrics.claim import claim_metrics
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.spans import SpanBuffer, SpanName
from pmdflow.store.archive import write_part
from pmdflow.types import Claim, Mask, Stop, TrainBatch

MAX_STALENESS = 3
BUDGET = 8192
_WORDS = [*"0123456789", "+", "-", "=", " ", "\n", "<b>", "so", "then", "answer", "\u00e4"]


def span(name: str, start: float, end: float, actor: str = "rollout-0") -> dict[str, Any]:
    """A line of `spans.jsonl`."""
    return {"actor": actor, "name": name, "start": start, "end": end, "attrs": {}}


def make_batch(
    iteration: int, *, groups: int = 4, size: int = 4, length: float = 40.0, reward: float = 0.5
) -> TrainBatch:
    """A random claim of `groups` x `size` trajectories that keeps every contract of `TrainBatch`."""
    rng = np.random.default_rng(iteration)
    version = iteration - 1
    count = groups * size
    prompt_lengths = np.repeat(rng.integers(4, 12, groups), size).astype(np.int32)
    lengths = np.clip(rng.lognormal(np.log(length), 0.7, count), 4, 12 * length).astype(np.int64)
    totals = prompt_lengths + lengths
    cu_seqlens = np.concatenate(([0], np.cumsum(totals)))
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], totals)
    generated = position >= np.repeat(prompt_lengths, totals)
    span = rng.integers(0, 3, count) * (lengths > length)
    age = np.repeat(span, totals) - (position - np.repeat(prompt_lengths, totals)) // max(1, int(length * 0.8))
    late = rng.random(count) < 0.05
    age = np.clip(age, 0, None) + np.where(np.repeat(late, totals), MAX_STALENESS, 0)
    versions = np.where(generated, np.maximum(version - age, 0), -1).astype(np.int32)
    staleness = version - versions
    mask = np.where(staleness > MAX_STALENESS, Mask.GENERATED | Mask.OVER_AGE, Mask.GENERATED | Mask.TRAINED)
    correct = rng.random(count) < reward
    return TrainBatch(
        iteration=iteration,
        version=version,
        tokens=rng.integers(0, len(_WORDS), len(position)).astype(np.int32),
        logprobs=np.where(generated, -rng.exponential(0.4, len(position)), 0.0).astype(np.float32),
        versions=versions,
        temperatures=np.where(generated, 0.9, 1.0).astype(np.float32),
        mask=np.where(generated, mask, 0).astype(np.uint8),
        cu_seqlens=cu_seqlens.astype(np.int64),
        prompt_lengths=prompt_lengths,
        groups=np.repeat(np.arange(groups) + 1000 * iteration, size).astype(np.int64),
        trajectories=(np.arange(count) + 10000 * iteration).astype(np.int64),
        rewards=correct.astype(np.float64),
        components={"correct": correct.astype(np.float64), "a:format": rng.random(count)},
        stops=np.where(rng.random(count) < 0.9, Stop.STOP, Stop.LENGTH).astype(np.uint8),
        prompt_ids=tuple(f"sum-{iteration}-{i // size}" for i in range(count)),
    )


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer.json for the ids of `make_batch`; one token is markup on purpose."""
    from tokenizers import Tokenizer, decoders, models

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="0"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


class FixtureRun:
    """Grows a run directory an iteration at a time; its clock is its own."""

    def __init__(self, run_dir: Path, *, iterations: int = 20, start: float | None = None) -> None:
        """Write the config and open the recorder; the run started `start` (default: now)."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.now = time.time() if start is None else start
        self.done = 0
        self.generated = self.trained = self.masked = 0
        write_tokenizer(run_dir / "model")
        config = {
            "run": {"name": run_dir.name, "iterations": iterations},
            "model": {"path": str(run_dir / "model")},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": 4, "max_tokens": 512},
            "scheduler": {"groups_per_iteration": 4, "max_staleness": MAX_STALENESS, "tokens_per_iteration": BUDGET},
            "rollout": {"actors": 2},
        }
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        self.recorder = Recorder(run_dir, clock=lambda: self.now)
        self.rng = np.random.default_rng(0)
        self.recorder.event("start", f"{iterations} iterations on 2 rollout actors")
        self.evaluate()

    def evaluate(self) -> None:
        """Record one held-out evaluation."""
        values = {"eval/round": self.done, "eval/reward_mean": self._skill(), "eval/prompts": 128}
        versions = {"eval/version": self.done, "eval/length_mean": 40.0}
        self.recorder.metric("eval", {**values, **versions})

    def iterate(self, count: int = 1, *, archive: bool = True) -> None:
        """Record `count` more iterations of about 4 s with samples, spans, events and archive parts."""
        for _ in range(count):
            self.done += 1
            batch = make_batch(self.done, length=30 + 3.0 * self.done, reward=self._skill())
            begin = self.now
            self._samples_and_spans(begin)
            self.recorder.metric("iteration", self._iteration_values(batch, begin))
            if archive:
                write_part(self.run_dir, batch, attrs={"model": "model", "tokenizer": "sha256:0"})
            if self.done % 5 == 0:
                self.evaluate()
                self.recorder.event("checkpoint", f"iteration {self.done}")

    def finish(self) -> None:
        """Record the end of the run."""
        self.recorder.event("finish", f"{self.done} iterations")

    def ledger(self) -> dict[str, int]:
        """Books that balance."""
        flying = {"partial_leased": 900, "partial_idle": 300, "unscored": 50, "waiting_group": 700, "ready": 400}
        places = {**flying, "claimed": 0, "trained": self.trained, "masked_over_age": self.masked}
        total = {"generated": sum(places.values()), "prompt": 90 * self.done, "reprefill": 120 * self.done, "eval": 0}
        return {f"ledger/{key}": value for key, value in (total | places).items()}

    def _skill(self) -> float:
        return float(0.4 + 0.5 * (1 - np.exp(-self.done / 8)))

    def _samples_and_spans(self, begin: float) -> None:
        rng, version = self.rng, self.done - 1
        for second in range(4):
            self.now = begin + second + 1
            counts = {"groups_ready": rng.integers(0, 5), "groups_untrained": rng.integers(4, 9), "groups_claimed": 1}
            flying = {"leased": rng.integers(20, 33), "idle": rng.integers(0, 9), "unscored": rng.integers(0, 5)}
            flying["partial"] = 3
            values: dict[str, Any] = {f"store/{key}": value for key, value in counts.items()}
            values |= {f"store/trajectories_{key}": value for key, value in flying.items()}
            values |= {"scheduler/version": version, "scheduler/tokens_budget": BUDGET, "store/bytes": 10**6}
            values |= {"scheduler/tokens_spent": 1700 * (second + 1), "rollout/tokens_per_s": 1500 + rng.normal(0, 60)}
            self.recorder.metric("sample", {**values, **self.ledger()})
        for actor in ("rollout-0", "rollout-1"):
            buffer, at = SpanBuffer(actor), begin
            shares: tuple[tuple[SpanName, float], ...] = (
                ("apply_weights", 0.1), ("generate", 0.84), ("wait_lease", 0.06),
            )  # fmt: skip
            for name, share in shares:
                buffer.add(name, at, at + 4 * share, version=version)
                at += 4 * share
            self.recorder.spans(buffer.drain())
        learner, at = SpanBuffer("learner-0"), begin
        for name, share in (("wait_claim", 0.4), ("reference", 0.1), ("step", 0.2), ("step", 0.2), ("publish", 0.1)):
            learner.add(name, at, at + 4 * share)
            at += 4 * share
        learner.add("step", begin + 1.9, begin + 3.0)
        self.recorder.spans(learner.drain())
        reward = SpanBuffer("reward")
        reward.add("score", begin + 0.5, begin + 0.9, trajectories=12)
        self.recorder.spans(reward.drain())
        controller = SpanBuffer("controller")
        controller.add("wait_groups", begin, begin + 2.0)
        self.recorder.spans(controller.drain())

    def _iteration_values(self, batch: TrainBatch, begin: float) -> Mapping[str, Any]:
        generated = int(np.sum((batch.mask & Mask.GENERATED) != 0))
        trained = int(np.sum((batch.mask & Mask.TRAINED) != 0))
        self.trained += trained
        self.masked += generated - trained
        times = {"time/iteration_s": self.now - begin, "time/claim_wait_s": 1.6, "time/train_s": 2.0}
        rollout = {"rollout/busy_share": 0.94, "rollout/tokens_per_s": 1500.0, "rollout/reprefill_tokens": 120}
        budget = {"scheduler/tokens_budget": BUDGET, "scheduler/tokens_spent": int(BUDGET * self.rng.uniform(0.7, 1))}
        learner = {"learner/loss": float("nan"), "learner/grad_norm": np.float32(0.7)}
        identity = {"iteration": batch.iteration, "version": batch.version}
        return {**identity, **claim_metrics(Claim.of(batch)), **times, **rollout, **budget, **learner, **self.ledger()}
