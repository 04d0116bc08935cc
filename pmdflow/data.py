"""Prompts: a deterministic stream by cursor for training, and fixed held-out ones for evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgpack
import numpy as np

from pmdflow.errors import PromptTooLong
from pmdflow.rollout.control import check_overrides
from pmdflow.types import Int32, Prompt

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset
    from transformers import PreTrainedTokenizerBase

    from pmdflow.config.schema import Config

GYM_PREFIX = "reasoning_gym/"
CHUNK = 1024
"""Entries of one reasoning-gym data set object before it is seeded anew; `data.args.size` replaces it.

Most data sets are lazy, but some draw `size` numbers when they are made, and `word_ladder` has few entries.
"""
RETRY_STRIDE = 1 << 24
"""Distance of the candidates for one cursor: retries meet no other cursor's candidates below 16M prompts."""
MAX_RETRIES = 64
HELD_OUT_START = 1 << 31
"""First index of the held-out stream, behind every training candidate."""

Tokenize = Callable[[str], Int32]


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


def read_prompts(path: Path, tokenize: Tokenize) -> list[Prompt]:
    """Every prompt of a `.jsonl` file, in its order, for evaluation.

    Raises:
        ValueError: a malformed line (`file:line: cause`), or no prompt.
    """
    rows = list(_read_jsonl(path))
    if not rows:
        raise ValueError(f"{path} holds no prompt; give each line a key prompt")
    for number, _, metadata in rows:
        _check_sampling(path, number, metadata, training=False)
    return [_jsonl_prompt(path, row, tokenize) for row in rows]


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; never asks the network.

    Raises:
        ValueError: the folder is missing or has no tokenizer.
    """
    if not Path(model_path).is_dir():
        raise ValueError(f"model.path is {model_path!r}: there is no such folder")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path is {model_path!r}: cannot load its tokenizer: {error}") from error
    return tokenizer


def make_tokenize(model_path: str, *, max_tokens: int | None = None) -> Tokenize:
    """Return the function from a prompt's text to its token ids, shape [P].

    The text is one user message of the chat template, with the generation prompt, where the tokenizer has a
    template; otherwise the text and a newline. No other special token is added.

    Args:
        model_path: Folder with the tokenizer.
        max_tokens: `data.max_prompt_tokens`; a longer prompt raises `PromptTooLong`. None is unlimited.

    Raises:
        ValueError: no tokenizer in the folder.
    """
    tokenizer = load_tokenizer(model_path)

    def tokenize(text: str) -> Int32:
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            rendered = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        else:
            rendered = text + "\n"
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"model.path is {model_path!r}: its tokenizer makes no token of the prompt {text!r:.200}")
        if max_tokens is not None and len(ids) > max_tokens:
            raise PromptTooLong(
                f"data.max_prompt_tokens is {max_tokens}, but the prompt {text!r:.80} has {len(ids)} tokens; raise it "
                "as far as the model's positions and learner.tokens_per_microbatch allow, or leave such prompts out"
            )
        return np.asarray(ids, dtype=np.int32)

    return tokenize


class GymPrompts:
    """Prompts of one reasoning-gym data set.

    Entry `index` of the stream depends on `seed` and `index` alone. Training tries index = cursor,
    cursor + RETRY_STRIDE, ... and takes the first whose text is not held out; held-out entries start at
    HELD_OUT_START, repeated texts left out. A few data sets (isomorphic_strings, knight_swap,
    polynomial_multiplication, ransom_note, word_ladder, codeio in reasoning-gym 0.1.25) iterate over sets of strings
    and repeat in another process only with a fixed PYTHONHASHSEED.

    Example:
        >>> source = GymPrompts(name="gcd", args={}, seed=0, num_held_out=8,
        ...                     tokenize=lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32))
        >>> source.prompt(3).id
        'gcd-3'
    """

    def __init__(self, *, name: str, args: Mapping[str, Any], seed: int, num_held_out: int, tokenize: Tokenize) -> None:
        """Check name and arguments, and draw the held-out prompts; see `make_prompts` for what it raises."""
        self._name, self._args, self._tokenize = name, args, tokenize
        self._chunk = int(args.get("size", CHUNK))
        digest = hashlib.sha256(f"pmdflow-prompts-{seed}".encode()).digest()
        # Data sets seed entry i with seed + i and NumPy takes 32 bits: 30 bits of base leave room for both streams.
        self._base = int.from_bytes(digest[:8], "little") >> 34
        self._dataset = lru_cache(maxsize=4)(self._make_dataset)
        self._held_out = self._draw_held_out(num_held_out)

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`.

        Raises:
            ValueError: every candidate is held out: the task has too few different prompts.
        """
        assert 0 <= cursor < HELD_OUT_START, cursor
        for attempt in range(MAX_RETRIES):
            index = cursor + attempt * RETRY_STRIDE
            entry = self._entry(index)
            if entry["question"] not in self._held_out:
                return self._prompt(f"{self._name}-{index}", entry)
        raise ValueError(
            f"data.task {GYM_PREFIX}{self._name}: {MAX_RETRIES} prompts in a row are among the {len(self._held_out)} "
            "held out; lower eval.prompts or widen data.args"
        )

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        indexes = islice(self._held_out.values(), n)
        return [self._prompt(f"{self._name}-heldout-{i - HELD_OUT_START}", self._entry(i)) for i in indexes]

    def _draw_held_out(self, n: int) -> dict[str, int]:
        """Index of each held-out text."""
        found: dict[str, int] = {}
        for index in range(HELD_OUT_START, HELD_OUT_START + max(MAX_RETRIES * n, 1)):
            found.setdefault(self._entry(index)["question"], index)
            if len(found) >= n:
                break
        if len(found) < n:
            raise ValueError(
                f"eval.prompts is {n}, but data.task {GYM_PREFIX}{self._name} made only {len(found)} "
                "different prompts; lower eval.prompts or widen data.args"
            )
        return dict(islice(found.items(), n))

    def _entry(self, index: int) -> dict[str, Any]:
        position = index % self._chunk
        entry: dict[str, Any] = self._dataset(index - position)[position]
        return entry

    def _make_dataset(self, start: int) -> ProceduralDataset:
        from pmdflow.reward.reasoning_gym import make_dataset

        return make_dataset(name=self._name, args={"size": CHUNK, **self._args}, seed=self._base + start)

    def _prompt(self, id: str, entry: Mapping[str, Any]) -> Prompt:
        from pmdflow.reward.reasoning_gym import pack

        name, args = self._name, {key: value for key, value in self._args.items() if key != "size"}
        if name == "composite":
            name = entry["metadata"]["source_dataset"]
            args = next((spec.get("config") or {}) for spec in self._args["datasets"] if spec["name"] == name)
        metadata = {"dataset": name, "args": args, "question": entry["question"], "answer": entry["answer"]}
        return Prompt(
            id=id,
            text=entry["question"],
            tokens=self._tokenize(entry["question"]),
            metadata={**metadata, "metadata": pack(entry["metadata"])},
        )


