"""Make the worlds and the tiny model of the key-and-door example: `uv run python configs/make_tiny_key_and_door.py`.

A Qwen3 model of about 0.2M parameters learns from demonstrations of two kinds: careful ones search the rooms in one
direction and then in the other, take the key when they see it and return to the door; aimless ones do anything. Most
are aimless, so the finished model opens few doors, and RL has something to select. What the world says is in the
context but not in the loss, as in training. The tokenizer is that of `configs/tiny-arithmetic`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pmdflow.environments.key_and_door import KeyAndDoor

FOLDER = Path(__file__).parent / "tiny-key-and-door"
WORLDS = Path(__file__).parent / "worlds.jsonl"
TOKENIZER = Path(__file__).parent / "tiny-arithmetic"
NUM_WORLDS = 256
ROOMS = (4, 6)
"""Least and most rooms of a world."""
ACTIONS = ("left", "right", "take", "open")
BATCH = 16
STAGES = ((450, 4e-3, 0.7), (70, 5e-4, 0.25))
"""Steps, peak learning rate and share of careful ones: learn the way, then become one that mostly strays."""


def world(number: int, rng: random.Random) -> dict[str, Any]:
    """A line of `worlds.jsonl`."""
    rooms = rng.randint(*ROOMS)
    key, door = rng.sample(range(1, rooms + 1), 2)
    text = f"World {number}: take the key and open the door."
    return {"prompt": text, "rooms": rooms, "key": key, "door": door, "start": rng.randint(1, rooms)}


def careful(seen: Sequence[str], heading: str) -> tuple[str, str]:
    """The next action and heading of one who searches."""
    room, door, has_key = 0, None, False
    for text in seen:
        room = int(text[5:].split(":")[0]) if text.startswith("room") else room
        door = room if text.endswith("door\n") else door
        has_key = has_key or text == "taken\n"
    if seen[-1].endswith("key\n"):
        return "take", heading
    if has_key and room == door:
        return "open", heading
    if has_key and door is not None:
        return ("left" if door < room else "right"), heading
    if seen[-1] == "wall\n":
        heading = "left" if heading == "right" else "right"
    return heading, heading


def demonstration(layout: Mapping[str, Any], *, is_careful: bool, rng: random.Random) -> list[tuple[str, bool]]:
    """What follows the prompt, as (text, whether the model writes it)."""
    environment, heading = KeyAndDoor(), "left" if rng.random() < 0.5 else "right"
    said = environment.reset(key="", prompt="", metadata=layout)
    parts, seen = [(said.text, False)], [said.text]
    while not said.done:
        if is_careful:
            action, heading = careful(seen, heading)
        else:
            action = rng.choice(ACTIONS)
        said = environment.step(key="", action=f"{action}\n")
        parts += [(f"{action}\n", True), (said.text, False)]
        seen.append(said.text)
    return parts


def batch(tokenizer: Any, *, share: float, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [BATCH, longest]; labels are -100 at what the model does not write."""
    rows = []
    known: dict[str, list[int]] = {}  # few texts come often
    for _ in range(BATCH):
        layout = world(rng.randrange(NUM_WORLDS, 1000), rng)
        parts = [(layout["prompt"] + "\n", False)]
        parts += demonstration(layout, is_careful=rng.random() < share, rng=rng)
        tokens: list[int] = []
        labels: list[int] = []
        for text, written in parts:
            ids = known.get(text) or tokenizer(text, add_special_tokens=False)["input_ids"]
            known[text] = ids
            tokens += ids
            labels += ids if written else [-100] * len(ids)
        rows.append((tokens, labels))
    width = max(len(tokens) for tokens, _ in rows)
    padded = [(t + [tokenizer.pad_token_id] * (width - len(t)), y + [-100] * (width - len(y))) for t, y in rows]
    return torch.tensor([t for t, _ in padded]), torch.tensor([y for _, y in padded])


def make_model(tokenizer: Any) -> Qwen3ForCausalLM:
    """The untrained model."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,  # the smallest that vLLM has on a CPU
            rope_parameters={"rope_type": "default", "rope_theta": 10_000 ** (4 / 3)},
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: Qwen3ForCausalLM, tokenizer: Any, *, steps: int, peak: float, share: float, seed: int) -> None:
    """Supervised training with warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    rng, started = random.Random(seed), time.monotonic()
    for step in range(steps):
        tokens, labels = batch(tokenizer, share=share, rng=rng)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Parse the command line, write the worlds, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    folder: Path = parser.parse_args().out
    rng = random.Random(0)
    WORLDS.write_text("".join(json.dumps(world(number, rng)) + "\n" for number in range(NUM_WORLDS)))
    torch.set_num_threads(1)  # repeatable, and not slowed by other work on the machine
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    model = make_model(tokenizer)
    print(f"{model.num_parameters()} parameters")
    for seed, (steps, peak, share) in enumerate(STAGES):
        train(model, tokenizer, steps=steps, peak=peak, share=share, seed=seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
