"""The configuration file's shape: one YAML file, unknown keys refused, every key documented.

`python -m pmdflow.config.schema` prints the JSON schema that `configs/schema.json` holds.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from pmdflow.config.agents import AgentsConfig
from pmdflow.config.combinations import combination_problems
from pmdflow.config.gpus import GPUS
from pmdflow.config.imports import IMPORT_PATH
from pmdflow.config.scheduling import SchedulerConfig
from pmdflow.config.scorers import ScorerConfig
from pmdflow.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from pmdflow.config.sequences import RolloutConfig
from pmdflow.config.sinks import MetricsConfig
from pmdflow.config.sources import EVAL_PREFIX, NAME, DataConfig, EvalSetConfig, RewardFunctionConfig

DEFAULT_SLOTS = 64
"""Sequences of an engine whose cache does not decide."""
RECORDED = "recorded"
"""Context of the validation of a configuration that a run directory holds."""
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class RunConfig(Section):
    """The run and its directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `dir`/`name`."""
    dir: str = "runs"
    """Where run directories are made."""
    iterations: PositiveInt
    """Iterations to train; raising it and running `up` again continues a finished run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of prompts, sampling and everything else."""
    drain_s: PositiveFloat = 25.0
    """Time that the drain may take which SIGTERM or SIGHUP asks for (SLURM and Kubernetes kill 30 s after SIGTERM);
    then the run stops at once. Ctrl-C and `pmdflow down` set no deadline."""


class ClusterConfig(Section):
    """Where the Ray actors run."""

    address: str = "local"
    """`local` starts Ray on this machine; otherwise the address of a running Ray cluster, or `auto`."""
    gpus: Annotated[str, Field(pattern=GPUS)] | None = None
    """GPUs that the plan reckons with, of all nodes together and by the memory of one, such as `8x80GiB`: to plan a
    run elsewhere, or a cluster. null: those of this machine. The run itself takes what Ray has."""
    roles: dict[Literal["learner", "rollout"], Annotated[str, Field(pattern=NAME)]] = {}
    """Nodes that learner ranks, or rollout actors, may be on: those that were started with this resource, such as
    `{learner: train}` and `ray start --resources='{"train": 1}'`. Without an entry: any."""
    colocate: bool = False
    """Every device has a rollout engine and a learner rank in turn: while one works, the other's memory is on the host.
    For models that do not fit beside themselves; wants `scheduler.lookahead: 0`, and as many actors as ranks."""
    env: dict[str, str] = {}
    """Environment variables of every worker process, such as `{NCCL_SOCKET_IFNAME: eth0, GLOO_SOCKET_IFNAME: eth0}`. On
    a cluster all get those of this process that begin with NCCL_, GLOO_, PYTORCH_, HF_, VLLM_, UCX_ or OMPI_, too."""


class ModelConfig(Section):
    """The language model."""

    path: str
    """Folder in Hugging Face format with weights and tokenizer, looked for here first, then beside this file; or a
    model of the Hub, `org/name` or `org/name@revision`, downloaded once into the cache of `HF_HOME` (which every
    machine of a cluster must see). A LoRA adapter is merged with its base model into the run directory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of rollout and learner; master weights are float32. `auto` is bfloat16 on GPUs, else float32."""

    @property
    def compute(self) -> Literal["float32", "bfloat16"]:
        """`dtype`, once `auto` is settled."""
        assert self.dtype != "auto", "settle comes first"
        return self.dtype


class EvalConfig(Section):
    """Evaluation on held-out prompts, outside ledger and budget."""

    prompts: NonNegativeInt = 128
    """Held-out prompts, never trained on, of each source of a mixture by its weight; 0 holds none out."""
    sets: dict[Annotated[str, Field(pattern=NAME)], EvalSetConfig] = {}
    """Other evaluation sets by name, each with its own reward."""
    every: PositiveInt = 5
    """Iterations between evaluations; the initial and the final policy are always evaluated."""
    hold_s: PositiveFloat = 600.0
    """Seconds for which the rollout actors that evaluate a policy version keep it, and do not train. What is unfinished
    then is generated anew in the next round, and this one has no result."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that is sampled from. Training has none, like `min_tokens`."""
    min_tokens: NonNegativeInt = 0
    """Generated tokens before which an answer cannot end. Training has none: it would change what the learner's
    log-probs stand for."""
    stop_repetition: bool = False
    """End held-out answers by `rollout.repetition` too."""


