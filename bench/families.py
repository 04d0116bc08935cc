"""Which causal families of the installed transformers train, which are refused, and does any train wrongly unseen?

Each family is made tiny, with random weights whose distributions are peaked, and trained three iterations without Ray:
the transformers engine generates in company, the learner trains on that in packed rows, and the engine takes the new
weights. Every recorded log-prob must be that of a plain forward pass of the sequence alone under the weights that
generated it. What a run would refuse, at the check of the folder or by the self-check of learner and engine, is named;
then padded rows are tried alone, which most refusals recommend. Exits with 1 if a family trains with other log-probs,
or fails in any other way than by a refusal.

    uv run python bench/families.py --out bench/results/families.md
    uv run python bench/families.py llama gemma3_text
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pmdflow.config.schema import Config
from pmdflow.data.inputs import resolve_inputs
from pmdflow.learner.learner import Learner
from pmdflow.learner.loading import check_family, check_loading
from pmdflow.rollout.engine import Request
from pmdflow.rollout.engines.make import make_engine
from pmdflow.types import Mask, TrainBatch

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "configs" / "tiny-arithmetic"
ITERATIONS = 3
GROUPS, MEMBERS, TOKENS = 4, 3, 8
ATOL = 1e-3
"""Nats between two float32 implementations; a token seen too many or too few changes more."""
SPREAD = 0.3
"""Standard deviation of random weights: at the usual 0.02, every token is about as likely whatever came before."""
TIMEOUT_S = 300.0
WINDOW = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "vocab_size": 384, "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "n_ctx": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2, "moe_top_k": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "query_pre_attn_scalar": 8, "is_decoder": True,
}  # fmt: skip
"""What is set wherever a family has it."""
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
DRAFTER = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "enable_moe_block": False,
    "use_double_wide_mlp": False,
}  # fmt: skip
SPEECH = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        **MIXED,
        "rope_parameters": dict.fromkeys(MIXED["layer_types"], ROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}),
    },
    "cwm": {"bos_token_id": 2},
    "dbrx": {
        **ROPE,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {**EXPERTS, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {**MIXED, "num_kv_shared_layers": 0},
    "gemma4_text": {**MIXED, "head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2},
    "gemma4_unified_text": {**MIXED, "head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **DRAFTER}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **DRAFTER}},
    "hunyuan_v1_dense": {"head_dim": 8, **ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, **ROPE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8, **ROPE},
    "modernbert-decoder": {"bos_token_id": 2},
    "musicgen": {**SPEECH, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**SPEECH, "decoder": {"model_type": "musicgen_melody_decoder"}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "xmod": {"default_language": "en_XX"},
}
"""What is set for one family besides."""

PARTS = ("text_config", "text_encoder", "audio_encoder", "decoder")
"""Configurations within that of a family which has none by default."""

Outcome = Literal["trains", "refused", "not made", "WRONG", "FAILS"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of one family."""

    family: str
    outcome: Outcome
    difference: float | None = None
    """The largest between a recorded log-prob and the plain one, in nats."""
    words: str = ""
    """The refusal, or what went wrong."""
    padded: str = ""
    """What padded rows alone do, where the family was refused."""

    def row(self) -> str:
        """A line of the table."""
        difference = "" if self.difference is None else f"{self.difference:.1e}"
        words = self.words.replace("|", "/").replace("\n", "<br>")
        return f"| {self.family} | {self.outcome} | {difference} | {words} | {self.padded} |"


def sizes(config: Any) -> dict[str, Any]:
    """The settings of a tiny configuration, those of its parts included."""
    tiny = {name: value for name, value in SIZES.items() if _has(config, name)}
    if "kv_lora_rank" in tiny:  # each head has keys of its own, made from what all share
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            tiny[name] = sizes(part) | ({"pad_token_id": 0} if _has(part, "pad_token_id") else {})
    return tiny


def _has(config: Any, name: str) -> bool:
    """Whether a family has a setting of this name, and it can be set."""
    try:
        value = getattr(config, name, None)
    except Exception:  # it is one for each layer
        return False
    derived = getattr(type(config), name, None)
    return value is not None and not (isinstance(derived, property) and derived.fset is None)


def tiny_config(family: str) -> Any:
    """The configuration of a small model of a family."""
    made, own = CONFIG_MAPPING[family], OWN.get(family, {})
    parts = {name: own[name] for name in PARTS if name in own}
    tiny = sizes(made(**copy.deepcopy(parts)))  # some take their parts apart
    given = {name: {**tiny.get(name, {}), **part} for name, part in copy.deepcopy(parts).items()}
    return made(**{**tiny, **ENDS, **own, **given})


