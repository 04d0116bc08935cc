"""Checkpoints that exist if and only if their manifest does: the rename of the manifest is the only commit point.

`checkpoints/iteration-000010.tmp/` is filled by the learner, synced, renamed to `iteration-000010/`; then
`iteration-000010.json` is written aside, synced and renamed, and the directory synced.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from pmdflow import durable
from pmdflow.errors import PmdflowError

FORMAT = 1
_READ_BYTES = 1 << 22
_MANIFEST = re.compile(r"iteration-(\d{6,})\.json")
_OURS = re.compile(r"iteration-\d{6,}(\.json)?((\.[0-9a-f]{8})?\.tmp)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint, as it was when it was committed."""

    path: str
    """Relative to the checkpoint's directory, with slashes."""
    size: int
    """Bytes."""
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint covers.

    Example:
        >>> manifest = Manifest.new(Path("runs/a/checkpoints"), iteration=10, version=10, lsn=4711)
        >>> manifest.directory.name
        'iteration-000010'
    """

    root: Path
    """Directory of the checkpoints; not written to the file."""
    iteration: int
    """Iterations trained."""
    version: int
    """Policy version of the weights."""
    lsn: int
    """Position in the store's log up to which everything was durable."""
    claims: tuple[int, ...]
    """Claims that the weights have trained on, in the surviving history."""
    files: tuple[CheckpointFile, ...] = ()
    """Filled in by `commit_checkpoint`."""

    @classmethod
    def new(
        cls, root: Path, *, iteration: int, version: int, lsn: int, claims: Iterable[int] | None = None
    ) -> Manifest:
        """The manifest of a checkpoint that is about to be written to `writing`.

        Args:
            root: Directory of the checkpoints.
            iteration: Iterations trained.
            version: Policy version of the weights.
            lsn: Durable position of the store's log.
            claims: Default: 1 to `iteration`, because the claim of iteration i has the number i.
        """
        numbers = range(1, iteration + 1) if claims is None else claims
        return cls(root=root, iteration=iteration, version=version, lsn=lsn, claims=tuple(numbers))

    @property
    def directory(self) -> Path:
        """Where the committed files are."""
        return self.root / f"iteration-{self.iteration:06d}"

    @property
    def writing(self) -> Path:
        """Where the files are written before the commit."""
        return self.root / f"iteration-{self.iteration:06d}.tmp"

    @property
    def path(self) -> Path:
        """The manifest file."""
        return self.root / f"iteration-{self.iteration:06d}.json"


def commit_checkpoint(root: Path, manifest: Manifest, files: Iterable[CheckpointFile]) -> Manifest:
    """Make the files in `manifest.writing` the checkpoint of its iteration; a crash leaves all of it or nothing.

    An earlier checkpoint of the same iteration is replaced. Only sizes are looked at: whoever wrote the files has
    synced and summed them.

    Args:
        root: Directory of the checkpoints.
        manifest: What the checkpoint covers.
        files: All that were written, by whichever rank.

    Returns:
        The manifest with its list of files.

    Raises:
        ValueError: the manifest belongs to another root, or no file was written.
        PmdflowError: what is in `writing` is not what was written.
    """
    if manifest.root != root:
        raise ValueError(f"the manifest is of {manifest.root}, not of {root}: make it with Manifest.new({root}, ...)")
    written = tuple(sorted(files, key=lambda file: file.path))
    if not written:
        raise ValueError(f"{manifest.writing} holds no file: save the learner there before the commit")
    _require_written(manifest.writing, written)
    _discard(manifest)
    for directory in [manifest.writing, *(path for path in manifest.writing.rglob("*") if path.is_dir())]:
        durable.sync(directory)
    durable.rename(manifest.writing, manifest.directory)
    committed = replace(manifest, files=written)
    durable.write(manifest.path, json.dumps(_to_json(committed), indent=1) + "\n")
    return committed


def newest_manifest(root: Path, *, before: int | None = None) -> Manifest | None:
    """The newest checkpoint whose files all have the recorded size and checksum, or None.

    Every byte of it is read; beside a run that prunes it, it may be gone before that is done. With `before` it is of an
    earlier version.
    """
    known = [found for found in reversed(manifests(root)) if before is None or found.version < before]
    return next((found for found in known if _intact(found, checksums=True)), None)


