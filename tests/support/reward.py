"""What tests of rewards share: functions that hang, crash and lie, configurations, a tokenizer with special tokens."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pmdflow.config.schema import RewardConfig
from pmdflow.reward.item import ScoreItem

FUNCTIONS = '''
import asyncio, json, os, signal, subprocess, sys, time
from pmdflow.reward.function import batched
from pmdflow.reward.rubric import InvalidCompletion

print("printing at import is harmless")

def length(*, completion, prompt, metadata):
    return len(completion)

def obey(*, completion, prompt, metadata):
    """Does what the completion says."""
    print("printing is harmless")
    if completion == "sleep":
        time.sleep(3600)
    if completion == "spin":
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if completion == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "exit":
        os._exit(3)
    if completion == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], close_fds=False)
        with open(metadata["pid_file"], "w") as file:
            file.write(str(child.pid))
        time.sleep(3600)
    if completion == "invalid":
        raise InvalidCompletion("no answer")
    if completion == "raise":
        raise KeyError("oops")
    if completion == "text":
        return "1.0"
    if completion == "none":
        return None
    return float(completion)

async def obey_together(*, completion):
    """One hung call among many."""
    if completion == "wait":
        await asyncio.sleep(3600)
    await asyncio.sleep(0.05)
    return obey(completion=completion, prompt="?", metadata={})

@batched(size=8)
def obey_in_batches(*, completion):
    return [obey(completion=text, prompt="?", metadata={}) for text in completion]

def tell(**inputs):
    """Writes down what it was given."""
    with open(inputs["metadata"]["told"], "a") as file:
        file.write(json.dumps(inputs) + "\\n")
    return 1.0
'''
"""A module of reward functions."""


needs_sandbox = pytest.mark.skipif(
    sys.platform != "linux" or (shutil.which("bwrap") is None and "CI" not in os.environ),
    reason="programs are confined by bubblewrap, which is not installed",
)


def make_config(*names: str, **settings: Any) -> RewardConfig:
    """The reward section with these functions, each of weight 1; a time limit of 1 s."""
    entries = [{"function": name, "weight": 1.0} for name in names or ("graders:obey",)]
    return RewardConfig.model_validate({"functions": entries, "timeout_s": 1.0, **settings})


def items(*completions: str, **metadata: Any) -> list[ScoreItem]:
    """One item a completion."""
    return [ScoreItem(completion=completion, prompt="?", metadata=metadata) for completion in completions]


def programs_below(parent: psutil.Process) -> list[psutil.Process]:
    """Processes of a code reward's program, among the descendants of a process."""
    found = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends, or begins, at this moment
            found += [process] if "main.py" in process.cmdline() else []
    return found


def save_tokenizer(folder: Path, *specials: str) -> str:
    """A byte-level tokenizer with `<pad>`, `<eos>` and `specials` as special tokens, in a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=list(specials)
    )
    fast.save_pretrained(folder)
    return str(folder)
