"""Make the tiny model of the calculator example: `uv run python configs/make_tiny_calculator.py`.

A Qwen3 model of about 0.3M parameters learns from demonstrations of sums that are too long for it to do in its head.
Some call the calculator, `[512 + 87 - 33]`, read its reply, ` = 566`, and copy the answer; most guess. So the finished
model calls in some of its attempts, and RL has something to select. The calculator's replies are in the context but not
in the loss, as in training. The tokenizer is that of `configs/tiny-arithmetic`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

FOLDER = Path(__file__).parent / "tiny-calculator"
TOKENIZER = Path(__file__).parent / "tiny-arithmetic"
TASK: dict[str, Any] = {"min_terms": 2, "max_terms": 4, "min_digits": 2, "max_digits": 3}
"""`data.args` of `calculator.yaml`."""
DATA_SEED = 1_000_000_000
"""reasoning-gym adds seed and index, so this is far from every seed of a run."""
BATCH = 64
STAGES = ((1400, 3e-3, 0.85), (200, 5e-4, 0.3))
"""Steps, peak learning rate and share of calls: learn to use the calculator, then become one that mostly guesses."""


def demonstration(entry: dict[str, Any], *, call: bool, rng: random.Random) -> list[tuple[str, bool]]:
    """What follows the prompt, as (text, whether the model writes it)."""
    answer = int(entry["answer"])
    if call:
        return [(f"[{entry['metadata']['expression']}]", True), (f" = {answer}\n", False), (f"answer: {answer}", True)]
    spread = max(10, abs(answer))
    return [(f"answer: {answer + rng.randint(-spread, spread)}", True)]


def batch(tokenizer: Any, task: Any, *, calls: float, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [BATCH, longest]; labels are -100 at what the model does not write."""
    rows = []
    for _ in range(BATCH):
        entry = task[rng.randrange(DATA_SEED)]
        parts = [(entry["question"] + "\n", False), *demonstration(entry, call=rng.random() < calls, rng=rng)]
        tokens: list[int] = []
        labels: list[int] = []
        for text, written in parts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += ids
            labels += ids if written else [-100] * len(ids)
        rows.append(([*tokens, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]))
    width = max(len(tokens) for tokens, _ in rows)
    padded = [(t + [tokenizer.pad_token_id] * (width - len(t)), y + [-100] * (width - len(y))) for t, y in rows]
    return torch.tensor([t for t, _ in padded]), torch.tensor([y for _, y in padded])


def make_model(tokenizer: Any) -> Qwen3ForCausalLM:
    """The untrained model."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,  # the smallest that vLLM has on a CPU
            rope_parameters={"rope_type": "default", "rope_theta": 10_000 ** (4 / 3)},
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: Qwen3ForCausalLM, tokenizer: Any, *, steps: int, peak: float, calls: float, seed: int) -> None:
    """Supervised training with warm-up and a cosine."""
    task = reasoning_gym.create_dataset("chain_sum", seed=DATA_SEED, size=1, **TASK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    rng, started = random.Random(seed), time.monotonic()
    for step in range(steps):
        tokens, labels = batch(tokenizer, task, calls=calls, rng=rng)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    folder: Path = parser.parse_args().out
    torch.set_num_threads(1)  # repeatable, and not slowed by other work on the machine
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters")
    for seed, (steps, peak, calls) in enumerate(STAGES):
        train(model, tokenizer, steps=steps, peak=peak, calls=calls, seed=seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
