"""Models and data sets as a person writes them become folders, files and commits: once, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmdflow.config.schema import Config, EvalConfig
from pmdflow.config.sources import FILE_SUFFIXES, HUB_PREFIX, DataConfig, SourceConfig
from pmdflow.data.fingerprint import fingerprint
from pmdflow.data.hub import ID, HubId, Kind, fetch_model, resolve
from pmdflow.data.mixture import MixedPrompts
from pmdflow.data.model_folder import check_folder, num_positions, read_config, read_json, weight_problems

ADAPTER_CONFIG = "adapter_config.json"
MERGED_FROM = "merged_from.json"
"""In a folder that an adapter was merged to: the `Inputs.model` that it was merged from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run is made from."""

    config: Config
    """`model.path` is a folder, files are absolute, Hub data sets are pinned to a commit."""
    model: dict[str, Any]
    """What the model is: its id and commit, or a digest of each file that is small."""
    pins: dict[str, str]
    """Commit of every Hub id, by how it was written: a resumed run takes these again."""
    base: Path
    """The folder at `config.model.path`; with an adapter, its base model."""
    adapter: Path | None = None
    """Folder with the adapter that is to be merged with `base` before there is a `config.model.path`."""
    has_weights: bool = True

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer the run trains with: an adapter may bring its own."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if self.adapter is not None and own else self.base

    def identity(self, prompts: MixedPrompts) -> dict[str, Any]:
        """What a resumed run must be given again, or its cursor would mean other prompts.

        Paths are left out, and what they hold is in; the limit of prompts may change where none is left out for it.
        """
        data, evaluation = self.config.data, self.config.eval
        free = set() if data.skip_long_prompts else {"max_prompt_tokens"}
        sets = {
            name: given.model_dump(mode="json", include={"args", "config", "split", "columns", "prompts"})
            for name, given in evaluation.sets.items()
        }
        return {
            "pins": self.pins,
            "model": self.model,
            "data": _without_paths(data.model_dump(mode="json", exclude=free)),
            "eval": {"prompts": evaluation.prompts, "sets": sets},
            "sources": prompts.identity,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A folder, and where it came from."""

    folder: Path
    hub: HubId | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        if self.hub is not None:
            return {"id": self.hub.name, "commit": self.hub.commit}
        return {"files": fingerprint(self.folder)}

    def fetch_weights(self) -> None:
        """Download what is missing of a Hub model."""
        if self.hub is not None:
            fetch_model(self.hub, weights=True)


@dataclass(slots=True)
class _Resolver:
    """Finds commits, known ones first."""

    pins: dict[str, str]
    used: dict[str, str] = field(default_factory=dict)

    def commit(self, text: str, *, kind: Kind, key: str) -> HubId:
        match = ID.fullmatch(text)
        if match is None:
            raise ValueError(f"{key} is {text!r}: there is no such folder, and it is no Hub id (org/name@revision)")
        written = f"{HUB_PREFIX}{text}" if kind == "dataset" else text
        if written in self.pins:
            found = HubId(name=match["name"], commit=self.pins[written], kind=kind)
        else:
            found = resolve(text, kind=kind, key=key)
        self.used[written] = found.commit
        return found


def resolve_inputs(
    config: Config, *, merged: Path, pins: Mapping[str, str] | None = None, weights: bool = True
) -> Inputs:
    """Find the model and the data sets, download what is not there, and refuse a model folder that cannot be trained.

    The small files of a Hub model are fetched and judged before its weights are.

    Args:
        config: As written.
        merged: Where a merged model is to be.
        pins: Commits that a run was begun with.
        weights: Also fetch the weights; without them, only what the small files say is checked.

    Raises:
        ValueError: something is missing, not whole, or cannot be trained; with the remedy.
    """
    resolver = _Resolver(dict(pins or {}))
    found = _find_model(config.model.path, resolver)
    adapter = None
    if (found.folder / ADAPTER_CONFIG).is_file() and not (found.folder / "config.json").is_file():
        adapter, found = found, _find_model(_base_model(found.folder), resolver)
    data = _fit_prompts(config.data, found.folder)
    check_folder(found.folder, data, weights=False)
    for part in filter(None, (found, adapter) if weights else ()):
        part.fetch_weights()
    has_weights = weights or found.hub is None or not any(weight_problems(found.folder))
    if has_weights:
        check_folder(found.folder, data)
    identity = found.identity if adapter is None else {"adapter": adapter.identity, "base": found.identity}
    learner = config.learner
    if learner.ptx_data is not None:
        learner = learner.model_copy(update={"ptx_data": str(Path(learner.ptx_data).absolute())})
    return Inputs(
        config=config.model_copy(
            update={
                "model": config.model.model_copy(update={"path": str(found.folder if adapter is None else merged)}),
                "data": data.model_copy(update={"task": _pin_tasks(data, resolver)}),
                "eval": _pin_sets(config.eval, resolver),
                "learner": learner,
            }
        ),
        model=identity,
        pins=resolver.used,
        base=found.folder,
        adapter=None if adapter is None else adapter.folder,
        has_weights=has_weights,
    )


def _find_model(text: str, resolver: _Resolver) -> _Model:
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _Model(folder=folder.absolute())
    hub = resolver.commit(text, kind="model", key="model.path")
    return _Model(folder=fetch_model(hub, weights=False), hub=hub)


def _base_model(adapter: Path) -> str:
    """What the adapter was trained on: a folder, beside the adapter too, or a Hub id."""
    settings = read_json(adapter / ADAPTER_CONFIG)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ValueError(f"model.path is {str(adapter)!r}: {ADAPTER_CONFIG} names no base_model_name_or_path; add it")
    if Path(base).is_dir() or not (adapter / base).is_dir():
        return f"{base}@{revision}" if revision and not Path(base).is_dir() else str(base)
    return str(adapter / base)


def _fit_prompts(data: DataConfig, folder: Path) -> DataConfig:
    """A prompt limit that nobody chose is what the model's positions leave, if that is less."""
    positions = num_positions(read_config(folder))
    if positions is None or "max_prompt_tokens" in data.model_fields_set or positions <= data.max_tokens:
        return data
    return data.model_copy(update={"max_prompt_tokens": min(data.max_prompt_tokens, positions - data.max_tokens)})


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one source or a mixture; its files are known by their content, its reward may change."""
    task = settings["task"]
    if isinstance(task, list):
        task = [_without_paths(source) for source in task]
    elif task.endswith(FILE_SUFFIXES):
        task = Path(task).name
    return {key: value for key, value in settings.items() if key != "reward"} | {"task": task}


def _pin_tasks(data: DataConfig, resolver: _Resolver) -> str | list[SourceConfig]:
    if isinstance(data.task, str):
        return _pin(data.task, resolver, key="data.task")
    return [
        source.model_copy(update={"task": _pin(source.task, resolver, key=f"data.task[{index}]"), "name": source.label})
        for index, source in enumerate(data.task)
    ]


def _pin_sets(evaluation: EvalConfig, resolver: _Resolver) -> EvalConfig:
    sets = {
        name: given.model_copy(update={"task": _pin(given.task, resolver, key=f"eval.sets.{name}.task")})
        for name, given in evaluation.sets.items()
    }
    return evaluation.model_copy(update={"sets": sets})


def _pin(task: str, resolver: _Resolver, *, key: str) -> str:
    if task.startswith(HUB_PREFIX):
        return f"{HUB_PREFIX}{resolver.commit(task.removeprefix(HUB_PREFIX), kind='dataset', key=key)}"
    return str(Path(task).expanduser().absolute()) if task.endswith(FILE_SUFFIXES) else task
