"""TRL's `GRPOTrainer` with a trajectory store between its generation and its training.

TRL generates, takes the optimizer steps and logs. Its reward function is where completions become known: there each
group is put into the store, on disk, and the loss is that of the claim which is read back from it, packed.

    uv run --with trl python configs/examples/replay_buffer_trl.py runs/trl --iterations 4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from replay_buffer import ATTEMPTS, GROUPS, MAX_TOKENS, MODEL, policy_gradient, sums
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from pmdflow.store import TrajectoryStore
from pmdflow.types import Prompt


class StoredGRPO(GRPOTrainer):
    """A trainer whose completions go through `store`: a step claims, trains and commits what it has generated."""

    def __init__(self, store: TrajectoryStore, **settings: Any) -> None:
        """Add the reward function and the callback that publishes; `settings` are those of `GRPOTrainer`."""
        self.store = store
        super().__init__(reward_funcs=self.put, callbacks=[Publishing(store)], **settings)

    def put(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[int], **_: Any
    ) -> list[float]:
        """Put the groups that TRL has generated into the store; their rewards."""
        rewards = [float(text.strip().endswith(f" {right}")) for text, right in zip(completions, answer, strict=True)]
        for first in range(0, len(prompts), ATTEMPTS):
            group = slice(first, first + ATTEMPTS)
            tokens = self.processing_class(prompts[first]).input_ids
            logprobs = [completion_logprobs(self.model, tokens, ids) for ids in completion_ids[group]]
            prompt = Prompt(id=prompts[first], text=prompts[first], tokens=np.array(tokens, np.int32))
            self.store.put_group(prompt, completion_ids[group], logprobs, rewards[group])
        return rewards

    def compute_loss(self, model: PreTrainedModel, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """The loss of the claim of what `put` has stored; TRL's own padded `inputs` are not looked at."""
        iteration = self.state.global_step + 1
        assert self.store.claim(iteration, self.state.global_step, timeout_s=0.0).status == "claimed"
        return policy_gradient(model, self.store.read_claim(iteration))


class Publishing(TrainerCallback):
    """After a step the weights are another version, and what trained them may go."""

    def __init__(self, store: TrajectoryStore) -> None:
        """Of a trainer that claims from `store`."""
        self.store = store

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `configs/examples/replay_buffer.py` for saving weights and store together."""
        self.store.publish(state.global_step, state.global_step)
        self.store.commit(state.global_step)
        self.store.evict(state.global_step)


@torch.no_grad()
def completion_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    """The log-probs of a completion's tokens under the weights that generated it, which TRL does not hand out."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    scores = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return scores.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


def run(directory: Path, *, iterations: int) -> list[dict[str, float]]:
    """Train; what TRL logged of each step."""
    problems = [sums(number) for number in range(GROUPS * iterations)]
    rows = [{"prompt": prompt.text + "\n", "answer": right} for prompt, right in problems]
    settings = GRPOConfig(
        output_dir=str(directory), num_generations=ATTEMPTS, per_device_train_batch_size=GROUPS * ATTEMPTS,
        max_completion_length=MAX_TOKENS, max_steps=iterations, learning_rate=1e-4, temperature=1.0, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, use_cpu=not torch.cuda.is_available(), shuffle_dataset=False,
    )  # fmt: skip
    with TrajectoryStore(
        directory / "store", groups_per_iteration=GROUPS, lookahead=0, max_staleness=None, min_group_size=1
    ) as store:
        trainer = StoredGRPO(
            store,
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            args=settings,
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the store")
    parser.add_argument("--iterations", type=int, default=4)
    options = parser.parse_args()
    run(options.directory, iterations=options.iterations)


if __name__ == "__main__":
    main()