def make_folder(family: str, folder: Path) -> None:
    """A tiny random model of a family, with a tokenizer."""
    config = tiny_config(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=SPREAD)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def settings(folder: Path, *, packing: bool) -> Config:
    """Those of a run on a model folder."""
    return Config.model_validate(
        {
            "run": {"name": "scan", "iterations": ITERATIONS},
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"task": "reasoning_gym/chain_sum", "group_size": MEMBERS, "max_tokens": TOKENS},
            "reward": {"functions": [{"function": "a:b"}]},
            "rollout": {"engine": "transformers", "actors": 1, "slots": GROUPS * MEMBERS},
            "scheduler": {"groups_per_iteration": GROUPS, "tokens_per_iteration": 1000},
            "learner": {
                "ranks": 1,
                "tau": 1.0,
                "aggregation": "seq-mean-token-sum",
                "lr": 1e-2,
                "steps_per_iteration": 2,
                "packing": packing,
            },
        }
    )


def examine(family: str, folder: Path) -> Found:
    """Make a family and train it as a run would, from the checks of its folder on."""
    try:
        make_folder(family, folder)
    except Exception as error:
        return by_configuration(family, folder) or Found(family=family, outcome="not made", words=_short(error))
    config = settings(folder, packing=True)
    try:
        resolve_inputs(config, merged=folder / "merged")
        check_family(folder, packing=True, slots=True)
        check_loading(folder)
        difference = train(config)
    except ValueError as error:
        return Found(family=family, outcome="refused", words=_words(error, folder), padded=padded(folder))
    outcome: Outcome = "trains" if difference <= ATOL else "WRONG"  # NaN is wrong too
    return Found(family=family, outcome=outcome, difference=difference)


def by_configuration(family: str, folder: Path) -> Found | None:
    """What a folder of a family is refused for whatever weights it holds; None if it is not."""
    try:
        try:
            config = tiny_config(family)
        except Exception:  # one whose sizes cannot be set like this
            config = CONFIG_MAPPING[family]()
        config.save_pretrained(folder)
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
        check_family(folder, packing=True, slots=True)
        check_loading(folder)
    except ValueError as error:
        words = _words(error, folder)
        return None if "its weights" in words else Found(family=family, outcome="refused", words=words)
    except Exception:
        return None
    return None


def padded(folder: Path) -> str:
    """Whether the learner takes a family in padded rows."""
    try:
        check_family(folder, packing=False, slots=False)
        check_loading(folder)
        with started(settings(folder, packing=False)) as learner:
            learner.train(batch_of(prompts(0), [[7, 5, 3]] * GROUPS * MEMBERS, [[-1.0] * 3] * GROUPS * MEMBERS, 0))
    except ValueError as error:
        return f"refused: {_words(error, folder).splitlines()[0]}"
    except Exception as error:
        return f"FAILS: {_short(error)}"
    return "trains"


class started:  # noqa: N801 - used as a function
    """A learner of one rank, which leaves its process group at the end."""

    def __init__(self, config: Config) -> None:
        self._learner = Learner(config=config, rank=0)

    def __enter__(self) -> Learner:
        try:
            self._learner.setup(self._learner.address())
        except BaseException:
            self._learner.close()
            raise
        return self._learner

    def __exit__(self, *_: object) -> None:
        self._learner.close()


def train(config: Config) -> float:
    """Train the iterations; the largest difference between a recorded log-prob and the plain one."""
    largest = 0.0
    with started(config) as learner:
        engine = make_engine(config, seed=0)
        plain = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager").eval()
        for iteration in range(1, ITERATIONS + 1):
            starts = prompts(iteration)
            tokens, logprobs = generate(engine, starts)
            for start, own, recorded in zip(starts, tokens, logprobs, strict=True):
                difference = (plain_logprobs(plain, start, own) - torch.tensor(recorded)).abs().max()
                largest = float(np.maximum(largest, float(difference)))
            before = learner.weights()
            learner.train(batch_of(starts, tokens, logprobs, iteration))
            weights = learner.weights()
            assert before is not None and weights is not None
            if all(torch.equal(before[name], weights[name]) for name in weights):
                raise RuntimeError("nothing was trained")
            engine.load_weights(iteration, engine.stage(weights), on_new_weights="reprefill")
            plain.load_state_dict(weights, strict=False)
    return largest


