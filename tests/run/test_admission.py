"""When the controller admits prompts: at once after a publication, before anything that can wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pmdflow.config.load import load
from pmdflow.errors import PmdflowError
from pmdflow.metrics.order import AdmissionOrder
from pmdflow.run import controller as module
from pmdflow.run.controller import Controller
from pmdflow.run.refills import Refills
from pmdflow.run.scheduler import SchedulerSettings
from pmdflow.store.actor import StoreActor
from pmdflow.store.facade import TrajectoryStore
from pmdflow.store.segments import encode_segments
from tests.support.filled_store import PROMPT, segment
from tests.support.paths import CONFIGS


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


def refilling(monkeypatch: pytest.MonkeyPatch, directory: Path, *, has_signal: Callable[[int], bool]) -> Controller:
    """A controller over a real store, beside which every group is answered and scored as soon as it is looked at."""
    overrides = ["refill=true", "refill_limit=2", "groups_per_iteration=2", "lookahead=1"]
    learner = ["keep_groups_above=0", "keep_groups_below=1", "steps_per_iteration=1"]
    config = load(
        CONFIGS / "quickstart.yaml",
        [*(f"scheduler.{each}" for each in overrides), *(f"learner.{each}" for each in learner), "data.group_size=2"],
    ).config
    settings: Any = {"groups_per_iteration": 2, "lookahead": 1, "max_staleness": 4, "signal": (0.0, 1.0)}
    actor = StoreActor(directory=str(directory), settings=settings, steps_per_iteration=1, seed=0)
    store: TrajectoryStore = actor._store

    def work() -> None:
        leases = store.lease("worker", 0, 64, 0.0)
        store.append(encode_segments([segment(lease, 3, stop="stop") for lease in leases]))
        for item in store.unscored(100, 60.0, 0.0):
            reward = float(item.trajectory % 2) if has_signal(item.group) else 1.0
            store.score(item.trajectory, item.attempt, "scored", reward, {})

    monkeypatch.setattr(module, "call", lambda store, method, *given: method(store, *given))
    given = Controller.__new__(Controller)
    given.iteration = given.version = 0
    given._config, given._store = config, actor  # type: ignore[assignment]
    given._settings = given._budgeted = SchedulerSettings.of(config)
    given._rates, given._order, given._refills = [], AdmissionOrder(), Refills(most=4)
    given._supervisor = SimpleNamespace(draining=False, get=lambda answer, **_: answer)
    given._telemetry = SimpleNamespace(waited=lambda *_: None, event=lambda *_: None)
    given._prompts = SimpleNamespace(curriculum=None, prompt=lambda cursor: PROMPT)
    monkeypatch.setattr(given, "_take_discards", work)
    store.publish(0, None, {})
    given._grant_first_budget()
    assert given._admit() == 4
    work()
    return given


def test_a_claim_is_filled_with_groups_that_have_a_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = refilling(monkeypatch, tmp_path, has_signal=lambda group: group in (3, 5, 6))
    assert given._claim(1)
    counts = given._counts()
    assert (counts.groups_claimed, counts.groups_no_signal, counts.next_cursor) == (2, 5, 8)


def test_nothing_with_a_signal_ends_the_run_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = refilling(monkeypatch, tmp_path, has_signal=lambda group: False)
    with pytest.raises(PmdflowError, match=r"left to train: 8 were evicted .*refill_limit \(2\) is reached"):
        given._claim(1)
    assert given._counts().next_cursor == 8, "an admission window, and as many refills as may be"


def test_what_is_evicted_while_the_learner_trains_is_refilled_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = refilling(monkeypatch, tmp_path, has_signal=lambda group: False)
    assert given._admit() == 4 and given._admit() == 0, "four places are free, the next iteration's"
    given._take_discards()
    assert given._counts().groups_untrained == 0
    given._refills.renew()
    assert given._admit() == 4
