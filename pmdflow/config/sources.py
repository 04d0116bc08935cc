"""Where prompts come from, in a configuration: one source, a part of a mixture, an evaluation set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.section import PositiveFloat, PositiveInt, Section

GYM_PREFIX, HUB_PREFIX = "reasoning_gym/", "hf:"
"""What tasks of reasoning-gym and of the Hub begin with; any other is a file."""
FILE_SUFFIXES = (".jsonl", ".parquet")
TASK = r"^reasoning_gym/\w+$|^hf:[\w.-]+/[\w.-]+(@\S+)?$|\.(jsonl|parquet)$"
"""What one source of prompts may be."""
NAME = r"^[A-Za-z0-9][\w.-]*$"
"""Names of sources and evaluation sets."""
ONE_SOURCE, MIXTURE = "<one source>", "<mixture>"
"""Which form of `data.task` an error is about; part of pydantic's path, but no key."""
SOURCE_KEY, EVAL_PREFIX = "prompt_source", "eval/"
"""Metadata key that tells prompts of a mixture and of evaluation sets apart, and what is before the name of a set."""
WORDING = ("system", "suffix", "template_args")
"""Settings of `data` that hold for every source of a mixture and every evaluation set that does not have its own."""
INHERITED = (*WORDING, "reward")
"""Settings of `data` that hold for every source of a mixture."""


class RewardFunctionConfig(Section):
    """One weighted reward function."""

    function: str = Field(pattern=IMPORT_PATH)
    """Import path `package.module:name`, of a module in the current directory, beside this file or installed; a run
    records the folder that it was found in. Its parameters name what it gets: `completion`, `raw_completion`,
    `token_ids`, `stop`, `prompt`, `messages`, `metadata`, `rewards`, `timeout_s`. Shipped are
    `pmdflow.reward.math:score`, `.code:score`, `.tool_call:score`, `.judge:score` and `.reasoning_gym:score`."""
    args: dict[str, Any] = {}
    """Its other arguments, such as the model of a judge; `${NAME}` is a variable of the environment, such as a key,
    which is shown by its name everywhere."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of its value in the reward."""


class ColumnsConfig(Section):
    """Which columns of a file or Hub data set hold what; a dot reaches into one: `reward_model.ground_truth`."""

    prompt: str | None = None
    """A text, or chat messages with `role` and `content`; null is `prompt`, or `messages` where there is none."""
    answer: str | None = None
    """What reward functions find as `answer` in their metadata; null leaves the columns their own names."""
    tools: str | None = None
    """JSON schemas of the tools that the chat template shows; null is `tools`, if there is one."""
    metadata: list[str] | None = None
    """Columns that reward functions find in their metadata; null is all that are left."""


class SourceSettings(Section):
    """How one source of prompts is read and worded."""

    args: dict[str, Any] = {}
    """Arguments of the reasoning-gym data set."""
    config: str | None = None
    """Configuration (subset) of a Hub data set; null is its only or default one."""
    split: str = "train"
    """Split of a Hub data set."""
    columns: ColumnsConfig = ColumnsConfig()
    """Where a file or Hub data set keeps prompt, answer and the rest."""
    system: str | None = None
    """System message before prompts that have none of their own; needs a model with a chat template."""
    suffix: str | None = None
    """Text after the user's last message, for example how to give the answer."""
    template_args: dict[str, Any] | None = None
    """Arguments of the model's chat template, for example `{enable_thinking: false}`."""
    reward: Annotated[list[RewardFunctionConfig], Field(min_length=1)] | None = None
    """Reward functions of this source's prompts; null is `reward.functions`."""


class SourceConfig(SourceSettings):
    """One source of a mixture."""

    task: str = Field(pattern=TASK)
    """What `data.task` takes."""
    name: str | None = Field(default=None, pattern=NAME)
    """Name in prompt ids and in the metadata key `prompt_source`; null is the last part of `task`."""
    weight: PositiveFloat = 1.0
    """Share of the draws, relative to the other sources; it is rounded to 1024ths of all draws, at least one."""

    @property
    def label(self) -> str:
        """`name`, or what the task is called."""
        if self.name is not None:
            return self.name
        return self.task.partition("@")[0].rpartition("/")[2].removesuffix(".jsonl").removesuffix(".parquet")


