"""A folder that a crash leaves whole or not at all, and the sharded weights in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pmdflow import durable
from pmdflow.errors import PmdflowError
from pmdflow.export.weights import INDEX, Named

_PARTIAL = ".pmdflow-partial"
_LAST = ("config.json", "adapter_config.json")
"""Without these nothing loads a folder."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a hidden folder; when the context is left without an error it is synced and takes the place of `out`.

    It lies beside `out` and is renamed to it. Where `out` is there and empty, it may be a mount or somebody's working
    directory, which nobody can replace: then it lies inside, and its files are renamed. An error takes it away; what a
    crash leaves of it, the next export to `out`.

    Raises:
        PmdflowError: `out` holds something, is no folder, or is being written by another process; or the disk refuses.
    """
    try:
        out = out.resolve()
        inside = out.is_dir()
        aside = out / _PARTIAL if inside else out.with_name(f".{out.name}{_PARTIAL}")
        _require_empty(out, aside)
        aside.mkdir(parents=True, exist_ok=True)
        with _locked(aside):
            _require_empty(out, aside)  # another export may have been about to end
            _empty(aside)
            try:
                yield aside
                durable.sync_tree(aside)
                if inside:
                    _move_files(aside, out)
                else:
                    durable.rename(aside, out)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise PmdflowError(
            f"{error.filename or out}: {error.strerror or error}", hint="mend that, or choose another folder"
        ) from error


def _require_empty(out: Path, aside: Path) -> None:
    if out.exists() and (not out.is_dir() or any(path != aside for path in out.iterdir())):
        raise PmdflowError(f"{out} exists and is not an empty folder", hint="choose another, or remove what is there")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PmdflowError(
                f"another export is writing {folder}", hint="wait for it or choose another folder"
            ) from error
        yield
    finally:
        os.close(lock)


def _move_files(aside: Path, out: Path) -> None:
    """Rename what `aside` holds into `out`; what makes it a model comes last, when the rest is on disk."""
    for last in (False, True):
        for path in sorted(aside.iterdir()):
            if (path.name in _LAST) == last:
                path.rename(out / path.name)
        durable.sync(out)
    aside.rmdir()


def write_shards(folder: Path, tensors: Iterable[Named], stored: Mapping[str, Tensor], *, shard_bytes: int) -> None:
    """Write `tensors` as `model.safetensors`, or as several files and their index; one file is in memory at a time.

    Args:
        folder: Where to.
        tensors: Names and tensors, in the order of `stored`.
        stored: All of them as tensors without memory, for the plan.
        shard_bytes: Most bytes of one file.
    """
    plan = split_torch_state_dict_into_shards(
        dict(stored), filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        file = plan.tensor_to_filename[name]
        waiting[file][name] = tensor
        if len(waiting[file]) == len(plan.filename_to_tensors[file]):
            save_tensors(waiting.pop(file), folder / file)
    assert not waiting, f"tensors are missing from {sorted(waiting)}"
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file of tensors.

    Raises:
        PmdflowError: the disk does not take it.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # it makes files that only their owner reads
    except SafetensorError as error:
        raise PmdflowError(f"cannot write {path}: {error}", hint="free space or choose another folder") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
