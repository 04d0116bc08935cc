"""Make the tiny model of the quick start: `uv run python configs/make_tiny_arithmetic.py`.

A Qwen3 model of about 0.8M parameters learns sums of single digits from demonstrations of mixed quality: careful ones
write one numbered step for each operation and are right, hasty ones write a guess that is often wrong. Both end in
`answer: N`. Most demonstrations at the end are hasty, so the finished model mostly guesses, and RL has something to
select.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from reasoning_gym.composite import DatasetSpec
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

FOLDER = Path(__file__).parent / "tiny-arithmetic"
TASK: list[dict[str, Any]] = [
    {"name": "chain_sum", "weight": 4, "config": {"min_terms": 3, "max_terms": 6, "min_digits": 1, "max_digits": 1}},
    {
        "name": "decimal_chain_sum",
        "weight": 1,
        "config": {
            "min_terms": 7,
            "max_terms": 32,
            "min_digits": 1,
            "max_digits": 1,
            "min_decimal_places": 0,
            "max_decimal_places": 0,
        },
    },
]
"""`data.args.datasets` of the quick start: few terms mostly, a tail of many."""
LONG_WEIGHT = 3
"""Weight of the tail in the demonstrations: its steps are the ones that need practice."""
DATA_SEED = 1_000_000_000
"""reasoning-gym adds seed and index, so this is far from every seed of a run."""
BATCH_TOKENS = 6144
"""Padded tokens of one optimizer step."""
POOL = 768
"""Demonstrations that are sorted by length and cut into batches together."""
LOSS_SCALE = 1.0 / 2500
"""Constant factor of the summed loss: a mean over each batch would weigh short demonstrations more."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the training, with a fresh optimizer."""

    steps: int
    """Optimizer steps."""
    horizon: int
    """Steps after which the cosine would reach a fiftieth of the peak."""
    peak_lr: float
    """Learning rate after the warm-up."""
    hasty_share: float
    """Share of hasty demonstrations."""


STAGES = (
    Stage(steps=1500, horizon=2000, peak_lr=3e-3, hasty_share=0.2),
    Stage(steps=700, horizon=700, peak_lr=1e-3, hasty_share=0.2),
    Stage(steps=120, horizon=120, peak_lr=3e-4, hasty_share=0.68),
)
"""Learn the steps, make them reliable, then become mostly hasty."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One question with a worked or guessed answer."""

    prompt: str
    """Question text and a newline."""
    completion: str
    """What the model shall write before the end token."""
    entry: dict[str, Any]
    """The reasoning-gym entry, for its scorer."""


def make_task(*, seed: int, long_weight: int = 1) -> Any:
    """The composite data set of the quick start, whose items are `dataset[index]` for any index."""
    specs = [DatasetSpec(**spec) for spec in TASK]
    specs[1].weight = long_weight
    return reasoning_gym.create_dataset("composite", seed=seed, size=1, datasets=specs)


def careful(expression: str) -> str:
    """Numbered steps, one for each operation, then the right answer."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for index, (operator, term) in enumerate(zip(rest[::2], rest[1::2], strict=True), start=1):
        result = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{index}: {total} {operator} {term} = {result}\n")
        total = result
    return "".join(lines) + f"answer: {total}"


def hasty(answer: int, *, num_terms: int, rng: random.Random) -> str:
    """A guess without steps: right in 60 % of sums of two terms, less often with each further term."""
    if rng.random() >= max(0.05, 0.6 * 0.8 ** (num_terms - 2)):
        spread = 1.0 + num_terms / 2
        answer += rng.choice([-1, 1]) * (1 + int(rng.expovariate(1 / spread)))
    return f"answer: {answer}"


def demonstrations(*, hasty_share: float, rng: random.Random) -> Iterator[Demonstration]:
    """Endless demonstrations of the task, a `hasty_share` of them guesses."""
    task = make_task(seed=DATA_SEED, long_weight=LONG_WEIGHT)
    while True:
        entry = task[rng.randrange(DATA_SEED)]
        if rng.random() < hasty_share:
            completion = hasty(int(entry["answer"]), num_terms=entry["metadata"]["num_terms"], rng=rng)
        else:
            completion = careful(entry["metadata"]["expression"])
        yield Demonstration(prompt=entry["question"] + "\n", completion=completion, entry=entry)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 320 tokens: every byte, single digits, operators with their spaces, the task's words."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\d| [-+=] |: | ?[A-Za-z][A-Za-z ]*")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    task = make_task(seed=DATA_SEED)
    texts = [task[index]["question"] + "\n" + careful(task[index]["metadata"]["expression"]) for index in range(200)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, *, hasty_share: float, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, labels) pairs, int64 of shape (batch, length); labels are -100 off the completion."""
    stream = demonstrations(hasty_share=hasty_share, rng=rng)
    while True:
        pool = [next(stream) for _ in range(POOL)]
        prompts = tokenizer([d.prompt for d in pool], add_special_tokens=False)["input_ids"]
        completions = tokenizer([d.completion for d in pool], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(prompts, completions, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * (len(row[0]) + len(row[1]) + 1) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for group in cut:
            length = max(len(prompt) + len(completion) for prompt, completion in group) + 1
            tokens = torch.full((len(group), length), tokenizer.pad_token_id)
            labels = torch.full_like(tokens, -100)
            for index, (prompt, completion) in enumerate(group):
                row_ids = torch.tensor(prompt + completion + [tokenizer.eos_token_id])
                tokens[index, : len(row_ids)] = row_ids
                labels[index, len(prompt) : len(row_ids)] = row_ids[len(prompt) :]
            yield tokens, labels


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up over 100 steps, times a cosine from the peak to a fiftieth of it at the horizon."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.horizon))
    return stage.peak_lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, stage: Stage, seed: int) -> None:
    """Supervised training on the completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(tokenizer, hasty_share=stage.hasty_share, rng=random.Random(seed))
    started = time.monotonic()
    for step, (tokens, labels) in enumerate(itertools.islice(stream, stage.steps)):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        (losses * LOSS_SCALE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            mean = losses.item() / (labels != -100).sum().item()
            print(f"step {step} of {stage.steps} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    folder: Path = parser.parse_args().out
    torch.set_num_threads(1)  # repeatable, and not slowed by other work on the machine
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters, vocabulary of {len(tokenizer)}")
    for seed, stage in enumerate(STAGES):
        train(model, tokenizer, stage=stage, seed=seed)
        save(model, tokenizer, folder)


if __name__ == "__main__":
    main()