class JsonlPrompts:
    """Prompts of a `.jsonl` file: `prompt` on each line, every other key is metadata; blank lines are skipped.

    The key `sampling` overrides how the prompt is sampled, see `pmdflow.rollout.control`.

    The last `num_held_out` lines are held out; earlier lines with the text of one of them are not trained on.
    Each epoch goes once through the others in an order drawn from the seed and the epoch.
    """

    def __init__(self, *, path: Path, seed: int, num_held_out: int, tokenize: Tokenize) -> None:
        """Read the whole file; see `make_prompts` for what it raises."""
        self._path, self._seed, self._tokenize = path, seed, tokenize
        rows = list(_read_jsonl(path))
        split = max(len(rows) - num_held_out, 0)
        self._held_out = rows[split:]
        texts = {text for _, text, _ in self._held_out}
        self._train = [row for row in rows[:split] if row[1] not in texts]
        for training, checked in ((True, self._train), (False, self._held_out)):
            for number, _, metadata in checked:
                _check_sampling(path, number, metadata, training=training)
        if not self._train:
            raise ValueError(
                f"{path} has {len(rows)} prompts, of which none is left for training when the last "
                f"{num_held_out} are held out; add prompts or lower eval.prompts"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`."""
        assert cursor >= 0, cursor
        epoch, position = divmod(cursor, len(self._train))
        return _jsonl_prompt(self._path, self._train[self._order(epoch)[position]], self._tokenize)

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        return [_jsonl_prompt(self._path, row, self._tokenize) for row in self._held_out[:n]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(f"pmdflow-epoch-{self._seed}-{epoch}").shuffle(order)
        return order


def _jsonl_prompt(path: Path, row: tuple[int, str, dict[str, Any]], tokenize: Tokenize) -> Prompt:
    number, text, metadata = row
    return Prompt(id=f"{path.stem}-{number}", text=text, tokens=tokenize(text), metadata=metadata)


def _check_sampling(path: Path, number: int, metadata: Mapping[str, Any], *, training: bool) -> None:
    try:
        check_overrides(metadata, training=training)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line number, prompt, metadata)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.task: cannot read {path}: {error}") from error
    for number, line in zip(count(1), lines, strict=False):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}, not an object with a key prompt")
        text = row.pop("prompt", None)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}:{number}: prompt is {text!r:.80}, not a text; every line needs one")
        try:
            msgpack.packb([text, row])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}:{number}: cannot be stored: {error}") from error
        yield number, text, row
