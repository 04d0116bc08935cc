"""An agent of smolagents, unmodified: it plans its calls of tools itself."""

from __future__ import annotations

import os

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def add(one: int, other: int) -> int:
    """Add two numbers.

    Args:
        one: The first.
        other: The second.
    """
    return one + other


def solve(prompt: str, model: str) -> float:
    """Let it try two steps; a tiny model calls nothing, so this only carries traffic."""
    served = OpenAIServerModel(
        model_id=model, api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"], max_tokens=24
    )
    agent = ToolCallingAgent(tools=[add], model=served, max_steps=2, verbosity_level=0)
    agent.prompt_templates["system_prompt"] = "Call a tool."  # its own has more tokens than the model has positions
    try:
        answer = agent.run(prompt)
    except Exception:  # what it makes of a tiny model's answers is its own affair
        return 0.0
    return float(str(answer).strip().isdigit())
