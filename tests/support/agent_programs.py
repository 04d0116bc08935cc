"""Agent programs as their authors write them: each an unmodified client of an OpenAI endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openai import OpenAI


def two_turns(prompt: str, metadata: Mapping[str, Any], model: str) -> float:
    """Ask, and ask whether it is sure; better the more digits the answers have."""
    client = OpenAI()
    messages: list[Any] = [{"role": "user", "content": prompt}]
    for question in ("sure?", None):
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=12)
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        if question is not None:
            messages.append({"role": "user", "content": question})
    print(json.dumps(messages))
    said = "".join(str(message["content"]) for message in messages if message["role"] == "assistant")
    return sum(letter.isdigit() for letter in said) / max(len(said), 1)


def long_talk(prompt: str, model: str) -> float:
    """Ask four times and judge it on the way; the same whenever it is started."""
    client = OpenAI(max_retries=20)
    messages: list[Any] = [{"role": "user", "content": prompt}]
    for question in ("sure?", "really?", "last word?", None):
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=40)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        if question is not None:
            client.post("/reward", body={f"said_{len(messages)}": 0.125}, cast_to=object)
            messages.append({"role": "user", "content": question})
    return 0.5 + len(str(messages)) % 2
