"""Reasoning-gym: its data sets, and their prompts by cursor."""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pmdflow.config.sources import GYM_PREFIX
from pmdflow.data.messages import prompt_key
from pmdflow.data.plain import pack as pack
from pmdflow.data.plain import unpack as unpack
from pmdflow.data.stamp import Stamp
from pmdflow.data.tokenizer import Tokenize
from pmdflow.errors import PromptTooLong
from pmdflow.types import Prompt

if TYPE_CHECKING:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.dataset import ProceduralDataset

CHUNK = 1024
"""Entries of one reasoning-gym data set object before it is seeded anew; `data.args.size` replaces it.

Most data sets are lazy, but some draw `size` numbers when they are made, and `word_ladder` has few entries.
"""
RETRY_STRIDE = 1 << 24
"""Distance of the candidates for one cursor: retries meet no other cursor's candidates below 16M prompts."""
MAX_RETRIES = 64
HELD_OUT_START = 1 << 31
"""First index of the held-out stream, behind every training candidate."""


class GymPrompts:
    """Prompts of one reasoning-gym data set.

    Entry `index` of the stream depends on `seed` and `index` alone. Training tries index = cursor,
    cursor + RETRY_STRIDE, ... and takes the first that is neither held out nor too long; held-out entries start at
    HELD_OUT_START, repeated texts left out. A few data sets (isomorphic_strings, knight_swap,
    polynomial_multiplication, ransom_note, word_ladder, codeio in reasoning-gym 0.1.25) iterate over sets of strings
    and repeat in another process only with a fixed PYTHONHASHSEED.

    Example:
        >>> source = GymPrompts(name="gcd", args={}, seed=0, num_held_out=8,
        ...                     tokenize=lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32))
        >>> source.prompt(3).id
        'gcd-3'
    """

    def __init__(
        self,
        *,
        name: str,
        args: Mapping[str, Any],
        seed: int,
        num_held_out: int,
        tokenize: Tokenize,
        label: str | None = None,
        stamp: Stamp | None = None,
        on_skip: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Check name and arguments, and draw the held-out prompts; see `make_prompts` for what it raises.

        Args:
            name: The data set's.
            args: Its arguments.
            seed: Of the stream.
            num_held_out: Prompts that are held out.
            tokenize: From a text to token ids.
            label: Before the number in prompt ids; None is `name`.
            stamp: Added to the metadata of every prompt.
            on_skip: Told of every prompt that is too long.
        """
        self.name = label or name
        self._name, self._args, self._tokenize = name, args, tokenize
        self._stamp, self._on_skip = stamp or Stamp(), on_skip
        self._chunk = int(args.get("size", CHUNK))
        digest = hashlib.sha256(f"pmdflow-prompts-{seed}".encode()).digest()
        # Data sets seed entry i with seed + i and NumPy takes 32 bits: 30 bits of base leave room for both streams.
        self._base = int.from_bytes(digest[:8], "little") >> 34
        self._dataset = lru_cache(maxsize=4)(self._make_dataset)
        self._held_out = self._draw_held_out(num_held_out)
        self.num_held_out, self.held_out_keys = num_held_out, frozenset(self._held_out)
        self._excluded = set(self._held_out)

    def exclude(self, keys: Iterable[int]) -> None:
        """Never train on prompts with these keys."""
        self._excluded.update(keys)

    def prompt(self, cursor: int) -> Prompt:
        """See `PromptSource`.

        Raises:
            ValueError: no candidate will do: the task has too few different prompts, or only long ones.
        """
        assert 0 <= cursor < HELD_OUT_START, cursor
        for attempt in range(MAX_RETRIES):
            index = cursor + attempt * RETRY_STRIDE
            entry = self._entry(index)
            if prompt_key(entry["question"]) in self._excluded:
                continue
            if self._fits(f"{self.name}-{index}", entry["question"]):
                return self._prompt(f"{self.name}-{index}", entry)
        raise ValueError(
            f"data.task {GYM_PREFIX}{self._name}: {MAX_RETRIES} prompts in a row are too long or among the "
            f"{len(self._excluded)} held out; lower eval.prompts, raise data.max_prompt_tokens or widen data.args"
        )

    num_train: None = None
    """It is endless."""

    def row(self, number: int) -> int:
        """See `Source`."""
        return number

    def at(self, row: int) -> Prompt:
        """See `Source`."""
        return self.prompt(row)

    def held_out(self, n: int) -> list[Prompt]:
        """See `PromptSource`."""
        assert 0 <= n <= len(self._held_out), (n, len(self._held_out))
        indexes = islice(self._held_out.values(), n)
        return [self._prompt(f"{self.name}-heldout-{i - HELD_OUT_START}", self._entry(i)) for i in indexes]

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing but what the configuration says of it."""
        return {}

    @property
    def summary(self) -> str:
        """How many prompts there are of which kind."""
        return f"endless, {len(self._held_out):,} prompts held out"

    def _draw_held_out(self, n: int) -> dict[int, int]:
        """Index of each held-out prompt by its key."""
        found: dict[int, int] = {}
        for index in range(HELD_OUT_START, HELD_OUT_START + max(MAX_RETRIES * n, 1)):
            question = self._entry(index)["question"]
            if self._fits(f"{self.name}-heldout-{index - HELD_OUT_START}", question):
                found.setdefault(prompt_key(question), index)
            if len(found) >= n:
                break
        if len(found) < n:
            raise ValueError(
                f"eval.prompts is {n}, but data.task {GYM_PREFIX}{self._name} made only {len(found)} "
                "different prompts; lower eval.prompts or widen data.args"
            )
        return dict(islice(found.items(), n))

    def _fits(self, id: str, question: str) -> bool:
        try:
            self._tokenize(question)
        except PromptTooLong as error:
            self._on_skip(f"{id} is skipped: {error}")
            return False
        return True

    def _entry(self, index: int) -> dict[str, Any]:
        position = index % self._chunk
        entry: dict[str, Any] = self._dataset(index - position)[position]
        return entry

    def _make_dataset(self, start: int) -> ProceduralDataset:
        return make_dataset(name=self._name, args={"size": CHUNK, **self._args}, seed=self._base + start)

    def _prompt(self, id: str, entry: Mapping[str, Any]) -> Prompt:
        name, args = self._name, {key: value for key, value in self._args.items() if key != "size"}
        if name == "composite":
            name = entry["metadata"]["source_dataset"]
            args = next((spec.get("config") or {}) for spec in self._args["datasets"] if spec["name"] == name)
        metadata = {"dataset": name, "args": args, "question": entry["question"], "answer": entry["answer"]}
        return Prompt(
            id=id,
            text=entry["question"],
            tokens=self._tokenize(entry["question"]),
            metadata=self._stamp.on({**metadata, "metadata": pack(entry["metadata"])}),
        )


def make_dataset(*, name: str, args: Mapping[str, Any], seed: int) -> ProceduralDataset:
    """Make a data set from `data.args`; the parts of `composite` are mappings of name, weight and config.

    Raises:
        ValueError: unknown data set or bad arguments; names them.
    """
    gym = _reasoning_gym()
    _check_name(name)
    if "seed" in args:
        raise ValueError(f"data.args.seed is {args['seed']}: prompts are seeded by run.seed; remove it")
    arguments = {**args, "datasets": _parts(args)} if name == "composite" else dict(args)
    try:
        return gym.create_dataset(name, seed=seed, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data.args {dict(args)} of reasoning_gym/{name}: {error}") from error


def _reasoning_gym() -> ModuleType:
    """The package, which takes a second to import: only a task of it pays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a dependency, each time it is compiled
        import reasoning_gym
    module: ModuleType = reasoning_gym
    return module


def _check_name(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {len(DATASETS)}, for example chain_sum"
        raise ValueError(f"data.task is reasoning_gym/{name}: reasoning-gym has no data set {name}; {hint}")


def _parts(args: Mapping[str, Any]) -> list[DatasetSpec]:
    from reasoning_gym.composite import DatasetSpec

    parts = []
    for index, part in enumerate(args.get("datasets") or []):
        where = f"data.args.datasets[{index}] is {part}"
        if not isinstance(part, Mapping) or "name" not in part or part.keys() - {"name", "weight", "config"}:
            raise ValueError(f"{where}: give a mapping of name, weight (default 1) and config (default empty)")
        _check_name(part["name"])
        config = dict(part.get("config") or {})
        if part["name"] == "composite" or config.keys() & {"seed", "size"}:
            raise ValueError(f"{where}: a part may neither be composite nor set seed or size")
        parts.append(DatasetSpec(name=part["name"], weight=part.get("weight", 1.0), config=config))
    if not parts:
        raise ValueError("data.args.datasets is empty: reasoning_gym/composite needs at least one data set")
    return parts
