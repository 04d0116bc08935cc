"""The files of a checkpoint: what is in them, writing them beside training, and reading them on any number of ranks."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save

from pmdflow.errors import PmdflowError, WaitTimeout
from pmdflow.learner.checkpoint.manifest import CheckpointFile
from pmdflow.learner.checkpoint.summing import SummingWriter
from pmdflow.learner.policy import Policy
from pmdflow.learner.view import State

_KEPT = "kept"
_SCORERS = "scorers"
WRITE_TIMEOUT_S = 3600.0
"""A checkpoint that is not written after this long never will be."""


class AsyncSaver:
    """Writes one checkpoint at a time in a thread of its own. Every rank makes one, and the same calls in one order.

    Example:
        >>> saver = AsyncSaver()                          # doctest: +SKIP
        >>> saver.save({"weights": tensor}, "directory")  # doctest: +SKIP
        >>> saver.wait()                                  # doctest: +SKIP
    """

    def __init__(self) -> None:
        # A group of its own: two threads must not mix their collectives in one.
        self._group = dist.new_group(backend="gloo")
        self._writing: tuple[Future[Any], SummingWriter] | None = None

    def save(self, state: dict[str, Any], directory: str) -> None:
        """Copy `state` and begin to write it; waits for the save before it, if that is still going on."""
        self.wait()
        writer = SummingWriter(directory)
        writing = async_save(state, checkpoint_id=directory, storage_writer=writer, process_group=self._group)
        assert isinstance(writing, Future), "only a stager of one's own makes it answer otherwise"
        self._writing = writing, writer

    def wait(self) -> tuple[CheckpointFile, ...]:
        """Wait until the last save's files are whole.

        Returns:
            Those that this rank wrote; none if that was said before.

        Raises:
            PmdflowError: they could not be written, on whichever rank.
            WaitTimeout: they were not written in time.
        """
        saving, self._writing = self._writing, None
        if saving is None:
            return ()
        writing, writer = saving
        try:
            writing.result(timeout=WRITE_TIMEOUT_S)
            return writer.written()
        except TimeoutError as error:
            raise WaitTimeout(f"checkpoint {writer.path} was not written in {WRITE_TIMEOUT_S:g} s") from error
        except CheckpointException as error:  # a BaseException
            causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
            raise PmdflowError(
                f"checkpoint {writer.path} cannot be written: {causes}",
                hint="free space on its disk, then start the same `pmdflow up` again: it resumes",
            ) from error


def training_state(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    kept: State | None = None,
    scorers: dict[str, bytes] | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds; the tensors are the live shards, and loading fills them in place.

    `kept` is what algorithm and group rewards keep from claim to claim; None if nothing. `scorers` is what the scorers
    that learn do, by name.
    """
    has_moments = bool(optimizer.state)
    model, moments = get_state_dict(policy, optimizer, options=_options(policy))
    if not has_moments:
        # get_state_dict makes moments by an empty step; without them the first step's bias correction is right.
        optimizer.state.clear()
    frozen = {
        name for name, parameter in policy.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return {
        **({} if kept is None else {_KEPT: json.dumps(kept)}),
        **({_SCORERS: scorers} if scorers else {}),
        # A tied name of a frozen tensor is still there.
        "model": {name: tensor for name, tensor in model.items() if name not in frozen},
        "optimizer": moments,
        "has_moments": has_moments,
        "num_steps": num_steps,
        "random": torch.get_rng_state(),
    }


def load_training(
    policy: Policy, optimizer: torch.optim.Optimizer, directory: str
) -> tuple[int, State | None, dict[str, bytes]]:
    """Put policy, optimizer and random state where `directory` has them.

    Returns:
        The optimizer steps taken, what algorithm and group rewards kept (None if the checkpoint has none of that), and
        what scorers did, by name.
    """
    named = FileSystemReader(directory).read_metadata().state_dict_metadata
    has_kept = _KEPT in named
    scorers = {name.removeprefix(f"{_SCORERS}."): b"" for name in named if name.startswith(f"{_SCORERS}.")}
    state = training_state(policy, optimizer, 0, {} if has_kept else None, scorers)
    load_state(state, checkpoint_id=directory)
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(policy),
    )
    if not state["has_moments"]:
        optimizer.state.clear()
    torch.set_rng_state(state["random"])
    kept = json.loads(state[_KEPT]) if has_kept else None
    return int(state["num_steps"]), kept, state.get(_SCORERS, {})


def _options(policy: Policy) -> StateDictOptions:
    """With adapters the frozen weights stay out: they are those of the model folder."""
    frozen = any(not parameter.requires_grad for parameter in policy.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)
