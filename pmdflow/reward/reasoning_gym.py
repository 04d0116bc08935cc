"""Reasoning-gym: its data sets, its verifiers, and the lossless plain form in which entries pass through the store."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # of a dependency, each time it is compiled
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

from pmdflow.reward.rubric import InvalidCompletion

MARKER = re.compile("answer:", re.IGNORECASE)
"""What precedes the final answer in a completion."""

_TUPLE, _INT, _ITEMS = "__tuple__", "__int__", "__items__"
_INT64 = 1 << 63


def score(*, completion: str, prompt: str, metadata: Mapping[str, Any]) -> float:
    """1.0 if what follows the last `answer:` is exactly right by the data set's own verifier, else 0.0.

    Reasoning-gym gives partial credit (0.01 for a number of the right form, a share for an answer with
    surplus text); only its full score of 1 counts here, so that the form alone is worth nothing.

    Args:
        completion: Generated text; the answer may span several lines.
        prompt: Not used.
        metadata: As made by `pmdflow.data`: `dataset`, `args`, `question`, `answer` and the entry's own `metadata`.

    Raises:
        InvalidCompletion: no `answer:`, nothing behind it, or an answer on which the verifier trips.
        ValueError: `metadata` is not that of a reasoning-gym prompt.
    """
    missing = {"dataset", "args", "question", "answer", "metadata"} - metadata.keys()
    if missing:
        raise ValueError(f"metadata lacks {sorted(missing)}: this function judges prompts of reasoning_gym tasks only")
    answer = final_answer(completion)
    dataset = _scorer(metadata["dataset"], json.dumps(metadata["args"], sort_keys=True))
    entry = {
        "question": metadata["question"],
        "answer": metadata["answer"],
        "metadata": unpack(metadata["metadata"]),
    }
    try:
        value = dataset.score_answer(answer, entry)
    except Exception as error:
        if isinstance(entry["answer"], str):
            dataset.score_answer(entry["answer"], entry)  # raises too if the entry, not the answer, is at fault
        raise InvalidCompletion(f"the verifier cannot read the answer: {type(error).__name__}: {error}") from error
    return 1.0 if value >= 1.0 else 0.0


def make_dataset(*, name: str, args: Mapping[str, Any], seed: int) -> ProceduralDataset:
    """Make a data set from `data.args`; the parts of `composite` are mappings of name, weight and config.

    Raises:
        ValueError: unknown data set or bad arguments; names them.
    """
    _check_name(name)
    if "seed" in args:
        raise ValueError(f"data.args.seed is {args['seed']}: prompts are seeded by run.seed; remove it")
    arguments = {**args, "datasets": _parts(args)} if name == "composite" else dict(args)
    try:
        return reasoning_gym.create_dataset(name, seed=seed, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data.args {dict(args)} of reasoning_gym/{name}: {error}") from error


def final_answer(completion: str) -> str:
    """The text after the last `answer:`, stripped.

    Raises:
        InvalidCompletion: there is none.
    """
    _, *after = MARKER.split(completion)
    if not after:
        raise InvalidCompletion("no 'answer:' in the completion")
    answer = after[-1].strip()
    if not answer:
        raise InvalidCompletion("nothing after the last 'answer:'")
    return answer


def pack(value: Any) -> Any:
    """Turn an entry's value into plain types (str keys, lists, 64-bit integers) without losing what `unpack` needs.

    Some verifiers compare tuples or look up integer keys, which msgpack would turn into other things.

    Raises:
        ValueError: a type that has no plain form.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)  # drops numpy.str_ and string enums
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else {_INT: str(value)}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item) for item in value]}
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: pack(item) for key, item in value.items()}
        return {_ITEMS: [[pack(key), pack(item)] for key, item in value.items()]}
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return pack(value.tolist())
    raise ValueError(f"a {type(value).__name__} cannot be stored as prompt metadata: {value!r:.80}")


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, list | tuple):
        return [unpack(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == _TUPLE:
            return tuple(unpack(item) for item in inner)
        if tag == _INT:
            return int(inner)
        if tag == _ITEMS:
            return {unpack(key): unpack(item) for key, item in inner}
    return {key: unpack(item) for key, item in value.items()}


@lru_cache(maxsize=256)
def _scorer(name: str, args: str) -> ProceduralDataset:
    return make_dataset(name=name, args={**json.loads(args), "size": 1}, seed=0)


def _check_name(name: str) -> None:
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {len(DATASETS)}, for example chain_sum"
        raise ValueError(f"data.task is reasoning_gym/{name}: reasoning-gym has no data set {name}; {hint}")


def _parts(args: Mapping[str, Any]) -> list[DatasetSpec]:
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
