"""What a reward function may be, and what it gets: the inputs that its signature names."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from pmdflow.config.imports import load_module, parts
from pmdflow.reward.judged import Judged

INPUTS: Mapping[str, str] = {
    "completion": "the generated text, and what an environment said, without special tokens",
    "raw_completion": "the same with special tokens, such as `<think>` and the markers of tool calls",
    "token_ids": "the ids of these tokens",
    "stop": "why it ended: `stop`, `length` or `repetition`",
    "prompt": "the text of the task, as in the data",
    "messages": "the conversation of the task, None where the data has none",
    "metadata": "every other key of the data",
    "rewards": "what its environment or agent program said of the episode, summed by name",
    "timeout_s": "`reward.timeout_s`",
}
"""What a reward function may ask for by the names of its parameters."""

Function = Callable[..., Any]
"""Keyword arguments to a number or `Judged`, a coroutine of one, or, if `batched`, to a list of them."""

_BATCH_SIZE = "pmdflow_batch_size"


def batched(*, size: int) -> Callable[[Function], Function]:
    """Have a reward function judge up to `size` completions in one call.

    Each input but `timeout_s` is then a list with one value a completion, and the answer is as many numbers, or
    `InvalidCompletion` in the place of one. How completions are put together is nobody's promise: a score may not
    depend on its companions. If a call raises, each completion is judged again by itself.

    Example:
        >>> @batched(size=32)
        ... def length(*, completion):
        ...     return [float(len(text)) for text in completion]
    """
    if size < 1:
        raise ValueError(f"batched(size={size}): a call takes at least one completion")

    def mark(function: Function) -> Function:
        setattr(function, _BATCH_SIZE, size)
        return function

    return mark


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A function with its settings and weight.

    Example:
        >>> def shout(*, completion):
        ...     return float(completion.isupper())
        >>> bind(shout, name="shout").inputs
        ('completion',)
    """

    name: str
    """That of its component."""
    weight: float
    inputs: tuple[str, ...]
    """Keys of `INPUTS` that it asks for."""
    is_concurrent: bool
    """A coroutine or `batched`: it wants many completions at once."""
    call: Function

    async def judge(self, inputs: Mapping[str, Any]) -> Judged:
        """Judge one completion.

        Raises:
            TypeError: the function did not return a number.
            ValueError: the number is not finite.
            Exception: whatever the function raises.
        """
        value = self.call(**{name: inputs[name] for name in self.inputs})
        if self.is_concurrent:
            value = await value
        elif inspect.iscoroutine(value):
            value.close()
            raise TypeError("returned an awaitable; declare the function with `async def`")
        if isinstance(value, Judged):
            return Judged(value=_finite(value.value), answer=value.answer)
        return Judged(value=_finite(value))


def bind(
    function: Function, *, name: str, weight: float = 1.0, args: Mapping[str, Any] | None = None
) -> RewardFunction:
    """Fix the settings `args` of a function, and read from its signature what else it asks for.

    Raises:
        ValueError: it has a parameter that is neither an input nor a setting, or lacks one of `args`.
    """
    args = dict(args or {})
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"it has no signature to read: {error}; wrap it in a function of your own") from error
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for setting in args:
        if setting in INPUTS:
            raise ValueError(f"args.{setting}: every function gets {setting} by itself; remove it from args")
        if setting not in parameters and not takes_all:
            raise ValueError(f"args.{setting}: it takes no such argument{_hint(setting, parameters)}")
    inputs = [parameter.name for parameter in parameters.values() if _is_input(parameter, args)]
    if takes_all:
        inputs = list(INPUTS)
    size: int | None = getattr(function, _BATCH_SIZE, None)
    is_coroutine = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    call: Function = _Batcher(function, args, size) if size else lambda **given: function(**given, **args)
    return RewardFunction(
        name=name, weight=weight, inputs=tuple(inputs), is_concurrent=bool(size or is_coroutine), call=call
    )


def load_function(path: str) -> Function:
    """Import `package.module:name`.

    Raises:
        ValueError: it cannot be imported, or is not callable.
    """
    _, module_name, name = parts(path)  # the configuration's schema sees to the form
    try:
        module = load_module(path)
    except Exception as error:
        raise ValueError(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    function: Function | None = getattr(module, name, None)
    if function is None:
        raise ValueError(f"module {module_name} has no {name!r}{_hint(name, vars(module))}")
    if not callable(function):
        raise ValueError(f"it is a {type(function).__name__}, not a function")
    return function


def _is_input(parameter: inspect.Parameter, args: Mapping[str, Any]) -> bool:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in args:
        return False
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ValueError(f"it takes {parameter.name!r} by position only; reward functions are called by keyword")
    if parameter.name not in INPUTS and parameter.default is parameter.empty:
        raise ValueError(
            f"it takes {parameter.name!r}, which is neither in args nor one of {', '.join(INPUTS)}"
            f"{_hint(parameter.name, INPUTS)}"
        )
    return parameter.name in INPUTS


def _hint(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _finite(value: object) -> float:
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"returned {value!r}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}, not a finite number")
    return number


class _Batcher:
    """Calls of one completion each, made into calls of many: those that wait when the event loop comes round."""

    def __init__(self, function: Function, args: Mapping[str, Any], size: int) -> None:
        self._function, self._args, self._size = function, args, size
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[Any]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        """The loop itself keeps only weak references."""

    async def __call__(self, **inputs: Any) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((inputs, future))
        if len(self._waiting) == 1:
            call = asyncio.create_task(self._call_all())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        return await future

    async def _call_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), self._size):
            await self._call(waiting[start : start + self._size])

    async def _call(self, batch: Sequence[tuple[dict[str, Any], asyncio.Future[Any]]]) -> None:
        try:
            values = await self._values([inputs for inputs, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                values = [error]
            else:
                for single in batch:
                    await self._call([single])
                return
        for (_, future), value in zip(batch, values, strict=True):
            if future.done():  # its time was over
                continue
            if isinstance(value, Exception):
                future.set_exception(value)
            else:
                future.set_result(value)

    async def _values(self, batch: Sequence[dict[str, Any]]) -> Sequence[Any]:
        lists = {name: [inputs[name] for inputs in batch] for name in batch[0] if name != "timeout_s"}
        shared = {name: batch[0][name] for name in batch[0] if name == "timeout_s"}
        values = self._function(**lists, **shared, **self._args)
        if inspect.isawaitable(values):
            values = await values
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(batch):
            raise TypeError(f"returned {values!r:.200}, not one number for each of {len(batch)} completions")
        return list(values)