class CurriculumConfig(Section):
    """Training prompts by how well earlier ones were answered, instead of each once an epoch (Kimi k1.5, 2.3.4).

    A prompt has a rate of success, a moving average over its groups; those of a reasoning-gym source share one, so make
    each difficulty a source of its own. One prompt may be drawn several times before it is trained.
    """

    priority: Literal["failure", "uniform"] = "failure"
    """`failure`: in proportion to 1 - rate of success; `uniform`: each once an epoch until `switch_at`, then as likely
    as any other."""
    decay: float = Field(default=0.5, ge=0, lt=1)
    """Share of its old value that a rate keeps at each of its groups."""
    success_reward: float = Field(default=1.0, allow_inf_nan=False)
    """Least reward of an attempt that counts as a success."""
    switch_at: PositiveInt | None = None
    """Iteration from which only hard prompts are drawn, as `hard_below` or `hard_sources` say; null: never."""
    hard_below: float | None = Field(default=None, gt=0, le=1)
    """Rate of success below which a prompt is hard; one that was never tried is."""
    hard_sources: list[str] = []
    """Names of the sources of `data.task` whose prompts are hard."""


class DataConfig(SourceSettings):
    """Prompts."""

    task: Annotated[
        Annotated[str, Field(pattern=TASK), Tag(ONE_SOURCE)]
        | Annotated[list[SourceConfig], Field(min_length=1, max_length=256), Tag(MIXTURE)],
        Discriminator(lambda value: MIXTURE if isinstance(value, list | tuple) else ONE_SOURCE),
    ]
    """`reasoning_gym/NAME`; a `.jsonl` or `.parquet` file (found as `model.path` is) with `prompt` and metadata in each
    row; a data set of the Hub, `hf:org/name` or `hf:org/name@revision`, of which `.parquet` and `.jsonl` files are
    read; or a list of such sources, a mixture."""
    group_size: int = Field(default=8, ge=1, le=65_536)
    """Trajectories for each prompt (k)."""
    max_tokens: PositiveInt
    """Most generated tokens of one trajectory, over all its segments."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest prompt; a `vllm` engine is started for sequences of it and `max_tokens` together. Where it is not given,
    it is at most what the model's positions leave beside `max_tokens`."""
    curriculum: CurriculumConfig | None = None
    """How prompts are drawn; null: each source in epochs, in the proportion of the weights."""
    skip_long_prompts: bool = False
    """Leave longer prompts of files and Hub data sets out, and say how many; otherwise they are refused before the
    start. A reasoning-gym data set goes on to its next entry either way."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All of them; those of a mixture take `system` and the like from here if they have none of their own."""
        shared = {name: getattr(self, name) for name in INHERITED}
        if isinstance(self.task, str):
            own = {name: getattr(self, name) for name in SourceSettings.model_fields}
            return (SourceConfig(task=self.task, **own),)
        return tuple(
            source.model_copy(update={name: value for name, value in shared.items() if getattr(source, name) is None})
            for source in self.task
        )


class EvalSetConfig(SourceSettings):
    """A named evaluation set; its prompts are never trained on.

    They are worded as `data` says (`system`, `suffix`, `template_args`) where it does not say otherwise.
    """

    task: str = Field(pattern=TASK)
    """What `data.task` takes, but a mixture."""
    split: str = "test"
    """Split of a Hub data set."""
    prompts: PositiveInt | None = None
    """First prompts of it; null is all. A reasoning-gym task needs a number."""
    samples: PositiveInt = 1
    """Attempts at each prompt: avg@n."""
    k: list[PositiveInt] = []
    """k of each pass@k, at most `samples`; empty takes the powers of two."""
    pass_reward: float = Field(default=1.0, allow_inf_nan=False)
    """Least reward of an attempt that counts for pass@k."""
    sampling: dict[str, Any] = {}
    """What differs from the sampling of `eval`: `temperature`, `top_p`, `max_tokens`, `min_tokens`, `stop`,
    `stop_token_ids`."""
