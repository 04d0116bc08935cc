"""The key-and-door world as an environment of the `verifiers` library, which `verifiers.yaml` trains in."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset

from pmdflow.environments.key_and_door import KeyAndDoor
from pmdflow.environments.verifiers import Verifiers


class World(vf.MultiTurnEnv):
    """As anybody writes one: a state, an answer to each message, and a rubric."""

    async def setup_state(self, state: vf.State) -> vf.State:
        """Begin in the first room, which the model sees."""
        state["world"] = KeyAndDoor()
        first = state["world"].reset(key="", prompt="", metadata=state["info"])
        state["prompt"] = [*state["prompt"], vf.UserMessage(content=first.text)]
        return state

    async def env_response(self, messages: vf.Messages, state: vf.State, **_: Any) -> vf.Messages:
        """Answer the last message."""
        said = state["world"].step(key="", action=str(messages[-1].content))
        state["opened"] = said.reward or 0.0
        answer = [vf.UserMessage(content=said.text)]
        if said.done:
            state["final_env_response"] = answer
        return answer


async def opened(state: vf.State) -> float:
    """Whether the door was opened."""
    return float(state.get("opened", 0.0))


def load_environment() -> vf.Environment:
    """What `verifiers` looks for in a package."""
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "-"}], "answer": ""}])
    return World(dataset=rows, rubric=vf.Rubric(funcs=[opened], weights=[1.0]), max_turns=12)


ENVIRONMENT = load_environment()


def make() -> Verifiers:
    """The environment of one trajectory; of an installed package it is `Verifiers("NAME")`."""
    return Verifiers(ENVIRONMENT, as_text=True)
