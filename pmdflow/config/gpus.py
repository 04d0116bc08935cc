"""The GPUs of a plan: those that a configuration states, or this machine's; and who gets how much of them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from pmdflow.errors import LaunchError

if TYPE_CHECKING:
    from pmdflow.config.schema import Config

GPUS = r"^[1-9]\d*x\d+(\.\d+)?GiB$"
"""How GPUs are stated: `8x80GiB`."""
QUERY_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """GPUs that are alike."""

    count: int
    bytes_each: int | None
    """None: not known."""
    source: str
    """Who says so, in words."""

    @property
    def room(self) -> int:
        """`bytes_each`, where it is known."""
        assert self.bytes_each is not None, "a plan of memory needs it"
        return self.bytes_each


def planned_gpus(config: Config) -> Gpus | None:
    """Those that `cluster.gpus` states, else this machine's if it is the one that runs; None: none, or not known.

    Example:
        >>> planned_gpus(config).count  # doctest: +SKIP
        8
    """
    if config.cluster.gpus is not None:
        count, _, each = config.cluster.gpus.partition("x")
        size = int(float(each.removesuffix("GiB")) * 2**30)
        return Gpus(count=int(count), bytes_each=size, source="stated by cluster.gpus")
    return local_gpus() if config.cluster.address == "local" else None


def local_gpus() -> Gpus | None:
    """This machine's GPUs, as NVIDIA's driver lists them, by the smallest; it makes no CUDA context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
        sizes = [int(line) << 20 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Gpus(count=len(sizes), bytes_each=min(sizes), source="of this machine") if sizes else None


def left_by_scorers(config: Config, gpus: int) -> int:
    """GPUs that are left for rollout and learner; those of scorers are whole ones.

    Raises:
        LaunchError: the scorers take them all.
    """
    taken = ceil(sum(scorer.actors * scorer.gpus for scorer in config.learner.scorers_when("complete").values()))
    if gpus and taken >= gpus:
        raise LaunchError(
            f"the actors of learner.scorers take {taken} of {gpus} GPUs: none is left for rollout and learner",
            hint="lower their actors or gpus; 0 scores on processors",
        )
    return max(gpus - taken, 0)


def gpu_shares(
    gpus: int, *, actors: int, ranks: int, tensor_parallel: int = 1, colocate: bool = False
) -> tuple[float, float]:
    """GPUs of one rollout actor and of one learner rank, as Ray counts them; 0 on machines without.

    Everyone has GPUs of its own where there are enough. Otherwise each GPU has a rank, and at most one engine beside
    it: two ranks on a GPU are what NCCL refuses, and two engines would each take their share of the whole memory. With
    `colocate` each GPU has one of both in any case.

    Raises:
        LaunchError: there are GPUs, but too few; the hint is what would fit.
    """
    engines = actors * tensor_parallel
    if gpus == 0:
        return 0.0, 0.0
    if colocate and not gpus == actors == ranks:
        raise LaunchError(
            f"cluster.colocate is true: each of {gpus} GPUs has an engine and a learner rank in turn, but "
            f"rollout.actors is {actors} and learner.ranks is {ranks}",
            hint=f"set both to auto, or to {gpus}",
        )
    if gpus >= engines + ranks and not colocate:
        return float(tensor_parallel), 1.0
    if gpus == ranks and actors <= gpus and tensor_parallel == 1:
        return 0.4, 0.6  # more than half: a second rank finds no room on the same GPU
    if gpus < ranks:
        raise LaunchError(
            f"learner.ranks is {ranks}, but there are {gpus} GPUs and each rank needs its own",
            hint=f"lower learner.ranks to {gpus} or less, or set it to auto",
        )
    needs = f"rollout.actors ({actors}) x rollout.tensor_parallel ({tensor_parallel})"
    left = (gpus - ranks) // tensor_parallel
    choices = [
        *([f"rollout.actors to {left}"] if left else []),
        *([f"rollout.actors and learner.ranks to {gpus} each, which share every GPU"] if tensor_parallel == 1 else []),
        "both to auto",
    ]
    raise LaunchError(
        f"{needs} engines and {ranks} learner ranks need {engines + ranks} GPUs, there are {gpus}: two engines never "
        "share a GPU",
        hint=f"set {', or '.join(choices)}",
    )
