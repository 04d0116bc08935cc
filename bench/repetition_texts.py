"""Looping and legitimately repetitive texts for `repetition.py`: generated from a seed, and files of this machine."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NUM_CHARS = 8192
"""Length of a legitimate text, and the longest of a piece of a file."""
LOOP_CHARS = 24576
"""Length of a looping text: a loop goes on until something ends it."""
NOUNS = [
    "sum",
    "area",
    "speed",
    "answer",
    "price",
    "angle",
    "root",
    "slope",
    "volume",
    "train",
    "tank",
    "number",
    "remainder",
    "factor",
    "digit",
]
VERBS = ["is", "becomes", "equals", "exceeds", "gives", "doubles", "divides", "bounds", "reaches"]
LINKS = ["So", "Then", "Wait,", "Hence", "Now", "But", "Therefore", "Note that", "Let me check:", "Alternatively,"]
NAMES = [
    "Ada",
    "Ben",
    "Chloe",
    "Dev",
    "Emma",
    "Finn",
    "Gita",
    "Hugo",
    "Ines",
    "Jon",
    "Kira",
    "Liam",
    "Mona",
    "Nils",
    "Olga",
    "Piet",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text and what a detector should say of it."""

    kind: str
    text: str
    loop_start: int | None
    """Character at which it begins to loop; None if it is legitimate."""


def sentence(rng: random.Random) -> str:
    """One step of a chain of thought."""
    a, b = rng.randrange(2, 99), rng.randrange(2, 99)
    subject, other, verb = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(VERBS)
    return rng.choice(
        [
            f"{rng.choice(LINKS)} the {subject} {verb} {a} + {b} = {a + b}. ",
            f"{rng.choice(LINKS)} if the {subject} {verb} {a}, the {other} must be {a * b}. ",
            f"{rng.choice(LINKS)} we need the {subject} of {rng.choice(NAMES)}, which {verb} {a - b}. ",
            f"The {subject} and the {other} differ by {abs(a - b)}, so {rng.choice(NAMES)} is right.\n",
        ]
    )


def chain_of_thought(rng: random.Random) -> Iterator[str]:
    while True:
        yield sentence(rng)


def markdown_table(rng: random.Random) -> Iterator[str]:
    columns = rng.randrange(2, 7)
    yield "| " + " | ".join(rng.choice(NOUNS) for _ in range(columns)) + " |\n" + "|---" * columns + "|\n"
    while True:
        yield "| " + " | ".join(str(rng.randrange(rng.choice([10, 1000]))) for _ in range(columns)) + " |\n"


def truth_table(rng: random.Random) -> Iterator[str]:
    while True:
        names = rng.sample("pqrstuvwxyz", 5)
        cut, flip = rng.randrange(2, 6), rng.randrange(32)
        for row in range(32):
            values = " | ".join(f"{name}={row >> bit & 1}" for bit, name in enumerate(names))
            yield f"| {values} | {'true' if (row ^ flip) % cut else 'false'} |\n"
        yield sentence(rng) + "\n"


def ruled_table(rng: random.Random) -> Iterator[str]:
    width = rng.randrange(8, 30)
    while True:
        yield "+" + ("-" * width + "+") * 3 + "\n"
        yield "|" + "".join(f" {rng.choice(NAMES)} {rng.randrange(100)}".ljust(width) + "|" for _ in range(3)) + "\n"


def numbered_list(rng: random.Random) -> Iterator[str]:
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    for number in range(1, 10**6):
        yield f"{number}. The {noun} {verb} {number * rng.randrange(2, 9)}.\n"


def plain_list(rng: random.Random) -> Iterator[str]:
    while True:
        yield f"- {rng.choice(NAMES)}: {rng.choice(NOUNS)} {rng.randrange(1, 50)}\n"


def trial_division(rng: random.Random) -> Iterator[str]:
    value = rng.randrange(10**6, 10**7)
    for divisor in range(2, 10**6):
        rest = value % divisor
        yield f"{value} / {divisor}: {'divides' if rest == 0 else f'remainder {rest}, no'}.\n"


def arithmetic_column(rng: random.Random) -> Iterator[str]:
    total = 0
    while True:
        term = rng.randrange(1, 10)
        yield f"{total} + {term} = {total + term}\n"
        total = (total + term) % rng.choice([1000, 10**6])


def times_table(rng: random.Random) -> Iterator[str]:
    factor = rng.randrange(2, 10**4)
    for number in range(1, 10**6):
        yield f"{number} x {factor} = {number * factor}\n"


def zero_column(rng: random.Random) -> Iterator[str]:
    """A sparse matrix: mostly zeros, some entries."""
    while True:
        yield " ".join(str(rng.randrange(10)) if rng.random() < 0.2 else "0" for _ in range(16)) + "\n"


def csv_rows(rng: random.Random) -> Iterator[str]:
    for number in range(10**6):
        yield f"{number},{rng.choice(NAMES)},{rng.random():.3f},{rng.choice(['true', 'false'])}\n"


def json_rows(rng: random.Random) -> Iterator[str]:
    while True:
        yield f'  {{"name": "{rng.choice(NAMES)}", "age": {rng.randrange(9, 99)}, "tags": ["{rng.choice(NOUNS)}"]}},\n'


