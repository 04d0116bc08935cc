"""Prompts: a deterministic stream by cursor for training, and fixed held-out ones for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pmdflow.config.schema import Config
from pmdflow.config.sources import (
    EVAL_PREFIX,
    GYM_PREFIX,
    HUB_PREFIX,
    WORDING,
    EvalSetConfig,
    SourceConfig,
    SourceSettings,
)
from pmdflow.data.gym import GymPrompts
from pmdflow.data.hub import fetch_dataset
from pmdflow.data.messages import Style
from pmdflow.data.mixture import EvaluationSet, MixedPrompts, shares
from pmdflow.data.sampling import KEY, check_overrides
from pmdflow.data.stamp import Stamp
from pmdflow.data.stop_text import backend_of
from pmdflow.data.table import TablePrompts, open_rows
from pmdflow.data.tokenizer import load_tokenizer, make_tokenize
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSource(Protocol):
    """Where prompts come from. Every method is a pure function of the configuration and its arguments.

    Changing `eval.prompts`, `run.seed` or `data` changes what a cursor means.
    """

    def prompt(self, cursor: int) -> Prompt:
        """The training prompt at `cursor` >= 0; never one that asks what a held-out one asks."""

    def held_out(self, n: int) -> list[Prompt]:
        """The first `n` evaluation prompts, n <= `eval.prompts`, with distinct texts where the task generates them."""


class Source(PromptSource, Protocol):
    """One part of a mixture."""

    name: str
    """Before the number in its prompt ids."""
    num_held_out: int
    held_out_keys: frozenset[int]
    """`prompt_key` of each held-out prompt."""

    @property
    def num_train(self) -> int | None:
        """Training prompts; None: it is endless."""

    def row(self, number: int) -> int:
        """Which training prompt its draw `number` takes."""

    def at(self, row: int) -> Prompt:
        """A training prompt, 0 to below `num_train`; of an endless source, that of a cursor."""

    def exclude(self, keys: Iterable[int]) -> None:
        """Never train on prompts with these keys."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, beside its configuration."""

    @property
    def summary(self) -> str:
        """How many prompts there are of which kind."""


def make_prompts(config: Config, *, on_skip: Callable[[str], None] = lambda message: None) -> MixedPrompts:
    """Make what `data.task` and `eval.sets` name, with the tokenizer of `model.path`.

    Files and Hub data sets are read and checked whole.

    Args:
        config: The configuration; `model.path` is a folder.
        on_skip: Told of prompts that are left out because they are too long.

    Raises:
        ValueError: unknown data set, bad arguments, a malformed row (`file:line: cause`), too few prompts to hold out
            `eval.prompts`, no tokenizer, one that stop texts are not found with, or a chat template that fails.
    """
    tokenizer = load_tokenizer(config.model.path)
    if config.agents is not None or config.rollout.stop:
        backend_of(tokenizer)
    make = partial(_make_source, config, tokenizer, on_skip)
    sets = {name: _make_set(config, make, name, given) for name, given in config.eval.sets.items()}
    given = config.data.sources
    held_out = shares([source.weight for source in given], config.eval.prompts)
    prompts = MixedPrompts(
        sources=[
            make(source, num_held_out=count, stamp=Stamp(source.label if len(given) > 1 else None))
            for source, count in zip(given, held_out, strict=True)
        ],
        weights=[source.weight for source in given],
        sets=sets,
        seed=config.run.seed,
        curriculum=config.data.curriculum,
    )
    for source in prompts.sources:
        source.prompt(0)  # none may be left, and the template may fail on what no held-out prompt shows
    return prompts


def read_prompts(config: Config, *, on_skip: Callable[[str], None] = lambda message: None) -> list[Prompt]:
    """Every prompt of the one file that `data.task` names, in its order, for evaluation.

    They are read and worded as they would be for training: columns, system message, suffix, arguments of the template.

    Args:
        config: The configuration; `model.path` is a folder.
        on_skip: Told of prompts that are left out because they are too long.

    Raises:
        ValueError: a malformed row (`file:line: cause`), no prompt, no tokenizer, or a chat template that fails.
    """
    (given,) = config.data.sources
    source = _make_source(config, load_tokenizer(config.model.path), on_skip, given, num_held_out=None, stamp=Stamp())
    return source.held_out(source.num_held_out)


def _make_set(config: Config, make: Callable[..., Source], name: str, given: EvalSetConfig) -> EvaluationSet:
    label = f"{EVAL_PREFIX}{name}"
    settings = {key: getattr(given, key) for key in SourceSettings.model_fields}
    settings |= {key: getattr(config.data, key) for key in WORDING if settings[key] is None}
    try:
        check_overrides({KEY: given.sampling}, training=False)
        source = make(
            SourceConfig.model_construct(task=given.task, name=label, weight=1.0, **settings),
            num_held_out=given.prompts if given.task.startswith(GYM_PREFIX) else None,
            stamp=Stamp(label, given.sampling),
        )
        return EvaluationSet(source=source, prompts=source.held_out(given.prompts or source.num_held_out))
    except ValueError as error:
        raise ValueError(f"eval.sets.{name}: {error}") from error


def _make_source(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    on_skip: Callable[[str], None],
    source: SourceConfig,
    *,
    num_held_out: int | None,
    stamp: Stamp,
) -> Source:
    style = Style(system=source.system, suffix=source.suffix or "", template_args=source.template_args or {})
    limit = config.data.max_prompt_tokens
    keep = None if config.agents is None else 1  # the program says the rest, in words of its own
    tokenize = make_tokenize(config.model.path, max_tokens=limit, style=style, tokenizer=tokenizer, keep=keep)
    if source.task.startswith(GYM_PREFIX):
        assert num_held_out is not None
        return GymPrompts(
            name=source.task.removeprefix(GYM_PREFIX),
            args=source.args,
            seed=config.run.seed,
            num_held_out=num_held_out,
            tokenize=tokenize,
            label=source.name,
            stamp=stamp,
            on_skip=on_skip,
        )
    if source.task.startswith(HUB_PREFIX):
        paths = fetch_dataset(source.task.removeprefix(HUB_PREFIX), config=source.config, split=source.split)
    else:
        paths = [Path(source.task)]
    return TablePrompts(
        rows=open_rows(paths),
        name=source.label,
        tokenize=tokenize,
        seed=config.run.seed,
        num_held_out=num_held_out,
        columns=source.columns,
        stamp=stamp,
        skip_long=config.data.skip_long_prompts,
        on_skip=on_skip,
    )
