"""The verifiers of reasoning-gym's data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym.dataset import ProceduralDataset  # it loads slowly: while a subprocess starts, not in its first item

from pmdflow.data.gym import make_dataset, unpack
from pmdflow.reward.rubric import InvalidCompletion

MARKER = re.compile("answer:", re.IGNORECASE)
"""What precedes the final answer in a completion."""


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


@lru_cache(maxsize=256)
def _scorer(name: str, args: str) -> ProceduralDataset:
    return make_dataset(name=name, args={**json.loads(args), "size": 1}, seed=0)
