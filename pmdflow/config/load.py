"""From a YAML file and overrides to a checked configuration that knows where each value came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pmdflow.config.document import Document, parse
from pmdflow.config.errors import ConfigError, ConfigIssue, KeyPath, Place, did_you_mean, dotted, explain
from pmdflow.config.imports import IMPORT_PATH, locate
from pmdflow.config.recorded import rename_keys
from pmdflow.config.schema import RECORDED, Config
from pmdflow.config.sources import FILE_SUFFIXES


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, ready to run."""

    config: Config
    origins: dict[str, str]
    """Where each value came from, by dotted key: `default`, `override`, or `cluster.yaml:12`."""
    path: Path
    """The file it was read from."""
    overrides: tuple[str, ...] = ()
    """What was laid over it, as `KEY=VALUE`."""
    place: Callable[[KeyPath], Place]
    """Where the value of a key is written, or the nearest one above it."""


def load(path: Path | str, overrides: Sequence[str] = ()) -> Loaded:
    """Read and check a configuration file.

    A relative `model.path`, `learner.teacher`, model of a scorer, `learner.ptx_data` or file in `data.task` and
    `eval.sets` is looked for in the current directory first, then beside the configuration file; if it is in neither,
    it is left as written. The same holds for the module of an import path, to which the folder that holds it is added.

    Args:
        path: The YAML file.
        overrides: `KEY=VALUE` with a dotted key and a YAML value, for example `scheduler.max_staleness=null`. They go
            through the same checks as the file. A number selects an item of a list: `reward.functions.0.weight=2`.

    Raises:
        ConfigError: The file cannot be read, or there are mistakes in it or in the overrides; it carries all of them.

    Example:
        >>> load("configs/quickstart.yaml", ["run.seed=7"]).origins["run.seed"]
        'override'
    """
    path = Path(path)
    return _check(parse(_read(path), name=str(path)), path, overrides)


def load_run(run_dir: Path | str, overrides: Sequence[str] = ()) -> Loaded:
    """Read the configuration that a run directory holds; keys that were called otherwise then have today's names.

    What earlier releases ran and today's refuse to start is taken.

    Raises:
        ConfigError: as in `load`.
    """
    path = Path(run_dir) / "config.yaml"
    document = parse(_read(path), name=str(path))
    if not isinstance(document.data, dict):
        message = "it holds no settings: it was emptied or cut short"
        hint = "the run's own `pmdflow up` writes it again; to read the run alone, bring it back from a copy"
        raise ConfigError([ConfigIssue(message=message, place=Place(source=str(path)), hint=hint)])
    for old, new in rename_keys(document.data).items():
        document.move_places(tuple(old.split(".")), tuple(new.split(".")))
    return _check(document, path, overrides, context=RECORDED)


def _check(document: Document, path: Path, overrides: Sequence[str], *, context: str | None = None) -> Loaded:
    issues = [*document.duplicates, *filter(None, map(document.override, overrides))]
    _find_paths(document.data, beside=path.parent)
    _find_modules(document.data, beside=path.parent)
    try:
        config = Config.model_validate({} if document.data is None else document.data, strict=True, context=context)
    except ValidationError as error:
        issues += explain(
            error,
            place_of_key=document.place_of_key,
            place_of_value=document.place_of_value,
            is_written=document.values.__contains__,
        )
    if issues:
        raise ConfigError(issues)
    return Loaded(
        config=config,
        origins=_origins(config, document),
        path=path,
        overrides=tuple(overrides),
        place=document.place_of_value,
    )


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """List the settings in dumped configuration data; a list of plain values is one setting."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def _read(path: Path) -> str:
    place = Place(source=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        near = did_you_mean(path.name, sorted(file.name for file in path.parent.glob("*.yaml")))
        message = f"cannot read it: {error.strerror or error}"
        raise ConfigError([ConfigIssue(message=message, place=place, hint=near)]) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start})"
        raise ConfigError([ConfigIssue(message=message, place=place, hint="save the file as UTF-8")]) from None


def _find_paths(data: Any, *, beside: Path) -> None:
    for settings, key in _path_settings(data):
        written = settings.get(key)
        if isinstance(written, str) and (key in ("path", "teacher", "model") or written.endswith(FILE_SUFFIXES)):
            found = Path(written).expanduser()
            if not found.exists() and (beside / found).exists():
                found = beside / found
            if found.exists():
                settings[key] = str(found)
    agents = data.get("agents") if isinstance(data, dict) else None
    if isinstance(agents, dict) and isinstance(agents.get("command"), list):
        agents["command"] = [_file(word, beside) for word in agents["command"]]  # it has a directory of its own


def _file(word: Any, beside: Path) -> Any:
    """A word of a command: whole, where it names a file here or beside the configuration, else as it is."""
    places = (Path(), beside) if isinstance(word, str) and word else ()
    return next((str((place / word).absolute()) for place in places if (place / word).is_file()), word)


def _find_modules(data: Any, *, beside: Path) -> None:
    for settings, key in _import_settings(data):
        written = settings.get(key)
        if isinstance(written, str) and re.fullmatch(IMPORT_PATH, written):
            settings[key] = locate(written, [Path(), beside])


def _path_settings(data: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Mappings in which a key may name a file or folder, as far as the file's shape can be made out."""
    sections = data if isinstance(data, dict) else {}
    learner = sections.get("learner")
    named = [(sections.get("model"), "path"), (learner, "ptx_data"), (learner, "teacher")]
    named += [(source, "task") for source in _sources(sections)]
    named += [(scorer, "model") for scorer in _scorers(learner)]
    yield from ((settings, key) for settings, key in named if isinstance(settings, dict))


def _import_settings(data: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Mappings in which a key may be an import path, as far as the file's shape can be made out."""
    sections = data if isinstance(data, dict) else {}
    reward = sections.get("reward")
    lists = [reward.get(key) if isinstance(reward, dict) else None for key in ("functions", "group")]
    lists += [source.get("reward") for source in _sources(sections)]
    functions = [item for functions in lists if isinstance(functions, list) for item in functions]
    named = [(item, "function") for item in functions]
    named += [
        (sections.get("environment"), "factory"),
        (sections.get("agents"), "program"),
        (sections.get("learner"), "algorithm"),
    ]
    named.append((sections.get("scheduler"), "policy"))
    named += [(scorer, "use") for scorer in _scorers(sections.get("learner"))]
    yield from ((settings, key) for settings, key in named if isinstance(settings, dict))


def _scorers(learner: Any) -> list[Any]:
    scorers = learner.get("scorers") if isinstance(learner, dict) else None
    return list(scorers.values()) if isinstance(scorers, dict) else []


def _sources(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """What may be a source of prompts: `data`, each part of its mixture, each evaluation set."""
    source, evaluation = sections.get("data"), sections.get("eval")
    mixture = source.get("task") if isinstance(source, dict) else None
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    found = [source, *(mixture if isinstance(mixture, list) else ())]
    found += sets.values() if isinstance(sets, dict) else ()
    return [each for each in found if isinstance(each, dict)]


def _origins(config: Config, document: Document) -> dict[str, str]:
    origins = {}
    for path, _ in leaves(config.model_dump()):
        place = document.values.get(path)
        if place is None:
            origins[dotted(path)] = "default"
        else:
            origins[dotted(path)] = "override" if place.is_override else f"{Path(place.source).name}:{place.line}"
    return origins
