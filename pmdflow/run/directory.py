"""The run directory: created or reopened, locked by one `up`, described by config.yaml and meta.json."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from pmdflow import durable
from pmdflow.errors import LaunchError
from pmdflow.run.owner import Owner

if TYPE_CHECKING:
    from pmdflow.config.load import Loaded
    from pmdflow.config.schema import Config

PROCESSOR_MODEL = ("cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")
"""Fields of /proc/cpuinfo, on x86 and on Arm: generations that sum in another order may share a name."""
FIXED_KEYS = ("run.seed", "model.dtype", "learner.lora")
"""What a resumed run may not change: stored trajectories and checkpoints were made with it. Everything else may differ,
but for model and data, which are compared by content (`check_inputs`)."""
FIXED_BY_NAME = ("model.path", "data")
"""Likewise where the run is older than its record of what they hold."""


class RunDirectory:
    """A run directory that this process owns until the context is left.

    Example:
        with RunDirectory.prepare(config) as run:
            print(run.path)
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        """Use `prepare` instead."""
        self.path = path
        self._lock = lock
        self._inputs: dict[str, Any] = {}

    @classmethod
    def prepare(cls, config: Config) -> RunDirectory:
        """Create or reopen the directory, lock it and write the resolved configuration.

        Raises:
            LaunchError: it is not writable, is in use, or holds a run with other settings that may not change.
        """
        path = cls.path_of(config)
        try:
            durable.make_directories(path)
            durable.make_directories(path / "logs")
            lock = open(path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the life of the run)
        except OSError as error:
            raise LaunchError(
                f"run.dir: cannot write {path}: {error.strerror}", hint="choose another run.dir"
            ) from error
        _take(lock, path)
        run = cls(path, lock)
        try:
            lock.truncate(0)
            lock.write(str(Owner.me()))
            lock.flush()
            run._check_same_run(config)
            import yaml  # only here, like `load_run` below: `down` waits for what this module imports

            durable.write(path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        except OSError as error:
            lock.close()
            raise LaunchError(
                f"run.dir: cannot write {path}: {error.strerror}",
                hint="free space on its disk, and start the same `pmdflow up` again; or choose another run.dir",
            ) from error
        except BaseException:
            lock.close()
            raise
        return run

    @staticmethod
    def path_of(config: Config) -> Path:
        """Where the run of a configuration is."""
        return Path(config.run.dir).expanduser().absolute() / config.run.name

    @staticmethod
    def recorded_inputs(path: Path) -> dict[str, Any]:
        """What a run was begun with, as `check_inputs` was told; empty if there is no run, or an older one."""
        from pmdflow.config.recorded import recorded_meta  # with YAML, which `down` does not wait for

        inputs = recorded_meta(path).get("inputs")
        return inputs if isinstance(inputs, dict) else {}

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse another model or other data than the run was begun with; else remember them for meta.json.

        Args:
            inputs: Plain values: `pins`, which may differ, and whatever may not.

        Raises:
            LaunchError: says what differs.
        """
        from pmdflow.config.errors import dotted
        from pmdflow.config.load import leaves
        from pmdflow.data.fingerprint import SAMPLES  # runs of earlier releases noted none

        before = self.recorded_inputs(self.path)
        if before and self.has_store():
            old, new = (dict(leaves({**values, "pins": {}})) for values in (before, inputs))
            new = {key: value for key, value in new.items() if key in old or not str(key[-1]).endswith(SAMPLES)}
            changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            if changed:
                said = [f"{dotted(key)} was {old.get(key)!r:.80} and is {new.get(key)!r:.80}" for key in changed]
                raise LaunchError(
                    f"{self.path} was begun with other inputs: {', '.join(said)}",
                    hint="resume with those, or choose another run.name",
                )
        self._inputs = inputs

    @staticmethod
    def owner(path: Path) -> Owner | None:
        """The `up` that holds the directory, or None."""
        try:
            with open(path / "run.lock", encoding="utf-8") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return Owner.of(lock.read())  # None: it has only just taken the lock
        except FileNotFoundError as error:
            raise LaunchError(f"{path} is no run directory (it has no run.lock)") from error
        return None

    @staticmethod
    def is_live(path: Path) -> bool:
        """Whether an `up` holds the directory; one that was copied from elsewhere may have no lock at all."""
        return (path / "run.lock").is_file() and RunDirectory.owner(path) is not None

    def resume_command(self, loaded: Loaded) -> str:
        """The command that continues this run."""
        return shlex.join(["pmdflow", "up", str(loaded.path), *loaded.overrides])

    def archive_attrs(self, config: Config) -> dict[str, Any]:
        """What every archive part says about its run."""
        tokenizer = Path(config.model.path) / "tokenizer.json"
        digest = _digest(tokenizer) if tokenizer.is_file() else ""
        return {"model": config.model.path, "tokenizer_sha256": digest, "k": config.data.group_size}

    def write_meta(self, config: Config, device: dict[str, Any]) -> None:
        """Write meta.json: what `replay --verify` needs to be bitwise, and what a reader wants to know."""
        meta = {
            "schema": 1,
            "written": time.time(),
            "pmdflow": version("pmdflow"),
            "packages": {name: version(name) for name in ("ray", "numpy", "zarr")},
            "hardware": hardware(),
            "model_sha256": {
                path.name: _digest(path) for path in sorted(Path(config.model.path).glob("*.safetensors"))
            },
            "learner": {"ranks": config.learner.ranks, **device},
            "inputs": self._inputs,
        }
        durable.write(self.path / "meta.json", json.dumps(meta, indent=2) + "\n")

    def __enter__(self) -> Self:
        """Already locked."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let another `up` have it."""
        self._lock.close()

    def has_store(self) -> bool:
        """Whether the run has begun; what a start that failed has left before that is of no run yet."""
        return os.path.lexists(self.path / "store")  # on another node the link of `store.dir` leads nowhere

    def _check_same_run(self, config: Config) -> None:
        if not (self.path / "config.yaml").is_file() or not self.has_store():
            return
        from pmdflow.config.errors import ConfigError
        from pmdflow.config.load import load_run

        try:
            recorded = load_run(self.path).config
        except ConfigError as error:
            raise LaunchError(
                f"{self.path / 'config.yaml'} does not say any more what the run was begun with:\n{error}",
                hint="delete it, and start the same `pmdflow up` again, which writes it anew",
            ) from error
        before, now = _comparable(recorded), _comparable(config)
        by_name = () if self.recorded_inputs(self.path) else FIXED_BY_NAME
        for name in (*FIXED_KEYS, *by_name):
            if before[name] != now[name]:
                raise LaunchError(
                    f"{name} is {now[name]!r}, but {self.path} was begun with {before[name]!r}",
                    hint="resume with that value, or choose another run.name",
                )


def _take(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        raise LaunchError(
            f"{path} is in use by process {lock.read().strip()}",
            hint=f"stop it with `pmdflow down {path}`, or choose another run.name",
        ) from error


def _comparable(config: Config) -> dict[str, Any]:
    """What may not change, by its name, without what may in it; paths are absolute."""
    from pmdflow.config.sources import FILE_SUFFIXES

    data = config.data.model_dump(mode="json", exclude={"max_prompt_tokens"})
    if isinstance(data["task"], str) and data["task"].endswith(FILE_SUFFIXES):
        data["task"] = str(Path(data["task"]).absolute())
    return {
        "run.seed": config.run.seed,
        "model.dtype": config.model.dtype,
        "learner.lora": None if config.learner.lora is None else config.learner.lora.model_dump(mode="json"),
        "model.path": str(Path(config.model.path).absolute()),
        "data": data,
    }


def log_path(run: Path, actor: str) -> str:
    """Path of an actor's log file."""
    return str(run / "logs" / f"{actor}.log")


def hardware() -> dict[str, Any]:
    """What must be the same for a replay to be equal bit for bit; threads, dtype and ranks are in the configuration."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "processor_model": _cpuinfo(*PROCESSOR_MODEL),
        "architecture": platform.machine(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpuinfo(*names: str) -> str:
    """The first processor's values of these fields, those that there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return " ".join(found[name] for name in names if name in found)