class RewardConfig(Section):
    """Reward: a weighted sum of functions, run in killable subprocesses."""

    functions: Annotated[list[RewardFunctionConfig], Field(min_length=1)]
    """The rubric."""
    group: list[RewardFunctionConfig] = []
    """Group rewards, added at the claim: functions of a `pmdflow.reward.group.GroupView` and the prompt's history."""
    actors: PositiveInt = 1
    """Reward actors, spread over the nodes of the cluster."""
    workers: PositiveInt = 1
    """Subprocesses of each actor. One scores a trajectory at a time, or many if a function is a coroutine."""
    timeout_s: PositiveFloat = 10.0
    """Wall-clock limit of one trajectory; beyond it the subprocess is killed and the attempt is an infra failure."""
    max_attempts: PositiveInt = 3
    """Infra failures after which a trajectory is `failed`: outside the baseline and out of k."""
    max_failures_in_a_row: PositiveInt = 100
    """Infra failures without any other outcome between them, after which the run ends with the first one's message;
    functions that a source or an evaluation set has of its own are counted apart."""
    max_abs: PositiveFloat = 1.0e6
    """Largest size of a function's value and of the weighted sum; what is beyond it is an infra failure."""
    invalid: float = Field(default=0.0, allow_inf_nan=False)
    """Reward of a completion that its function calls invalid."""
    length_weight: NonNegativeFloat = 0.0
    """Weight of the length reward of Kimi k1.5 (section 2.3.3)."""
    length_warmup_iterations: NonNegativeInt = 0
    """First iterations without the length reward."""
    repetition_penalty: NonNegativeFloat = 0.0
    """Subtracted from the reward of a trajectory that `rollout.repetition` ended."""
    cut_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Reward of a trajectory that was cut at `data.max_tokens`, whatever it says (Kimi K2); null judges it."""


class EnvironmentConfig(Section):
    """What trajectories of several turns talk to, such as a tool."""

    factory: str = Field(pattern=IMPORT_PATH)
    """Import path `package.module:name`, found like a reward function, of what makes an `Environment`, one for each
    trajectory. A turn of the model ends with an end of sequence or with one of `rollout.stop` and
    `rollout.stop_token_ids`."""
    args: dict[str, Any] = {}
    """Arguments of the factory; `${NAME}` is a variable of the environment, which is shown by its name everywhere."""
    timeout_s: PositiveFloat = 10.0
    """Wall-clock limit of one call; meanwhile other trajectories go on."""
    max_turns: PositiveInt | None = None
    """Turns of an episode, which ends with the answer to the last one; null: as many as `data.max_tokens` allows."""
    max_failures_in_a_row: PositiveInt = 100
    """Calls of one rollout actor that fail without an answer between them, after which the run ends with the first
    one's message."""
    failure: str = Field(default=" error\n", min_length=1)
    """What the model reads when a call fails or is late."""


class LoraConfig(Section):
    """Low-rank adapters, trained instead of the weights (needs the `lora` extra)."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveInt = 32
    """An adapter is scaled by alpha / rank."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the adapted layers, such as `[q_proj, v_proj]`; `all-linear` is every one but the output head."""


