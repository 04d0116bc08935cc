"""Runs a Python function as an agent program: `python -m pmdflow.agents.function package.module:name`."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from pmdflow.config.imports import load_named


def main() -> None:
    """Call it with the task of standard input; what it returns is its reward."""
    function = load_named(sys.argv[1])
    task = json.load(sys.stdin)
    task |= {"base_url": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    wanted = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted)
    given = {name: value for name, value in task.items() if takes_all or any(name == p.name for p in wanted)}
    result: Any = function(**given)
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    if result is not None:
        Path(os.environ["PMDFLOW_REWARD_FILE"]).write_text(json.dumps(result))


async def _awaited(result: Any) -> Any:
    return await result


if __name__ == "__main__":
    main()
