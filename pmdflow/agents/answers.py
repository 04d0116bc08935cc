"""The bodies of answers, in OpenAI's HTTP form. Every value follows from trajectory and position: replays are equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmdflow.agents.tools import Said


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One turn of the model."""

    said: Said
    tokens: Sequence[int]
    """All that was generated for it."""
    texts: Sequence[str]
    """Of each token; empty where nobody asked for log-probs."""
    logprobs: Sequence[float]
    versions: Sequence[int]
    """Policy version of each token."""
    finish: str


def chat_answer(id: str, model: str, choices: Sequence[Choice], *, prompt_tokens: int) -> dict[str, Any]:
    """An object `chat.completion`."""
    listed = [
        {
            "index": index,
            "message": choice.said.message,
            "finish_reason": "tool_calls" if choice.said.calls and choice.finish == "stop" else choice.finish,
            "logprobs": {"content": _chat_logprobs(choice)} if choice.texts else None,
        }
        for index, choice in enumerate(choices)
    ]
    return _answer(f"chatcmpl-{id}", "chat.completion", model, listed, choices, prompt_tokens)


def text_answer(id: str, model: str, choices: Sequence[Choice], *, prompt_tokens: int) -> dict[str, Any]:
    """An object `text_completion`."""
    listed = [
        {
            "index": index,
            "text": choice.said.text,
            "finish_reason": choice.finish,
            "logprobs": {"tokens": list(choice.texts), "token_logprobs": list(choice.logprobs)}
            if choice.texts
            else None,
        }
        for index, choice in enumerate(choices)
    ]
    return _answer(f"cmpl-{id}", "text_completion", model, listed, choices, prompt_tokens)


def chunks(answer: Mapping[str, Any], *, usage: bool) -> Iterator[dict[str, Any]]:
    """An answer as a stream gives it: what is durable, so each choice in one piece; `usage` adds a last chunk."""
    chat = answer["object"] == "chat.completion"
    head = {key: answer[key] for key in ("id", "created", "model", "pmdflow")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    for choice in answer["choices"]:
        if not chat:
            yield {**head, "choices": [choice]}
            continue
        delta = dict(choice["message"])
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        first = {"index": choice["index"], "delta": delta, "finish_reason": None, "logprobs": choice["logprobs"]}
        yield {**head, "choices": [first]}
        yield {**head, "choices": [{"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}]}
    if usage:
        yield {**head, "choices": [], "usage": answer["usage"]}


def error(message: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def _answer(
    id: str, kind: str, model: str, listed: list[dict[str, Any]], choices: Sequence[Choice], prompt_tokens: int
) -> dict[str, Any]:
    generated = sum(len(choice.tokens) for choice in choices)
    return {
        "id": id,
        "object": kind,
        "created": 0,
        "model": model,
        "choices": listed,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
        "pmdflow": {"versions": [_runs(choice.versions) for choice in choices]},
    }


def _runs(versions: Sequence[int]) -> list[list[int]]:
    """[policy version, tokens] of each run of equal versions."""
    runs: list[list[int]] = []
    for version in versions:
        if not runs or runs[-1][0] != version:
            runs.append([version, 0])
        runs[-1][1] += 1
    return runs


def _chat_logprobs(choice: Choice) -> list[dict[str, Any]]:
    return [
        {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        for text, logprob in zip(choice.texts, choice.logprobs, strict=True)
    ]