def code_fields(rng: random.Random) -> Iterator[str]:
    for number in range(10**6):
        yield f"    {rng.choice(NOUNS)}_{number}: int = {rng.randrange(100)}\n"


def code_tests(rng: random.Random) -> Iterator[str]:
    name = rng.choice(NOUNS)
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        yield f"    def test_{name}_{a}_{b}(self):\n        self.assertEqual({name}({a}, {b}), {a * b})\n\n"


def log_lines(rng: random.Random) -> Iterator[str]:
    second = rng.randrange(10**5)
    while True:
        second += rng.randrange(3)
        clock = f"{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        yield f"2026-01-01 {clock} INFO worker {rng.randrange(8)} done in {rng.randrange(500)} ms\n"


def refrain(rng: random.Random) -> Iterator[str]:
    """Verses that share a long refrain."""
    chorus = "".join(sentence(rng) for _ in range(3))
    while True:
        yield "".join(sentence(rng) for _ in range(4)) + chorus


LEGITIMATE: tuple[Callable[[random.Random], Iterator[str]], ...] = (
    chain_of_thought, markdown_table, truth_table, ruled_table, numbered_list, plain_list, trial_division,
    arithmetic_column, times_table, zero_column, csv_rows, json_rows, code_fields, code_tests, log_lines, refrain,
)  # fmt: skip


def filled(pieces: Iterator[str], num_chars: int) -> str:
    """Pieces until they have `num_chars` characters."""
    text = ""
    while len(text) < num_chars:
        text += next(pieces)
    return text[:num_chars]


def block(rng: random.Random, longest: int) -> str:
    """What a loop repeats: words, sentences or some lines of a legitimate text."""
    size = round(2 ** rng.uniform(0, longest.bit_length() - 1))
    source = rng.choice(LEGITIMATE)
    start = rng.randrange(200)
    return filled(source(rng), start + size)[start:]


def exact_loop(rng: random.Random) -> Iterator[str]:
    repeated = block(rng, 400)
    while True:
        yield repeated


def long_loop(rng: random.Random) -> Iterator[str]:
    repeated = "".join(sentence(rng) for _ in range(rng.randrange(8, 16)))
    while True:
        yield repeated


def noisy_loop(rng: random.Random) -> Iterator[str]:
    """One character in 200 is another one."""
    repeated = block(rng, 100)
    while True:
        yield "".join(rng.choice("abcdefgh 0123456789") if rng.random() < 0.005 else c for c in repeated)


def shuffled_cycle(rng: random.Random) -> Iterator[str]:
    """A few sentences in random order, without end."""
    repeated = [sentence(rng) for _ in range(rng.randrange(2, 4))]
    while True:
        yield rng.choice(repeated)


def word_cycle(rng: random.Random) -> Iterator[str]:
    words = rng.sample(NOUNS, rng.randrange(1, 4))
    while True:
        yield rng.choice(words) + " "


LOOPING = (exact_loop, long_loop, noisy_loop, shuffled_cycle, word_cycle)


def generated(*, seed: int, num_looping: int, num_legitimate: int) -> Iterator[Text]:
    """Texts of all kinds in turn; a looping one begins as a legitimate one."""
    for number in range(num_legitimate):
        rng = random.Random(f"legitimate-{seed}-{number}")
        make = LEGITIMATE[number % len(LEGITIMATE)]
        yield Text(kind=make.__name__, text=filled(make(rng), NUM_CHARS), loop_start=None)
    for number in range(num_looping):
        rng = random.Random(f"looping-{seed}-{number}")
        make = LOOPING[number % len(LOOPING)]
        start = rng.randrange(NUM_CHARS // 2)
        lead = filled(rng.choice(LEGITIMATE)(rng), start)
        yield Text(kind=make.__name__, text=lead + filled(make(rng), LOOP_CHARS - start), loop_start=start)


def files(*, seed: int, num_texts: int) -> Iterator[Text]:
    """Pieces of the standard library's sources and of the texts that installed packages carry, in the seed's order."""
    paths = sysconfig.get_paths()
    sources = [p for p in Path(paths["stdlib"]).rglob("*.py") if "site-packages" not in p.parts]
    suffixes = (".md", ".rst", ".txt", ".csv", ".json", ".html", ".css", ".js", ".svg", ".yaml", ".h")
    texts = [p for p in Path(paths["purelib"]).rglob("*") if p.suffix in suffixes and p.is_file()]
    rng = random.Random(seed)
    for pool in (sources, texts):
        pool.sort()
        rng.shuffle(pool)
        yield from _pieces(pool, num_texts // 2)


def _pieces(pool: list[Path], num_texts: int) -> Iterator[Text]:
    found = 0
    for path in pool:
        text = path.read_bytes()[: 8 * NUM_CHARS].decode(errors="replace")
        for start in range(0, len(text), NUM_CHARS):
            if found == num_texts:
                return
            found += 1
            yield Text(kind=f"file {path.suffix}", text=text[start : start + NUM_CHARS], loop_start=None)
