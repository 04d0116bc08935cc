"""How much memory does the loss of one long packed sequence need, against its naive logits tensor?

Each form runs in a process of its own, which scores every token of the sequence from given hidden states and runs the
backward pass; hidden states, output embeddings and their gradients are not counted, for both forms hold them. On a CPU
the peak of the resident set is read every 2 ms, on a GPU `torch.cuda.max_memory_allocated`. The naive form (float32
logits, log-softmax) is only computed where `--naive` asks for it: its logits alone are tokens x vocabulary x 4 bytes.

    python bench/loss_memory.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pmdflow.learner.token_scores import TokenScores, scores_of_logits, token_scores

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
POLL_S = 0.002


class Peak:
    """Most memory in use while the block runs, above that before it [bytes]."""

    def __enter__(self) -> Self:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._before = self._highest = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._cuda:
            self._highest = torch.cuda.max_memory_allocated()
        self.bytes = self._highest - self._before

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._highest = max(self._highest, self._now())

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor) -> TokenScores:
    """All logits at once."""
    return scores_of_logits(hidden @ weight.T, targets, temperatures)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor) -> TokenScores:
    """The learner's."""
    return token_scores(hidden, weight, None, targets, temperatures)


def measure(form: str, *, tokens: int, vocabulary: int, hidden_size: int, threads: int) -> dict[str, Any]:
    """Peak bytes and seconds of one forward and backward pass in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(tokens, hidden_size, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5).requires_grad_()
    targets, temperatures = torch.randint(0, vocabulary, (tokens,), device=device), torch.ones(tokens, device=device)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    score = {"naive": naive, "ours": ours}[form]
    started = time.perf_counter()
    with Peak() as peak:
        scores = score(hidden, weight, targets, temperatures)
        # The PMD loss of one sequence, A = 1, tau = 0.05: the gradient of each token depends on the sum over all.
        ((1 / 0.05 - (scores.logprobs - scores.logprobs.detach()).sum()) ** 2 * 0.025 / tokens).backward()
    return {"form": form, "device": device, "peak_bytes": peak.bytes, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run each form in a process of its own and print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32 * 1024)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--naive", action="store_true", help="also run the naive form")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--form", choices=["naive", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"tokens": args.tokens, "vocabulary": args.vocabulary, "hidden_size": args.hidden_size}
    if args.form:
        print(json.dumps(measure(args.form, **sizes, threads=args.threads)))
        return
    runs = []
    for form in ["ours", *(["naive"] if args.naive else [])]:
        child = subprocess.run([sys.executable, *sys.argv, "--form", form], check=True, capture_output=True, text=True)
        runs.append(json.loads(child.stdout))
    logits_bytes = args.tokens * args.vocabulary * 4
    result = {
        **sizes,
        "naive_logits_bytes": logits_bytes,
        "share": runs[0]["peak_bytes"] / logits_bytes,
        "runs": runs,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(f"naive logits tensor {logits_bytes / 1e9:.2f} GB")
    for run in runs:
        print(
            f"{run['form']:>5}: peak {run['peak_bytes'] / 1e9:.3f} GB = {run['peak_bytes'] / logits_bytes:.1%} of it, "
            f"{run['seconds']:.1f} s on {run['device']}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
