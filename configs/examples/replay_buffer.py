"""A trajectory store as the replay buffer of one's own loop: transformers generates, plain PyTorch trains.

Nothing of pmdflow is used but its store, which needs neither Ray nor a configuration. What was generated is on disk
before it is trained; stop the program whenever you like and start it again: it goes on with the iteration that it was
at, on the very claim that it was training.

    uv run python configs/examples/replay_buffer.py runs/buffer --iterations 4
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pmdflow.store import TrajectoryStore
from pmdflow.types import Mask, Prompt, TrainBatch

MODEL = Path(__file__).parents[1] / "tiny-arithmetic"
GROUPS, ATTEMPTS, MAX_TOKENS = 4, 4, 64


def sums(number: int) -> tuple[Prompt, int]:
    """Prompt `number` and its answer; the tokens are still to be made."""
    terms = random.Random(number).choices(range(1, 10), k=3)
    text = f"State the final answer to the following arithmetic problem: {' + '.join(map(str, terms))} ="
    return Prompt(id=f"sum-{number}", text=text, tokens=np.empty(0, np.int32)), sum(terms)


@torch.no_grad()
def generate(model: PreTrainedModel, tokens: Sequence[int], end: int) -> tuple[list[list[int]], list[list[float]]]:
    """`ATTEMPTS` completions of a prompt, sampled at temperature 1, and the log-prob of each of their tokens."""
    prompt = torch.tensor([tokens]).expand(ATTEMPTS, -1)
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=MAX_TOKENS, eos_token_id=end, pad_token_id=end, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    scores = torch.stack(answer.logits, 1).log_softmax(-1)  # [attempt, token, vocabulary]
    drawn = answer.sequences[:, prompt.shape[1] :]
    chosen = scores.gather(2, drawn[..., None])[..., 0]
    completions, logprobs = [], []
    for row, own in zip(drawn.tolist(), chosen.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        completions.append(row[:length])
        logprobs.append(own[:length])
    return completions, logprobs


def fill(store: TrajectoryStore, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, iteration: int) -> None:
    """Put the groups of an iteration into the store, but for those that an interrupted run has put there."""
    there = {row["request_id"] for row in store.groups()}
    for number in range((iteration - 1) * GROUPS, iteration * GROUPS):
        if f"prompt-{number}" in there:
            continue
        prompt, right = sums(number)
        tokens = tokenizer(prompt.text + "\n").input_ids
        prompt = Prompt(id=prompt.id, text=prompt.text, tokens=np.array(tokens, np.int32))
        completions, logprobs = generate(model, tokens, tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = [float(text.strip().endswith(f" {right}")) for text in texts]
        store.put_group(prompt, completions, logprobs, rewards, request_id=f"prompt-{number}")


def packed_logprobs(model: PreTrainedModel, batch: TrainBatch) -> Tensor:
    """The model's log-prob of each token of the claim [T], 0 at first tokens: all trajectories in one row.

    Positions begin anew at each trajectory, by which transformers knows that none may see another.
    """
    starts = torch.from_numpy(batch.cu_seqlens[:-1].copy())
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    lengths = torch.from_numpy(np.diff(batch.cu_seqlens))
    positions = torch.arange(len(tokens)) - starts.repeat_interleave(lengths)
    logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
    following = logits[:-1].float().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), following]) * (positions > 0)


def policy_gradient(model: PreTrainedModel, batch: TrainBatch) -> Tensor:
    """Loss of a claim: importance-weighted policy gradient against the mean reward of each group."""
    means = {group: batch.rewards[batch.groups == group].mean() for group in set(batch.groups.tolist())}
    advantages = batch.rewards - np.array([means[group] for group in batch.groups.tolist()])
    by_token = torch.from_numpy(np.repeat(advantages, np.diff(batch.cu_seqlens)))
    trained = torch.from_numpy((batch.mask & Mask.TRAINED) != 0)
    ratio = (packed_logprobs(model, batch) - torch.from_numpy(batch.logprobs.copy())).exp()
    return -(ratio * by_token)[trained].mean()


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: TrainBatch) -> float:
    """One step on a claim; its loss."""
    loss = policy_gradient(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def run(directory: Path, *, iterations: int) -> list[float]:
    """Generate, store and train; returns the mean rewards. Weights and store are saved together after each step."""
    weights = directory / "weights.pt"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    done, rewards = 0, []
    if weights.exists():
        saved = torch.load(weights)
        done = saved["iteration"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    with TrajectoryStore(
        directory / "store", groups_per_iteration=GROUPS, lookahead=0, max_staleness=None, min_group_size=1
    ) as store:
        store.uncommit(done)  # what was trained after the weights were saved is trained again, as it was
        store.commit(done)
        for iteration in range(done + 1, iterations + 1):
            if store.counts().groups_ready < GROUPS:
                fill(store, model, tokenizer, iteration)
            version = max(store.counts().version, 0)
            assert store.claim(iteration, version, timeout_s=0.0).status == "claimed"
            batch = store.read_claim(iteration)
            loss = train(model, optimizer, batch)
            rewards.append(float(batch.rewards.mean()))
            print(f"iteration {iteration}: reward {rewards[-1]:.2f}, loss {loss:+.4f}, {len(batch.tokens)} tokens")
            store.publish(version + 1, iteration)
            state = {"iteration": iteration, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, weights.with_suffix(".tmp"))
            weights.with_suffix(".tmp").replace(weights)
            store.commit(iteration)
            store.evict(iteration)
    return rewards


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the store and the weights")
    parser.add_argument("--iterations", type=int, default=4)
    options = parser.parse_args()
    run(options.directory, iterations=options.iterations)


if __name__ == "__main__":
    main()
