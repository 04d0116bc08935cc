"""Early end of trajectories that only repeat themselves.

Two signs, both on token ids, so they cost no forward pass and need no tokenizer:

- a loop: the last tokens are copies of one block;
- a low-entropy cycle: a window of the last tokens has few different n-grams, as when a handful of sentences come again
  in any order, or a loop has a slip now and then.

`bench/repetition.py` measures both on looping and on legitimately repetitive texts; the defaults come from there.

Source: arXiv:2501.12599 fig. 3b.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from pmdflow.config.sequences import RepetitionConfig

_MODULUS = (1 << 61) - 1
_BASE = 1_000_003


class RepetitionDetector:
    """Watches one sequence, in constant time and memory for each token.

    The period of a loop is the distance to the last occurrence of the newest n-gram, kept until a token breaks it.

    Example:
        >>> detector = RepetitionDetector(RepetitionConfig(ngram=2, copies=3, min_tokens=6))
        >>> detector.find([7, 1, 2, 1, 2, 1, 2, 1, 2])
        6
    """

    def __init__(self, config: RepetitionConfig, *, history: Sequence[int] = ()) -> None:
        """Begin after the tokens of `history`, of which only the end matters."""
        self._config = config
        self._tokens: deque[int] = deque(maxlen=config.window + config.ngram)
        self._ngram = 0
        """Rolling hash of the newest n-gram."""
        self._power = pow(_BASE, config.ngram - 1, _MODULUS)
        self._few = config.max_distinct * config.window
        self._ngrams: deque[int] = deque()
        """Hashes of the n-grams of the window, by their last token."""
        self._counts: Counter[int] = Counter()
        self._position = 0
        self._seen: dict[int, int] = {}
        """Last position of each n-gram of the window."""
        self._period = 0
        """Of the loop that may be going on; 0 if there is none."""
        self._run = 0
        """Last tokens that equal those a period before."""
        self.find(history[-(config.copies + 1) * (config.window + config.ngram) - config.min_tokens :])

    def anew(self, history: Sequence[int]) -> RepetitionDetector:
        """One that begins after the tokens of `history`, and has seen nothing else."""
        return RepetitionDetector(self._config, history=history)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Index in `tokens` of the first one with which the sequence is repetitive, or None; reads all of them."""
        found = None
        for index, token in enumerate(tokens):
            if self._feed(token) and found is None:
                found = index
        return found

    def _feed(self, token: int) -> bool:
        config = self._config
        oldest = self._tokens[-config.ngram] if self._position >= config.ngram else -1
        self._ngram = ((self._ngram - (oldest + 1) * self._power) * _BASE + token + 1) % _MODULUS
        self._tokens.append(token)
        self._position += 1
        if self._position < config.ngram:
            return False
        if self._period and token == self._tokens[-1 - self._period]:
            self._run += 1
        else:
            self._period = self._position - self._seen.get(self._ngram, self._position)
            self._run = config.ngram
        self._remember(self._ngram)
        if self._period and self._run + self._period >= max(config.copies * self._period, config.min_tokens):
            return True
        return len(self._counts) <= self._few and len(self._ngrams) == config.window

    def _remember(self, ngram: int) -> None:
        self._ngrams.append(ngram)
        self._counts[ngram] += 1
        self._seen[ngram] = self._position
        if len(self._ngrams) > self._config.window:
            oldest = self._ngrams.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest], self._seen[oldest]
