"""Settings of prompt sources that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmdflow.config.sources import GYM_PREFIX, HUB_PREFIX

if TYPE_CHECKING:
    from pmdflow.config.schema import EvalConfig
    from pmdflow.config.sources import DataConfig, SourceSettings


def source_problems(data: DataConfig, evaluation: EvalConfig) -> Iterator[str]:
    """Each as `key ...: why; remedy`."""
    if isinstance(data.task, str):
        yield from _settings_problems("data", data.task, data)
    else:
        for name in ("args", "config", "split", "columns"):
            if name in data.model_fields_set and getattr(data, name) != type(data).model_fields[name].default:
                yield f"data.{name} is set while data.task is a mixture: it belongs to one source; move it there"
        for index, source in enumerate(data.task):
            yield from _settings_problems(f"data.task[{index}]", source.task, source)
    labels = Counter(source.label for source in data.sources)
    for label in (label for label, count in labels.items() if count > 1):
        yield (
            f"data.task has {labels[label]} sources called {label}: their prompts could not be told apart; give each "
            "its own name"
        )
    yield from _curriculum_problems(data)
    for name, given in evaluation.sets.items():
        yield from _settings_problems(f"eval.sets.{name}", given.task, given)
        if given.prompts is None and given.task.startswith(GYM_PREFIX):
            yield f"eval.sets.{name}.prompts is null, but {given.task} never ends; say how many"
        if any(k > given.samples for k in given.k):
            yield (
                f"eval.sets.{name}.k is {given.k}, but eval.sets.{name}.samples is {given.samples}: pass@k needs k "
                "attempts at least; raise samples"
            )


def _curriculum_problems(data: DataConfig) -> Iterator[str]:
    curriculum = data.curriculum
    if curriculum is None:
        return
    hard = curriculum.hard_below is not None or bool(curriculum.hard_sources)
    if hard and curriculum.switch_at is None:
        yield "data.curriculum.switch_at is null, but it says what is hard: nothing would switch; say when"
    if curriculum.switch_at is not None and not hard:
        yield (
            f"data.curriculum.switch_at is {curriculum.switch_at}, but nothing says what is hard; set hard_below or "
            "hard_sources"
        )
    if curriculum.priority == "uniform" and curriculum.switch_at is None:
        yield "data.curriculum.priority is uniform and nothing switches: it changes nothing; set it to failure"
    labels = [source.label for source in data.sources]
    if unknown := sorted(set(curriculum.hard_sources) - set(labels)):
        yield f"data.curriculum.hard_sources names {unknown}, but the sources are {labels}; name some of these"
    if len(labels) == 1 and data.sources[0].task.startswith(GYM_PREFIX):
        yield (
            f"data.curriculum is set while data.task is {data.sources[0].task} alone, whose prompts share one rate of "
            "success; make data.task a list with a source for each difficulty"
        )


def _settings_problems(key: str, task: str, settings: SourceSettings) -> Iterator[str]:
    """Settings of another kind of source than `task` is."""
    gym, hub = task.startswith(GYM_PREFIX), task.startswith(HUB_PREFIX)
    if settings.args and not gym:
        yield f"{key}.args is {settings.args}: only reasoning_gym tasks take arguments; remove it"
    if settings.config is not None and not hub:
        yield f"{key}.config is {settings.config!r}: only Hub data sets (hf:) have configurations; remove it"
    if settings.split != type(settings).model_fields["split"].default and not hub:
        yield f"{key}.split is {settings.split!r}: only Hub data sets (hf:) have splits; remove it"
    given = settings.columns.model_dump(exclude_none=True)
    if given and gym:
        yield f"{key}.columns is {given}: reasoning_gym tasks have no columns; remove it"