def prompts(seed: int) -> list[list[int]]:
    """Random tokens of different lengths, those of a group alike."""
    random = np.random.default_rng(seed)
    groups = [random.integers(2, 300, 3 + 5 * number).tolist() for number in range(GROUPS)]
    return [group for group in groups for _ in range(MEMBERS)]


def generate(engine: Any, starts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """One answer to each prompt, all at once."""
    tokens: list[list[int]] = [[] for _ in starts]
    logprobs: list[list[float]] = [[] for _ in starts]
    for id, start in enumerate(starts):
        asked = np.array(start, np.int32)
        engine.add(Request(id=id, tokens=asked, limit=TOKENS, remaining=TOKENS, temperature=1.0))
    while engine.active():
        for output in engine.step():
            tokens[output.id] += output.tokens
            logprobs[output.id] += output.logprobs
    return tokens, logprobs


@torch.no_grad()
def plain_logprobs(model: Any, start: list[int], own: list[int]) -> torch.Tensor:
    """By one forward pass of a sequence alone."""
    logits = model(input_ids=torch.tensor([[*start, *own]]), use_cache=False).logits[0, len(start) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0]


def batch_of(
    starts: list[list[int]], tokens: list[list[int]], logprobs: list[list[float]], iteration: int
) -> TrainBatch:
    """A claim of what was generated; a reward is the parity of its tokens."""
    pairs = list(zip(starts, tokens, strict=True))
    lengths = [len(start) + len(own) for start, own in pairs]
    generated = np.concatenate([np.arange(len(s) + len(o)) >= len(s) for s, o in pairs])
    return TrainBatch(
        iteration=iteration,
        version=max(iteration - 1, 0),
        tokens=np.concatenate([[*start, *own] for start, own in pairs]).astype(np.int32),
        logprobs=np.concatenate([[*[0.0] * len(s), *p] for s, p in zip(starts, logprobs, strict=True)]).astype("f4"),
        versions=np.where(generated, max(iteration - 1, 0), -1).astype(np.int32),
        temperatures=np.ones(len(generated), np.float32),
        mask=np.where(generated, Mask.GENERATED | Mask.TRAINED, 0).astype(np.uint8),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int64),
        prompt_lengths=np.array([len(start) for start in starts], np.int32),
        groups=np.arange(len(starts)) // MEMBERS,
        trajectories=np.arange(len(starts)),
        rewards=np.array([(sum(own) + number) % 2 for number, own in enumerate(tokens)], np.float64),
        components={},
        stops=np.ones(len(starts), np.uint8),
        prompt_ids=tuple(f"p{number // MEMBERS}" for number in range(len(starts))),
    )


def _words(error: ValueError, folder: Path) -> str:
    return str(error).replace(f"model.path is {str(folder)!r}: ", "")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _apart(family: str, answer: Connection) -> None:
    """In a process of its own: a family's code may do anything."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = examine(family, Path(folder))
        except Exception as error:
            traceback.print_exc()
            found = Found(family=family, outcome="FAILS", words=_short(error))
    answer.send(found)


def scan(families: list[str]) -> Iterator[Found]:
    """One family after another."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pmdflow.learner.learner", "pmdflow.rollout.engines.transformers.engine"])
    for family in families:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_apart, args=(family, there))
        process.start()
        there.close()
        try:
            yield here.recv() if here.poll(TIMEOUT_S) else Found(family=family, outcome="FAILS", words="no end")
        except EOFError:
            yield Found(family=family, outcome="FAILS", words=f"its process ended with {process.exitcode}")
        process.kill()
        process.join()


def table(found: list[Found]) -> str:
    """The result as a page."""
    counts = Counter(one.outcome for one in found)
    wide = max((one.difference for one in found if one.outcome == "trains"), default=0.0)
    lines = [
        f"# Causal families of transformers {transformers.__version__}",
        "",
        "Written by `bench/families.py`, which says how. "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        + f"; the largest difference of one that trains is {wide:.1e} nats.",
        "",
        "| family | outcome | nats | refusal | padded rows alone |",
        "|---|---|---|---|---|",
        *(one.row() for one in found),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, help="where the table is written")
    arguments = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    known: Mapping[str, Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = []
    for one in scan(arguments.families or sorted(known)):
        print(one.row(), flush=True)
        found.append(one)
    if arguments.out:
        arguments.out.write_text(table(found))
    return int(any(one.outcome in ("WRONG", "FAILS") for one in found))


if __name__ == "__main__":
    sys.exit(main())
