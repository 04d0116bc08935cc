"""How one prompt is sampled: the settings of the run, and what its own metadata says under the key `sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = "sampling"
"""Metadata key of a prompt's overrides, for example `{"sampling": {"temperature": 0.7, "stop": ["</answer>"]}}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingControl:
    """Everything that decides how one trajectory is sampled and where it ends."""

    temperature: float
    """0 is greedy."""
    max_tokens: int
    """Most tokens of the whole trajectory."""
    min_tokens: int = 0
    """Generated tokens before which it cannot end, but by `max_tokens` or an environment."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end it; the token that completes one is its last."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end it, besides the model's end of sequence."""


class _Overrides(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None


def sampling_temperature(version: int, *, initial: float, final: float | None, iterations: int | None) -> float:
    """Temperature under a policy version: linear from `initial` at version 0 to `final` at version `iterations`.

    Without a schedule (`final` is None) it is `initial`. Version numbers run ahead of iterations after a resume, so
    the schedule then ends a little earlier.

    Source: arXiv:2507.20534 sec. 3.2 (high to low).
    """
    if final is None or iterations is None:
        return initial
    return initial + (final - initial) * min(version / iterations, 1.0)


def control_for(metadata: Mapping[str, Any], defaults: SamplingControl) -> SamplingControl:
    """The control of one prompt: `defaults`, and over them what its metadata says.

    `max_tokens` can only be lowered: the store keeps room for the default's. Lists replace those of the run.

    Raises:
        ValueError: unknown or impossible overrides, as `check_overrides` says.

    Example:
        >>> defaults = SamplingControl(temperature=1.0, max_tokens=512)
        >>> control_for({"sampling": {"temperature": 0.5, "max_tokens": 64}}, defaults).max_tokens
        64
    """
    given = _parse(metadata).model_dump(exclude_none=True)
    if "max_tokens" in given:
        given["max_tokens"] = min(given["max_tokens"], defaults.max_tokens)
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return replace(defaults, **(given | lists))


def check_overrides(metadata: Mapping[str, Any], *, training: bool) -> None:
    """Refuse overrides that cannot be sampled, or that training cannot use.

    The learner's log-probs are those of logits / temperature over the whole vocabulary. A nucleus (`top_p` < 1) or a
    masked end of sequence (`min_tokens`) draws from another support, so both are for evaluation only; greedy decoding
    has no log-probs at all.

    Raises:
        ValueError: names the override, its value and the remedy.
    """
    overrides = _parse(metadata)
    if not training:
        return
    refused = {
        "temperature": overrides.temperature == 0,
        "min_tokens": bool(overrides.min_tokens),
        "top_p": overrides.top_p is not None and overrides.top_p < 1,
    }
    for name in (name for name, is_refused in refused.items() if is_refused):
        raise ValueError(
            f"{KEY}.{name} is {getattr(overrides, name)}: the learner's log-probs are of the whole distribution, so it "
            "is for evaluation only; remove it from prompts that are trained on"
        )


def _parse(metadata: Mapping[str, Any]) -> _Overrides:
    if KEY not in metadata:
        return _Overrides()
    try:
        return _Overrides.model_validate(metadata[KEY])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([KEY, *map(str, first["loc"])])
        raise ValueError(
            f"{place} is {first['input']!r:.80}: {first['msg']}; {KEY} takes {', '.join(_Overrides.model_fields)}"
        ) from error