class LearnerConfig(Section):
    """Policy optimization."""

    algorithm: str = "pmd_mean"
    """`pmd_mean`, `pmd_partition`, `boltzmann_pmd`, `token_pmd` (K2.5), `weighted_sft` (BOLT), `ctpo`, `grpo`, `gspo`,
    `ucpo`, `a_nsr`, `gdpo`, `opefo`, `gigpo`, `opd`, `vopd`, or the import path `package.module:name` of an
    `Algorithm`."""
    settings: dict[str, float | str] = {}
    """Settings of the algorithm that only it has, by name; `learner/ALGORITHMS.md` lists them."""
    teacher: str | None = None
    """Folder of the model that `opd` and `vopd` learn from (found like `model.path`), with the same tokenizer; frozen,
    sharded over the learner's ranks."""
    scorers: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ScorerConfig] = {}
    """Token scorers by name: what they say of tokens are columns that an algorithm reads. With one called `teacher`,
    `opd` and `vopd` learn from it, and `learner.teacher` is left out."""
    tau: PositiveFloat = 0.05
    """KL regularization of policy mirror descent: an iteration moves the log-ratio of a whole sequence towards its
    advantage / tau, so long answers want a smaller one. With one step an iteration it has no effect in `pmd_mean`."""
    leave_one_out: bool = True
    """Baselines of the PMD algorithms leave the trajectory itself out; false includes it, as Kimi k1.5 does."""
    partition_floor: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lower bound of the mean inside the partition baseline's logarithm; OpenKimi uses 1e-8."""
    clip_low: PositiveFloat | None = None
    """Lower clipping bound of `token_pmd`, `ctpo`, `grpo` or `gspo`; null is the algorithm's own."""
    clip_high: PositiveFloat | None = None
    """Upper clipping bound, likewise."""
    keep_groups_above: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Groups with a mean reward at or below this have no gradient; 0 drops prompts that nobody solved."""
    keep_groups_below: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Groups with a mean reward at or above this have no gradient; 1 drops prompts that everybody solved."""
    importance_weights: Literal["none", "token", "sequence"] = "none"
    """Truncated importance weights between the generating engine and the learner: of token ratios, averaged over each
    sequence, or of the sequence's ratio."""
    importance_cap: PositiveFloat = 2.0
    """Upper bound of an importance weight."""
    importance_normalize: bool = False
    """Scale the importance weights of a step to mean 1."""
    veto: bool = False
    """Sequences with a token 10,000 times less likely under the learner than under the engine have no gradient."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, the mean entropy of the policy at trained tokens."""
    ptx_data: str | None = Field(default=None, pattern=r"\.jsonl$")
    """Supervised `.jsonl` file (found like `model.path`), `prompt` and `completion` on each line; its loss is added."""
    ptx_weight: PositiveFloat = 0.1
    """Weight of the supervised loss (PTX)."""
    ptx_sequences: PositiveInt = 8
    """Supervised sequences of each optimizer step."""
    ranks: PositiveInt | Literal["auto"] = "auto"
    """Learner processes (FSDP2). `auto`: a quarter of the GPUs, or as many as the model's states need; one without."""
    router_replay: bool = False
    """Of a Mixture of Experts: the engine records which experts computed each token's logits, and the learner takes the
    same ones, with weights of its own logits. Needs `rollout.engine: transformers`."""
    replicas: PositiveInt = 1
    """Copies of the model among the ranks: each is sharded over ranks / replicas of them (hybrid sharding)."""
    steps_per_iteration: PositiveInt = 4
    """Optimizer steps that one claim is split into; each group is in exactly one."""
    lr: PositiveFloat = 1.0e-6
    """Learning rate of AdamW; adapters want about ten times that of all weights."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear learning-rate warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after its warm-up: stay, or fall to a tenth of `lr` until `lr_decay_steps`."""
    lr_decay_steps: PositiveInt | None = None
    """Optimizer steps of the whole run, warm-up included, after which `linear` and `cosine` have reached their end. It
    does not follow from `run.iterations`, which may be raised: replay would then find other rates than the run had."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    reset_optimizer: bool = False
    """Clear Adam's moments at the start of each iteration, as Kimi k1.5 does; use it with `reset_warmup_steps`."""
    reset_warmup_steps: NonNegativeInt = 0
    """Steps of linear learning-rate warm-up after each reset: the first step of an empty Adam has the full size."""
    tokens_per_microbatch: PositiveInt = 8192
    """Most tokens, padding included, that one forward pass may hold."""
    context_parallel: PositiveInt = 1
    """Ranks that share each row of a micro-batch (Ulysses): every one computes a part of its tokens, and in attention a
    part of the heads, which it must divide. For sequences that are too long for one rank; rows may then be as many
    times longer."""
    packing: bool = True
    """Sequences of a micro-batch lie in one row, without padding; false pads each to a row of its own."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Keep only the inputs of each decoder layer and compute it again in the backward pass: less memory, more time.
    `auto`: on GPUs where a rank would not fit otherwise."""
    cpu_offload: bool = False
    """On a GPU: keep master weights, gradients and moments in the machine's memory; the optimizer runs there."""
    compile: bool = False
    """Compile each decoder layer with `torch.compile`."""
    lora: LoraConfig | None = None
    """Train adapters and publish only these; null trains all weights."""
    aggregation: Literal["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = "seq-mean-token-mean"
    """How the loss of a sequence's tokens is reduced; with a sum, long answers weigh more and want a larger `tau`."""
    segment_loss: Literal["all", "current_only"] = "all"
    """Which segments have a gradient: all that are not over-age, or only those of each trajectory's newest version,
    the one that Kimi k1.5's current iteration generates."""
    anchor: Literal["reference", "behavior"] = "reference"
    """Log-probs that the policy is compared with: recomputed when the iteration starts, or recorded at generation."""
    u_scope: Literal["generated", "trained"] = "generated"
    """Tokens over which the sequence log-ratio runs."""
    checkpoint_every: PositiveInt = 1
    """Iterations between checkpoints; a crash repeats at most these and the one during which a checkpoint was being
    written, from stored rollouts."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    threads: PositiveInt = 1
    """CPU threads of one rank."""

    def scorers_when(self, when: Literal["complete", "claim"]) -> dict[str, ScorerConfig]:
        """Those of `scorers` that run then."""
        return {name: scorer for name, scorer in self.scorers.items() if scorer.when == when}

    @property
    def num_ranks(self) -> int:
        """`ranks`, once `auto` is settled."""
        assert self.ranks != "auto", "settle comes first"
        return self.ranks


class ArchiveConfig(Section):
    """Trained claims, kept for `replay` and the pages."""

    keep: PositiveInt | None = None
    """Newest parts that are kept, one an iteration; null keeps all. What the store still holds, and what `replay`
    needs from a kept checkpoint on, is never deleted, so there may be more."""


class StoreConfig(Section):
    """The trajectory store."""

    dir: str | None = None
    """Folder in which the store has one of the run's name, on a local disk of the node where `up` first ran: the store
    actor is pinned to that node, and a resume goes there. null: the run directory. Neither may be on a network file
    system."""
    durability: Literal["os", "group", "always"] = "group"
    """When an append is acknowledged: in the page cache, after a group's fdatasync, or after its own."""
    sync_interval_s: float = Field(default=0.005, gt=0, le=60)
    """Longest time between two syncs while records arrive that nobody waits for: what a power loss can take of them."""
    max_bytes: str = Field(default="4GiB", pattern=r"^\d+(\.\d+)?\s*(B|KiB|MiB|GiB|TiB)$")
    """Size above which admission is refused, for example `4GiB`."""

    @property
    def limit_bytes(self) -> int:
        """`max_bytes` as a number."""
        number = self.max_bytes.rstrip("BKMGTi ")
        return int(float(number) * _UNITS[self.max_bytes.removeprefix(number).strip()])


class WeightsConfig(Section):
    """How weights reach the rollout actors."""

    transport: Literal["object_store", "filesystem"] = "object_store"
    """`object_store` (memory of the nodes: each learner rank gives out a share, which Ray carries) or `filesystem`
    (safetensors in the run directory)."""
    delta: bool = False
    """With `object_store`: other nodes get what changed since the version before, bit for bit, and the whole file where
    they lack that one. It pays in bfloat16 at the learning rates of language models, and between nodes; each node holds
    a second file while it makes one of the other."""


class DashboardConfig(Section):
    """The web page that `up` serves."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = 0
    """Port; 0 takes a free one, null serves none."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to serve at; `0.0.0.0` is every one. Any but this machine's own asks for the token in the printed link,
    which `RUN/dashboard.token` keeps; it is plain HTTP, so put a tunnel or a proxy before it on a network you share."""


class Config(Section):
    """A whole configuration file."""

    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig | None = None
    """Makes trajectories of several turns; null makes single answers."""
    agents: AgentsConfig | None = None
    """Makes each trajectory the conversation of a program with an OpenAI endpoint; null has none."""
    scheduler: SchedulerConfig
    learner: LearnerConfig = LearnerConfig()
    store: StoreConfig = StoreConfig()
    archive: ArchiveConfig = ArchiveConfig()
    weights: WeightsConfig = WeightsConfig()
    metrics: MetricsConfig = MetricsConfig()
    dashboard: DashboardConfig = DashboardConfig()

    @property
    def own_rewards(self) -> dict[str, list[RewardFunctionConfig]]:
        """Reward functions of sources and evaluation sets that have their own, by the source that a prompt names.

        Prompts of a single source name none: "".
        """
        given = {f"{EVAL_PREFIX}{name}": given.reward for name, given in self.eval.sets.items()}
        sources = self.data.sources
        given |= {source.label: source.reward for source in sources} if len(sources) > 1 else {"": sources[0].reward}
        return {name: functions for name, functions in given.items() if functions is not None}

    @model_validator(mode="after")
    def _refuse_impossible(self, info: ValidationInfo) -> Config:
        if problems := list(combination_problems(self, recorded=info.context == RECORDED)):
            raise ValueError("\n".join(problems))
        return self


if __name__ == "__main__":
    print(json.dumps(Config.model_json_schema(), indent=2))
