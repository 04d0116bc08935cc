"""Settings that contradict each other are refused, each with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmdflow.config.load import load
from pmdflow.config.plan import make_plan
from pmdflow.config.settle import settle
from tests.support.config import edit, refuse

TEACHER = "{use: 'pmdflow.learner.scorers.teacher:Teacher'}"
PRIVILEGED = "{use: 'pmdflow.learner.scorers.teacher:Teacher', when: claim, settings: {context: 'own:solution'}}"
ALTERNATING = ("cluster.colocate=true", "scheduler.lookahead=0")


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (["scheduler.lookahead=2", "scheduler.max_staleness=1"], "scheduler.max_staleness", "raise max_staleness"),
        (
            ["rollout.tokens_per_segment=8", "scheduler.max_staleness=0", "scheduler.lookahead=0"],
            "scheduler.max_staleness",
            "set max_staleness to null",
        ),
        (
            ["rollout.tokens_per_segment=8", "rollout.on_new_weights=finish", "scheduler.lookahead=0"],
            "rollout.on_new_weights",
            "choose keep_kv or reprefill",
        ),
        (["rollout.tokens_per_segment=31"], "rollout.tokens_per_segment", "set it to null"),
        (["rollout.tokens_per_segment=12", "scheduler.lookahead=4"], "rollout.tokens_per_segment", "or to 13 or more"),
        (["learner.steps_per_iteration=5"], "learner.steps_per_iteration", "lower steps_per_iteration"),
        (["scheduler.tokens_per_iteration=auto"], "scheduler.tokens_per_iteration", "set iteration_s"),
        (["scheduler.iteration_s=20"], "scheduler.iteration_s", "set tokens_per_iteration to auto"),
        (["scheduler.refill=true"], "scheduler.refill", "set keep_groups_above to 0"),
        (
            ["scheduler.refill=true", "learner.keep_groups_above=0.0", "reward.cut_reward=0.0"],
            "scheduler.refill",
            "leave both out",
        ),
        (
            ["learner.router_replay=true", "rollout.engine=transformers", "agents={program: 'own:solve'}"],
            "learner.router_replay",
            "set router_replay to false",
        ),
        ([f"learner.scorers={{one: {TEACHER}, two: {TEACHER}}}"], "learner.scorers", "leave one of them out"),
        ([f"learner.scorers={{one: {PRIVILEGED}}}"], "learner.scorers.one.settings.context", "set when to complete"),
        (["learner.ranks=3", "learner.context_parallel=2"], "learner.ranks", "change one of them"),
        (["learner.context_parallel=2", "learner.packing=false"], "learner.context_parallel", "set packing to true"),
        (["cluster.colocate=true", "scheduler.lookahead=1"], "cluster.colocate", "set lookahead to 0"),
        (
            [*ALTERNATING, "rollout.engine=vllm", "rollout.tensor_parallel=2"],
            "cluster.colocate",
            "set tensor_parallel to 1",
        ),
        (
            [*ALTERNATING, "learner.scorers={mine: {use: 'own:Scorer', when: claim}}"],
            "cluster.colocate",
            "or set colocate to false",
        ),
        ([*ALTERNATING, "rollout.actors=2", "learner.ranks=1"], "cluster.colocate", "or set one to auto"),
        (["scheduler.window=3"], "scheduler.window", "raise window"),
        (["scheduler.versions=2", "scheduler.lookahead=0"], "scheduler.versions", "set versions to null"),
        (["scheduler.versions=2", "rollout.on_new_weights=finish"], "scheduler.versions", "leave on_new_weights out"),
        (["scheduler.versions=6", "scheduler.max_staleness=4"], "scheduler.max_staleness", "or lower versions"),
        (["weights.delta=true", "weights.transport=filesystem"], "weights.delta", "set transport to object_store"),
        (["weights.delta=true", "learner.lora={}"], "weights.delta", "leave delta out"),
        (["weights.delta=true", "model.dtype=float32"], "weights.delta", "set dtype to bfloat16"),
        (["scheduler.extra_groups=2", "scheduler.lookahead=1"], "scheduler.extra_groups", "set extra_groups to 0"),
        (
            ["scheduler.extra_groups=2", "scheduler.lookahead=0", "scheduler.max_staleness=0"],
            "scheduler.max_staleness",
            "or to 1 or more",
        ),
        (["data.group_size=1"], "scheduler.min_group_size", "lower min_group_size"),
        (["scheduler.straggler={members: 8, wait_s: 1}"], "scheduler.straggler.members", "set straggler to null"),
        (["scheduler.straggler={members: 1, wait_s: 1}"], "scheduler.straggler.members", "change it"),
        (["rollout.lease_ttl_s=0.1"], "rollout.lease_ttl_s", "raise lease_ttl_s"),
        (["store.max_bytes=1KiB"], "store.max_bytes", "raise max_bytes"),
        (["learner.algorithm=pmd_men"], "learner.algorithm", "did you mean pmd_mean"),
        (["learner.clip_low=0.2"], "learner.clip_low", "use one of token_pmd"),
        (["learner.algorithm=grpo", "learner.clip_low=1.5"], "learner.clip_low", "lower it"),
        (["learner.partition_floor=1.0e-8"], "learner.partition_floor", "use one of pmd_partition"),
        (["learner.keep_groups_above=1.0", "learner.keep_groups_below=0.0"], "learner.keep_groups_above", "widen"),
        (["learner.veto=true", "learner.anchor=behavior"], "learner.veto", "set anchor to reference"),
        (
            ["learner.importance_weights=token", "learner.algorithm=ctpo"],
            "learner.importance_weights",
            "set importance_weights to none",
        ),
        (["learner.lr_schedule=cosine"], "learner.lr_schedule", "set both"),
        (["learner.lr_decay_steps=9"], "learner.lr_schedule", "set both"),
        (
            ["learner.lr_schedule=linear", "learner.lr_decay_steps=9", "learner.warmup_steps=9"],
            "learner.lr_decay_steps",
            "raise it",
        ),
        (["rollout.final_temperature=0.8"], "rollout.final_temperature", "set both"),
        (["reward.length_warmup_iterations=5"], "reward.length_warmup_iterations", "set length_weight"),
        (["eval.min_tokens=99999"], "eval.min_tokens", "lower min_tokens"),
        (["reward.repetition_penalty=0.5"], "reward.repetition_penalty", "set repetition"),
        (["reward.invalid=-2e6"], "reward.invalid", "lower it"),
        (["reward.cut_reward=3", "reward.max_abs=2"], "reward.cut_reward", "lower it"),
        (["eval.stop_repetition=true"], "eval.stop_repetition", "set repetition"),
    ],
)
def test_impossible_combinations_are_refused_with_a_remedy(
    cluster_yaml: Path, overrides: list[str], key: str, remedy: str
) -> None:
    (issue,) = refuse(cluster_yaml, *overrides)
    assert issue.message.startswith(key)
    assert remedy in str(issue.hint)
    assert issue.place.is_override


def test_all_impossible_combinations_come_at_once_at_the_keys_they_name(cluster_yaml: Path) -> None:
    edit(cluster_yaml, ("groups_per_iteration: 4", "groups_per_iteration: 2\n  lookahead: 6"))
    issues = refuse(cluster_yaml)
    assert [(issue.place.line, issue.message.split()[0]) for issue in issues] == [
        (13, "learner.steps_per_iteration"),
        (14, "scheduler.max_staleness"),
    ]


def test_options_of_vllm_are_refused_for_other_engines(cluster_yaml: Path) -> None:
    issues = refuse(
        cluster_yaml, "rollout.engine=transformers", "rollout.speculation=ngram", "rollout.tensor_parallel=2"
    )
    assert {issue.message.split(" ")[0] for issue in issues} == {"rollout.speculation", "rollout.tensor_parallel"}


def test_arguments_of_vllm_that_the_loop_owns_are_refused_with_the_setting_that_has_them(cluster_yaml: Path) -> None:
    given = "rollout.engine_args={max_num_seqs: 8, scheduling_policy: fcfs, quantization: fp8}"
    said = [issue.message for issue in refuse(cluster_yaml, given)]
    assert len(said) == 3
    assert "names max_num_seqs, which the loop sets itself" in said[0] and "names scheduling_policy" in said[1]
    assert "quantization is fp8 while learner.importance_weights is none" in said[2]
    given = "rollout.engine_args={enable_lora: false, max-model-len: 9, pipeline_parallel_size: 2, load_format: dummy}"
    said = [issue.message for issue in refuse(cluster_yaml, given)]
    assert "names max-model-len, which is no argument of vLLM" in said[0]
    assert [message.split(",")[0].split(" ")[2] for message in said[1:]] == [
        "enable_lora", "load_format", "pipeline_parallel_size"
    ]  # fmt: skip


@pytest.mark.parametrize("lossy", ["quantization: fp8", "kv_cache_dtype: fp8_e4m3"])
def test_an_engine_of_another_distribution_is_taken_only_with_what_corrects_it(cluster_yaml: Path, lossy: str) -> None:
    given, (name, _, value) = f"rollout.engine_args={{{lossy}}}", lossy.partition(": ")
    (issue,) = refuse(cluster_yaml, given)
    assert f"{name} is {value} while learner.importance_weights is none" in issue.message
    weighed = [given, "learner.importance_weights=token", "learner.veto=true"]
    config = load(cluster_yaml, weighed).config
    assert config.rollout.engine_args == {name: value}
    (note,) = [note for note in make_plan(settle(config, gpus=None), model=None).notes if name in note]
    assert note.endswith("on against it: importance weights (token, at most 2), and a veto")
    assert load(cluster_yaml, [given, "learner.algorithm=ctpo"]).config.learner.importance_weights == "none"
    assert load(cluster_yaml, ["rollout.engine_args={kv_cache_dtype: auto}"])
