"""Training from Python."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pmdflow.config.errors import Place
from pmdflow.config.installed import require_engine, require_imports, require_variables
from pmdflow.config.load import Loaded, load
from pmdflow.config.schema import Config
from pmdflow.library.run import Run, open_run


def up(config: str | PathLike[str] | Mapping[str, Any] | Config, *overrides: str) -> Run:
    """Train as `pmdflow up` does, to the end; a run directory that exists is resumed. Call it from the main thread.

    Ctrl-C drains: the run that is returned then has fewer iterations, and the same call continues it.

    Args:
        config: A YAML file, its content as a mapping, or a checked configuration.
        overrides: `KEY=VALUE` settings over a file's.

    Returns:
        The run, to be read.

    Raises:
        ConfigError: the file or an override is wrong.
        pydantic.ValidationError: the mapping is wrong.
        ValueError: overrides for something that is not a file.
        PmdflowError: the run could not start, or failed.
        KeyboardInterrupt: it was stopped at once, by a second Ctrl-C.

    Example:
        >>> run = pmdflow.up("configs/quickstart.yaml", "run.iterations=3")     # doctest: +SKIP
        >>> run.metrics()[-1]["reward/mean"]                                    # doctest: +SKIP
        0.43
    """
    loaded = _loaded(config, overrides)
    require_engine(loaded.config.rollout)
    require_imports(loaded)
    require_variables(loaded)
    from pmdflow.run.directory import RunDirectory
    from pmdflow.run.launch import up as train

    if train(loaded) != 0:
        raise KeyboardInterrupt
    return open_run(RunDirectory.path_of(loaded.config))


def _loaded(config: str | PathLike[str] | Mapping[str, Any] | Config, overrides: tuple[str, ...]) -> Loaded:
    if isinstance(config, str | PathLike):
        return load(Path(config), overrides)
    if overrides:
        raise ValueError(f"overrides {list(overrides)} are for a file: change the configuration itself")
    checked = config if isinstance(config, Config) else Config.model_validate(config)
    # What resumes it from the command line.
    written = Path(checked.run.dir).expanduser() / checked.run.name / "config.yaml"
    return Loaded(config=checked, origins={}, path=written, place=lambda _: Place(source="pmdflow.up"))
