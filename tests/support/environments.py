"""Environments for tests: one that remembers, one of every mood, and calculators that do not always begin."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4
from zlib import crc32

from pmdflow.data.tokenizer import load_tokenizer
from pmdflow.environments.calculator import Calculator
from pmdflow.environments.key_and_door import KeyAndDoor
from pmdflow.environments.protocol import Observation
from tests.support.paths import ROOT

MODEL = str(ROOT / "configs" / "tiny-calculator")
tokenizer: Any = load_tokenizer(MODEL)


def tokens_of(text: str) -> tuple[int, ...]:
    """Token ids of a text, as a session makes them."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Echo:
    """Answers with how often it was called, as one that keeps state; remembers the keys."""

    def __init__(self, keys: list[str]) -> None:
        """Append every key to `keys`."""
        self.keys, self.count = keys, 0

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Say the prompt and its answer."""
        self.keys.append(key)
        return Observation(text=f"{prompt} {metadata['answer']}")

    def step(self, *, key: str, action: str) -> Observation:
        """Fail at 9, end at 7."""
        self.keys.append(key)
        self.count += 1
        if action == "9":
            raise RuntimeError("no such digit")
        return Observation(text=f"{action}: {self.count}", done=action == "7")


class Moody:
    """Decides by the key alone whether it speaks, is silent, ends the trajectory, rewards or fails."""

    salt: ClassVar[int] = 0
    """Another one gives other moods."""

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Fail, end at once, say nothing, or begin."""
        mood, text = self._mood(key)
        return Observation(text=text if mood > 3 else "", done=mood == 1, **self._note(text))

    def step(self, *, key: str, action: str) -> Observation:
        """Fail, end with or without words, or answer."""
        mood, text = self._mood(key)
        return Observation(text="" if mood == 1 else text, done=mood in (1, 2), **self._note(text))

    def _note(self, text: str) -> dict[str, Any]:
        """Some say nothing of the episode."""
        number = int(text)
        reward = number / 2 if number % 3 else None
        return {"reward": reward, "key": text if number % 2 else None, "metrics": {"m": 1.0} if number % 5 == 0 else {}}

    def _mood(self, key: str) -> tuple[int, str]:
        number = crc32(f"{self.salt} {key}".encode())
        if number % 6 == 0:
            raise ConnectionError("no server")
        return number % 6, str(number % 97)


def fails_to_begin(key: str) -> bool:
    """Whether `SometimesBegins` fails: for a third of the trajectories."""
    return crc32(key.encode()) % 3 == 0


class NeverBegins(Calculator):
    """A calculator whose server is down."""

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Fail."""
        raise ConnectionError("the calculator is down")


class SometimesBegins(Calculator):
    """A calculator whose `reset` often fails."""

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Say nothing, or fail."""
        if fails_to_begin(key):
            raise ConnectionError("no server")
        return super().reset(key=key, prompt=prompt, metadata=metadata)


class Troubled(KeyAndDoor):
    """A text world that now and then does not answer, and writes down who began and who was closed."""

    def __init__(self, folder: str) -> None:
        """`folder` gets a file for each object: `PROCESS-OBJECT.begun`, and `.closed`."""
        super().__init__()
        self._file = Path(folder) / f"{os.getpid()}-{uuid4().hex}"

    def reset(self, *, key: str, prompt: str, metadata: Mapping[str, Any]) -> Observation:
        """Begin."""
        self._file.with_suffix(".begun").touch()
        return super().reset(key=key, prompt=prompt, metadata=metadata)

    def step(self, *, key: str, action: str) -> Observation:
        """Answer late, for some keys."""
        if crc32(key.encode()) % 97 == 0:
            time.sleep(3.5)
        return super().step(key=key, action=action)

    def close(self) -> None:
        """Write it down."""
        assert not self._file.with_suffix(".closed").exists()
        self._file.with_suffix(".closed").touch()
