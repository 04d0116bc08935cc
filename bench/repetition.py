"""Does the repetition detector end loops and leave lists, tables and code alone?

Ours, with the defaults of `rollout.repetition`, against the peer that many use: Whisper's compression ratio
(zlib, above 2.4 is repetitive; openai/whisper, decoding.py), on the same texts in one run. Texts are generated from a
seed (looping and legitimately repetitive ones) and, as legitimate ones only, read from this machine: sources of
Python's standard library and the texts that installed packages carry. Tokens are bytes, and those of a BPE of 8,192
tokens trained on half of the legitimate texts.

    uv run python bench/repetition.py --json out.json

The defaults were chosen with seed 0; `results/repetition.json` is of seed 1.

A text counts as flagged if the detector would end it anywhere; a looping text that is flagged before its loop begins
is a miss. The delay is counted from the loop's first token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from repetition_texts import Text, files, generated
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pmdflow.config.sequences import RepetitionConfig
from pmdflow.metrics.confidence import wilson
from pmdflow.rollout.repetition import RepetitionDetector

WHISPER_RATIO = 2.4
VOCABULARY = 8192

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one detector says of one text."""

    text: Text
    flagged: bool
    delay: int | None
    """Tokens from the loop's begin to the end that the detector made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--looping", type=int, default=250, help="generated looping texts")
    parser.add_argument("--legitimate", type=int, default=2000, help="generated legitimate texts")
    parser.add_argument("--files", type=int, default=2000, help="pieces of files, legitimate")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    texts = [
        *generated(seed=arguments.seed, num_looping=arguments.looping, num_legitimate=arguments.legitimate),
        *files(seed=arguments.seed, num_texts=arguments.files),
    ]
    results = {}
    for name, encode in (("bytes", lambda text: list(text.encode())), ("bpe-8192", make_bpe(texts))):
        start = time.perf_counter()
        verdicts, num_tokens = ours(texts, encode)
        elapsed = time.perf_counter() - start
        results[f"pmdflow, {name}"] = summary(verdicts) | {"us_per_token": round(1e6 * elapsed / num_tokens, 2)}
    results["whisper compression ratio"] = summary([whisper(text) for text in texts])
    for name, result in results.items():
        print(name, json.dumps(result, indent=2))
    if arguments.json:
        settings = vars(arguments) | {"detector": RepetitionConfig().model_dump()}
        machine = {"python": platform.python_version(), "processor": platform.machine()}
        with open(arguments.json, "w") as file:
            json.dump({"settings": settings, "machine": machine, "results": results}, file, indent=2)


def make_bpe(texts: Sequence[Text]) -> Encode:
    """A byte-level BPE of the size of a small model's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text.text for text in texts if text.loop_start is None][::2], trainer)
    return lambda text: list(tokenizer.encode(text).ids)


def ours(texts: Sequence[Text], encode: Encode) -> tuple[list[Verdict], int]:
    """Verdicts, and the number of tokens read."""
    verdicts, num_tokens = [], 0
    for text in texts:
        tokens = encode(text.text)
        num_tokens += len(tokens)
        found = RepetitionDetector(RepetitionConfig()).find(tokens)
        lead = len(encode(text.text[: text.loop_start])) if text.loop_start is not None else 0
        delay = None if found is None or found < lead else found + 1 - lead
        verdicts.append(Verdict(text=text, flagged=found is not None, delay=delay))
    return verdicts, num_tokens


def whisper(text: Text) -> Verdict:
    data = text.text.encode()
    flagged = len(data) / len(zlib.compress(data)) > WHISPER_RATIO
    return Verdict(text=text, flagged=flagged, delay=len(data) if flagged else None)


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Precision, recall and the share of false positives, with 95 % Wilson intervals; recall by kind."""
    legitimate = [v for v in verdicts if v.text.loop_start is None]
    looping = [v for v in verdicts if v.text.loop_start is not None]
    false = [v for v in legitimate if v.flagged]
    true = [v for v in looping if v.flagged and v.delay is not None]
    kinds = defaultdict(list)
    for verdict in looping:
        kinds[verdict.text.kind].append(verdict)
    return {
        "legitimate": len(legitimate),
        "looping": len(looping),
        "false_positives": len(false),
        "false_positives_per_1000": share(len(false), len(legitimate), scale=1000),
        "false_positive_kinds": sorted({v.text.kind for v in false}),
        "precision": share(len(true), len(true) + len(false)),
        "recall": share(len(true), len(looping)),
        "recall_by_kind": {
            kind: {
                "recall": round(sum(v.delay is not None for v in found) / len(found), 4),
                "delay_tokens_median": statistics.median([v.delay for v in found if v.delay is not None] or [0]),
            }
            for kind, found in kinds.items()
        },
    }


def share(part: int, whole: int, *, scale: int = 1) -> list[float]:
    """Value, and the ends of its interval."""
    value = part / whole if whole else 0.0
    return [round(scale * x, 4) for x in (value, *wilson(value, whole))]


if __name__ == "__main__":
    main()
