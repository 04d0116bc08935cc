"""Environments of the `verifiers` library, unmodified: the model sits where their client does.

They need the extra: `uv sync --extra verifiers`. The prompts of one are written as a task file by
`python -m pmdflow.environments.verifiers NAME > rows.jsonl`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pmdflow.environments.protocol import Observation

try:
    import verifiers as vf
    from verifiers.types import Response, ResponseMessage
except ImportError as error:
    raise ImportError(f"the library verifiers is needed: run `uv sync --extra verifiers` ({error})") from error


class _Seat(vf.Client):  # type: ignore[misc]
    """Asks for turns, and hands over what comes of them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.asked: asyncio.Queue[Sequence[Any]] = asyncio.Queue()
        self.said: asyncio.Queue[str] = asyncio.Queue()

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        """The model's turn."""
        if tools:
            raise ValueError("its tools are called in the format of an API, not in the model's text: use `agents`")
        await self.asked.put(prompt)
        message = ResponseMessage(content=await self.said.get(), finish_reason="stop", is_truncated=False)
        return Response(id="", created=0, model=model, message=message)

    async def close(self) -> None:
        """There is nothing."""

    def setup_client(self, config: Any) -> Any:
        """There is none."""

    to_native_tool = to_native_prompt = get_native_response = raise_from_native_response = from_native_response = close


class Verifiers:
    """An environment of `verifiers` by the name of its package, or the object itself.

    Its rubric is run when it ends: the reward is `pmdflow.reward.said:score`, each reward function a metric. A prompt's
    row is `messages`, `answer` and `info`; of one without `info` all its metadata are.
    """

    def __init__(
        self, env: str | vf.Environment, args: Mapping[str, Any] | None = None, *, as_text: bool = False
    ) -> None:
        """Load it, once in a process.

        Args:
            env: Such as `wordle`, of an installed package.
            args: For its `load_environment`.
            as_text: What it says is appended as it is, for a model without a chat template.
        """
        self._env = _load(env, json.dumps(args or {}, sort_keys=True)) if isinstance(env, str) else env
        self._as_text = as_text
        self._seat = _Seat()
        self._seen = 0
        """Messages of the conversation that the model knows."""
        self._rollout: asyncio.Task[Any] | None = None

    async def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin, up to the first turn that it asks for."""
        messages = metadata.get("messages") or [{"role": "user", "content": prompt}]
        row = {
            "prompt": list(messages),
            "answer": str(metadata.get("answer", "")),
            "info": dict(metadata.get("info") or metadata),
            "example_id": 0,
        }
        self._seen = len(messages)
        self._rollout = asyncio.create_task(self._env.run_rollout(row, self._seat, "policy", {}))
        return await self._next()

    async def step(self, *, key: str, action: str) -> Observation:
        """Give it the model's turn, and wait until it asks for another or has a reward."""
        await self._seat.said.put(action)
        self._seen += 1
        return await self._next()

    async def close(self) -> None:
        """Let it clean up."""
        if self._rollout is not None:
            self._rollout.cancel()
            await asyncio.wait([self._rollout])

    async def _next(self) -> Observation:
        assert self._rollout is not None
        asked = asyncio.ensure_future(self._seat.asked.get())
        await asyncio.wait([asked, self._rollout], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            messages = [dict(_plain(message)) for message in asked.result()[self._seen :]]
            self._seen += len(messages)
            if self._as_text:
                return Observation(text="".join(str(message.get("content") or "") for message in messages))
            return Observation(messages=messages)
        asked.cancel()
        output = self._rollout.result()
        if output.get("error"):
            raise RuntimeError(f"the environment failed: {output['error']!r:.300}")
        metrics = {str(name): float(value) for name, value in (output.get("metrics") or {}).items() if name != "reward"}
        return Observation(done=True, reward=float(output["reward"]), metrics=metrics)


def _plain(message: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = message if isinstance(message, Mapping) else message.model_dump(exclude_none=True)
    return plain


@lru_cache(maxsize=8)
def _load(name: str, args: str) -> vf.Environment:
    return vf.load_environment(name, **json.loads(args))


def main() -> None:
    """Write the prompts of an environment, with its arguments in JSON behind its name."""
    name, args = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "{}"
    for row in _load(name, args).get_dataset():
        line = {"messages": row["prompt"], "answer": row.get("answer", ""), "info": row.get("info") or {}}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
