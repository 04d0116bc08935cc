"""When the controller admits prompts: at once after a publication, before anything that can wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pmdflow.run import controller as module
from pmdflow.run.controller import Controller
from pmdflow.run.refills import Refills


def iterated(monkeypatch: pytest.MonkeyPatch, *, iterations: int) -> list[str]:
    """The order of what a controller does in its first iteration, all of whose parts only say their names."""
    done: list[str] = []

    def says(name: str, answer: Any = None) -> Any:
        return lambda *given, **named: (done.append(name), answer)[1]

    given = Controller.__new__(Controller)
    result = SimpleNamespace(left_out={}, metrics={}, speed={})
    given.iteration = given.version = 0
    given._config = SimpleNamespace(
        run=SimpleNamespace(iterations=iterations), learner=SimpleNamespace(checkpoint_every=1)
    )
    given._store = None
    given._refills = Refills(most=None)
    given._supervisor = SimpleNamespace(learners=[], draining=False, get=says("its numbers"))
    given._learners = SimpleNamespace(wait=says("train", [result]))
    given._checkpoints = SimpleNamespace(commit=says("commit"), save=says("save"))
    given._devices = SimpleNamespace(to_learner=lambda: None, to_engines=lambda: None)
    given._held_out = SimpleNamespace(claimed=says("idle"), published=says("evaluate"))
    monkeypatch.setattr(module, "call", lambda *asked: None)
    for name in ("_take_discards", "_counts", "_record"):
        monkeypatch.setattr(given, name, says(name.strip("_")), raising=False)
    monkeypatch.setattr(given, "_admit", says("admit"))
    monkeypatch.setattr(given, "_admit_room", says("admit"))
    monkeypatch.setattr(given, "_claim", says("claim", True))
    monkeypatch.setattr(given, "_publish", says("publish"))
    given._iterate()
    assert given.iteration == 1
    return [name for name in done if name not in ("take_discards", "counts")]


def test_admission_follows_a_publication_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = iterated(monkeypatch, iterations=2)
    after = done[done.index("publish") :]
    assert after == ["publish", "evaluate", "admit", "save", "its numbers", "record"]


def test_nothing_is_admitted_after_the_last_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert iterated(monkeypatch, iterations=1).count("admit") == 1
