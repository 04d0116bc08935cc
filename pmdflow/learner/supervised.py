"""Supervised sequences for the auxiliary loss (PTX): a `.jsonl` file with `prompt` and `completion` on each line.

Source: arXiv:2507.20534 sec. 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pmdflow.config.schema import Config
from pmdflow.data.tokenizer import load_tokenizer, make_tokenize
from pmdflow.types import Int32, Mask, TrainBatch


class SupervisedData:
    """The tokens of all lines. Which of them a step reads depends on its number alone, so a resumed run repeats them.

    Example:
        >>> data = SupervisedData(rows=[(np.array([1], np.int32), np.array([2, 3], np.int32))], sequences=2)
        >>> data.batch(0).tokens
        array([1, 2, 3, 1, 2, 3], dtype=int32)
    """

    def __init__(self, *, rows: Sequence[tuple[Int32, Int32]], sequences: int) -> None:
        """Take pairs of prompt and completion tokens; a step reads `sequences` of them, in order, then again."""
        self._rows = list(rows)
        self._sequences = sequences

    @classmethod
    def of(cls, config: Config) -> SupervisedData | None:
        """Read `learner.ptx_data`; None without it.

        Raises:
            ValueError: a malformed line (`file:line: cause`), or one too long for `learner.tokens_per_microbatch`.
        """
        learner = config.learner
        if learner.ptx_data is None:
            return None
        rows = _read(Path(learner.ptx_data), config.model.path, limit=learner.tokens_per_microbatch)
        return cls(rows=rows, sequences=learner.ptx_sequences)

    def batch(self, step: int) -> TrainBatch:
        """The sequences of optimizer step `step`, as a claim of groups of one whose completions are trained."""
        first = step * self._sequences
        chosen = [self._rows[(first + index) % len(self._rows)] for index in range(self._sequences)]
        masks = [(0, len(prompt), Mask.GENERATED | Mask.TRAINED, len(completion)) for prompt, completion in chosen]
        mask = np.concatenate([np.repeat([unset, flags], [skip, count]) for unset, skip, flags, count in masks])
        lengths = [len(prompt) + len(completion) for prompt, completion in chosen]
        total, count = sum(lengths), len(chosen)
        return TrainBatch(
            iteration=0,
            version=0,
            tokens=np.concatenate([part for pair in chosen for part in pair]),
            logprobs=np.zeros(total, np.float32),
            versions=np.zeros(total, np.int32),
            temperatures=np.ones(total, np.float32),
            mask=mask.astype(np.uint8),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=np.array([len(prompt) for prompt, _ in chosen], np.int32),
            groups=np.arange(count),
            trajectories=np.arange(count),
            rewards=np.zeros(count),
            components={},
            stops=np.zeros(count, np.uint8),
            prompt_ids=("",) * count,
        )


def _read(path: Path, model_path: str, *, limit: int) -> list[tuple[Int32, Int32]]:
    tokenize, tokenizer = make_tokenize(model_path), load_tokenizer(model_path)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"learner.ptx_data: cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: needs an object with prompt and completion: {error!r}") from error
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise ValueError(f"{path}:{number}: prompt and completion must be texts, and completion not empty")
        own = np.asarray(tokenizer(completion, add_special_tokens=False)["input_ids"] + end, np.int32)
        rows.append((tokenize(prompt), own))
        length = len(rows[-1][0]) + len(own)
        if length > limit:
            raise ValueError(
                f"{path}:{number}: {length} tokens do not fit learner.tokens_per_microbatch ({limit}): raise it"
            )
    if not rows:
        raise ValueError(f"learner.ptx_data: {path} holds no line")
    return rows
