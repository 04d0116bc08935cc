"""Prompts: a deterministic stream by cursor for training, and fixed held-out ones for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pmdflow.data.gym import GYM_PREFIX, GymPrompts
from pmdflow.data.jsonl import JsonlPrompts
from pmdflow.data.tokenizer import make_tokenize
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from pmdflow.config.schema import Config


class PromptSource(Protocol):
    """Where prompts come from. Every method is a pure function of the configuration and its arguments.

    Changing `eval.prompts`, `run.seed` or `data` changes what a cursor means.
    """

    def prompt(self, cursor: int) -> Prompt:
        """The training prompt at `cursor` >= 0; never one whose text is held out."""

    def held_out(self, n: int) -> list[Prompt]:
        """The first `n` evaluation prompts, n <= `eval.prompts`, with distinct texts where the task generates them."""


def make_prompts(config: Config) -> PromptSource:
    """Make the source that `data.task` names, with the tokenizer of `model.path`.

    Raises:
        ValueError: unknown data set, bad arguments, a malformed line (`file:line: cause`), too few prompts to hold out
            `eval.prompts`, or no tokenizer.
    """
    task = config.data.task
    if task.startswith(GYM_PREFIX):
        return GymPrompts(
            name=task.removeprefix(GYM_PREFIX),
            args=config.data.args,
            seed=config.run.seed,
            num_held_out=config.eval.prompts,
            tokenize=make_tokenize(config.model.path, max_tokens=config.data.max_prompt_tokens),
        )
    if config.data.args:
        raise ValueError(f"data.args is {config.data.args}: only reasoning_gym tasks take arguments; remove it")
    return JsonlPrompts(
        path=Path(task),
        seed=config.run.seed,
        num_held_out=config.eval.prompts,
        tokenize=make_tokenize(config.model.path, max_tokens=config.data.max_prompt_tokens),
    )
