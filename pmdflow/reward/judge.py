"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from openai import AsyncOpenAI, OpenAIError

TEMPLATE = """You grade an answer to a task. Judge whether it is correct and complete, whatever it says about itself.

<task>
{prompt}
</task>

<answer>
{completion}
</answer>

Explain in a few sentences, then end with one line: "score: N", where N is a number from 0 (useless) to 10 (perfect)."""
"""What the judge reads, unless `args` has another `template`."""
TIME_SHARE = 0.9
"""Share of `reward.timeout_s` in which the judge must have answered, so that what failed can be said."""
MAX_RETRIES = 100
"""More than fit into any time limit: the client waits 0.5 s and more, twice as long each time, up to 8 s."""
CACHED = 4096
"""Scores that each subprocess remembers, in memory alone: the store keeps every score of a run durably."""

_SCORE = re.compile(
    r"^\W*(?:\w+\s+){0,3}score\W*?[:=\uff1a]\W{0,5}?(-?(?:\d*\.)?\d+)(?![\w,]*\d)", re.IGNORECASE | re.MULTILINE
)
"""A line that says it: "score (0-10): 8" says no score that could be told from its scale, and is refused."""
_FIELD = re.compile(r"\{(\w+)\}")


async def score(
    *,
    prompt: str,
    completion: str,
    metadata: Mapping[str, Any],
    timeout_s: float,
    model: str,
    base_url: str | None = None,
    template: str = TEMPLATE,
    max_score: float = 10.0,
    api_key_env: str = "OPENAI_API_KEY",
    request: Mapping[str, Any] | None = None,
) -> float:
    """The judge's score as a share of `max_score`, from 0 to 1.

    Up to 64 requests of a subprocess are under way at once. What passes (no connection, 408, 409, 429, 500 and above)
    is tried again until the time is over, as late as the endpoint asks for. What was judged is remembered.

    Args:
        prompt: Like `completion` and the keys of `metadata`, it may stand in the template.
        completion: Generated text.
        metadata: The prompt's.
        timeout_s: `reward.timeout_s`; 60 and more suit a judge.
        model: Name of the judge.
        base_url: Address such as `http://judge:8000/v1`; None is OpenAI's, or `OPENAI_BASE_URL`.
        template: Text with `{prompt}` and the like; it must ask for a last line `score: N`.
        max_score: Best score that it speaks of.
        api_key_env: Environment variable with the key, on each node; local endpoints need none.
        request: Further parameters, such as `{temperature: 0}`.

    Raises:
        RuntimeError: the endpoint refused, or its reply has no score from 0 to `max_score`.
        TimeoutError: it did not answer in time, retries included.
    """
    fields = {**metadata, "prompt": prompt, "completion": completion}
    message = {"role": "user", "content": _FIELD.sub(lambda field: str(fields.get(field[1], field[0])), template)}
    body = {**(request or {}), "model": model, "messages": [message]}
    limit_s = TIME_SHARE * timeout_s
    question = _Question(body=body, base_url=base_url, api_key_env=api_key_env, limit_s=limit_s, max_score=max_score)
    return await _benches.setdefault(asyncio.get_running_loop(), _Bench()).score(question)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    body: Mapping[str, Any]
    base_url: str | None
    api_key_env: str
    limit_s: float
    max_score: float

    @property
    def key(self) -> bytes:
        """The same for questions with the same answer."""
        content = json.dumps([self.base_url, self.max_score, self.body], sort_keys=True)
        return hashlib.sha256(content.encode()).digest()


class _Bench:
    """The clients and the remembered scores of one event loop."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str | None, str], AsyncOpenAI] = {}
        self._scores: OrderedDict[bytes, asyncio.Task[float]] = OrderedDict()

    async def score(self, question: _Question) -> float:
        """Judge once what is asked often, also at one time."""
        key = question.key
        if key not in self._scores:
            task = asyncio.create_task(self._judge(question))
            self._scores[key] = task
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            if len(self._scores) > CACHED:
                self._scores.popitem(last=False)
        self._scores.move_to_end(key)
        return await asyncio.shield(self._scores[key])  # others may wait for it, or ask again

    async def _judge(self, question: _Question) -> float:
        reply = await self._ask(question)
        found = _SCORE.findall(reply)
        if not found or not 0.0 <= float(found[-1]) <= question.max_score:
            raise RuntimeError(f"the reply ends with no score from 0 to {question.max_score:g}: {reply[-200:]!r}")
        return float(found[-1]) / question.max_score

    async def _ask(self, question: _Question) -> str:
        client, api_key = self._client(question)
        try:
            async with asyncio.timeout(question.limit_s):
                answer = await client.chat.completions.create(**question.body)
        except TimeoutError as error:
            raise TimeoutError(
                f"{client.base_url} did not answer within {question.limit_s:g} s, retries included"
            ) from error
        except OpenAIError as error:
            said = str(error)
            if api_key:
                said = said.replace(api_key, "***")  # some endpoints repeat it
            raise RuntimeError(
                f"{client.base_url} refused (its key is in {question.api_key_env}): {said:.500}"
            ) from None
        return answer.choices[0].message.content or ""

    def _client(self, question: _Question) -> tuple[AsyncOpenAI, str]:
        key, api_key = (question.base_url, question.api_key_env), os.environ.get(question.api_key_env, "")
        if key not in self._clients:
            self._clients[key] = AsyncOpenAI(
                base_url=question.base_url, api_key=api_key or "none", max_retries=MAX_RETRIES, timeout=question.limit_s
            )
        return self._clients[key], api_key

    def _forget_failure(self, key: bytes, done: asyncio.Task[float]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._scores.pop(key, None)


_benches: WeakKeyDictionary[asyncio.AbstractEventLoop, _Bench] = WeakKeyDictionary()
