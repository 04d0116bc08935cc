"""What the configuration says of agent programs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.section import PositiveFloat, PositiveInt, Section


class AgentsConfig(Section):
    """Programs that speak to an OpenAI endpoint, one started for each trajectory; the run's engines answer."""

    program: str | None = Field(default=None, pattern=IMPORT_PATH)
    """Import path `package.module:name` of a function that is one episode. It runs in a process of its own and is given
    those of `prompt`, `metadata`, `messages`, `base_url`, `api_key`, `model` and `args` that it has parameters for."""
    command: Annotated[list[str], Field(min_length=1)] | None = None
    """Or a command and its arguments, which finds the task as JSON on standard input and the endpoint in
    `OPENAI_BASE_URL` and `OPENAI_API_KEY`."""
    args: dict[str, Any] = {}
    """For the program; `${NAME}` is a variable of the environment, which is shown by its name everywhere."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of one program; it is killed then, with all that it started, and the trajectory ends where it is."""
    sandbox: bool = False
    """Run it confined, as programs of code rewards are: no network but the gateway, no files but Python's packages and
    those that `command` names, no variables but the task's; its working directory is in memory."""
    concurrency: PositiveInt = 64
    """Programs that run at a time, over all rollout actors; engine slots count their requests. At most as many more
    wait for a lease where the budget is spent or new weights come; of more, those that wait longest are ended, and
    started again later."""
    history: Literal["branch", "strict"] = "branch"
    """What a request does whose history is not the one before it and more: begin a branch of the episode, or end it."""
    sampling: Literal["override", "refuse"] = "override"
    """What a request does that asks for another temperature or support than the run's: get the run's, which the answer
    says, or be refused."""
    tools: Literal["auto", "hermes", "llama", "kimi", "json"] = "auto"
    """How the model writes tool calls; `auto` knows it by the chat template."""
    max_failures_in_a_row: PositiveInt = 100
    """Programs of one rollout actor that end without a request between them, after which the run ends with the first
    one's message."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that the gateway serves at. On a cluster, one that every machine reaches: it is plain HTTP, and each
    program's key is its only credential."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the gateway; 0 takes a free one."""

    @model_validator(mode="after")
    def _is_one(self) -> AgentsConfig:
        if (self.program is None) == (self.command is None):
            raise ValueError("name either agents.program or agents.command")
        return self
