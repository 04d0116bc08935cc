"""The program of `agent.yaml`: any client of an OpenAI endpoint can be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openai import OpenAI


def solve(prompt: str, metadata: Mapping[str, Any], model: str) -> float:
    """Ask, ask to check, and be rewarded if the answer is in what was said last."""
    client = OpenAI()
    messages: list[Any] = [{"role": "user", "content": prompt}]
    first = client.chat.completions.create(model=model, messages=messages, max_tokens=512).choices[0].message
    messages += [first, {"role": "user", "content": "Check it, and say the result alone."}]
    last = client.chat.completions.create(model=model, messages=messages, max_tokens=512).choices[0].message
    return float(str(metadata["answer"]) in (last.content or ""))