def oldest_manifest(root: Path) -> Manifest | None:
    """The oldest checkpoint whose files all have the recorded size, or None."""
    return next((found for found in manifests(root) if _intact(found, checksums=False)), None)


def manifest_at(root: Path, iteration: int) -> Manifest:
    """The checkpoint of one iteration.

    Raises:
        PmdflowError: there is none; the message lists those that exist.
    """
    found = [manifest for manifest in manifests(root) if _intact(manifest, checksums=False)]
    for manifest in found:
        if manifest.iteration == iteration:
            return manifest
    kept = ", ".join(str(manifest.iteration) for manifest in found) or "none"
    raise PmdflowError(f"{root} has no checkpoint of iteration {iteration}; kept iterations: {kept}")


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, manifest first, and whatever no manifest covers.

    Not while a checkpoint is being written: its directory looks like an orphan.

    Raises:
        ValueError: keep is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; without a checkpoint a run cannot resume: keep at least 1")
    kept = [manifest for manifest in manifests(root) if _intact(manifest, checksums=False)][-keep:]
    names = {path.name for manifest in kept for path in (manifest.path, manifest.directory)}
    doomed = [path for path in root.iterdir() if _OURS.fullmatch(path.name) and path.name not in names]
    for path in doomed:
        if not path.is_dir():
            path.unlink()
    durable.sync(root)
    for path in doomed:
        if path.is_dir():
            shutil.rmtree(path)


def manifests(root: Path) -> list[Manifest]:
    """Every checkpoint whose manifest can be read, oldest first; a damaged one is as good as none."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _MANIFEST.fullmatch(path.name)
        manifest = _read(root, path) if match else None
        if match and manifest is not None and manifest.iteration == int(match[1]):
            found.append(manifest)
    return sorted(found, key=lambda manifest: manifest.iteration)


def checksum(file: BinaryIO) -> int:
    """The CRC-32 of what `file` holds from where it stands to its end."""
    value = 0
    while chunk := file.read(_READ_BYTES):
        value = zlib.crc32(chunk, value)
    return value


def _to_json(manifest: Manifest) -> dict[str, Any]:
    values = asdict(manifest)
    del values["root"]
    return {"format": FORMAT, **values}


def _read(root: Path, path: Path) -> Manifest | None:
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            return None
        files = tuple(CheckpointFile(**file) for file in values.pop("files"))
        values["lsn"] = values["lsn"] or 0  # null where the store did not say it yet
        return Manifest(root=root, files=files, claims=tuple(values.pop("claims")), **values)
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return None


def _intact(manifest: Manifest, *, checksums: bool) -> bool:
    try:
        for file in manifest.files:
            path = manifest.directory / file.path
            if path.stat().st_size != file.size:
                return False
            if checksums:
                with path.open("rb") as content:
                    if checksum(content) != file.crc32:
                        return False
    except OSError:
        return False
    return bool(manifest.files)


def _discard(manifest: Manifest) -> None:
    """Remove an earlier checkpoint of the same iteration, manifest first, so that it never covers other files."""
    if manifest.path.exists():
        manifest.path.unlink()
        durable.sync(manifest.root)
    if manifest.directory.exists():
        shutil.rmtree(manifest.directory)


def _require_written(directory: Path, files: Iterable[CheckpointFile]) -> None:
    """Refuse a directory whose files are not those that the ranks say they wrote: it may not be the same for all."""
    there = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in directory.rglob("*") if path.is_file()
    }  # fmt: skip
    said = {file.path: file.size for file in files}
    for name in sorted(said.keys() | there.keys()):
        if name not in said:
            problem = f"{name}, which no learner rank says it wrote"
        elif there.get(name) != said[name]:
            problem = f"{name} with {there.get(name, 'no')} bytes, its writer says {said[name]}"
        else:
            continue
        raise PmdflowError(f"{directory} holds {problem}", hint="all machines of the run must see one run.dir")
