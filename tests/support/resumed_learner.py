"""A process that trains from archived claims, saves beside training, commits, and resumes: `MODEL DIRECTORY HOLD`.

After training iteration HOLD, with the checkpoint before it not committed, it waits to be killed; 0 never waits.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from pmdflow.learner.checkpoint.manifest import Manifest, commit_checkpoint, newest_manifest
from pmdflow.learner.learner import Learner
from pmdflow.store.archive import parts, read_part, write_part
from tests.support.learner import make_batch, make_config

ITERATIONS = 6


def write_claims(directory: Path) -> None:
    """Archive the claims of all iterations."""
    for number in range(1, ITERATIONS + 1):
        write_part(directory, replace(make_batch(seed=number), iteration=number), attrs={})


def main(model: str, directory: Path, hold: int) -> None:
    """Train what is not committed yet; the files of each checkpoint are committed after the next iteration."""
    root = directory / "checkpoints"
    learner = Learner(config=make_config(model, warmup_steps=5), rank=0)
    learner.setup(learner.address())
    newest, pending = newest_manifest(root), None
    if newest is not None:
        learner.load(str(newest.directory))
    done = newest.iteration if newest else 0
    losses = torch.load(directory / "losses.pt")[:done] if done else []
    print("resumed", done, flush=True)
    for number, path in enumerate(parts(directory), 1):
        if number <= done:
            continue
        losses.append(learner.train(read_part(path)).metrics)
        if number == hold:
            print("holding", flush=True)
            sys.stdin.read()
        if pending is not None:
            files = learner.await_saved()
            torch.save(losses, directory / "losses.pt")
            commit_checkpoint(root, pending, files)
        pending = Manifest.new(root, iteration=number, version=number, lsn=0)
        learner.save(str(pending.writing))
    torch.save({"losses": losses, "weights": learner.weights()}, directory / "final.pt")
    learner.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
