"""A run directory as numbers: what the pages show, read from files alone, in any state of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pmdflow.config.recorded import recorded_settings
from pmdflow.dashboard.tiles import of_now, of_run
from pmdflow.metrics.history import History, Record
from pmdflow.metrics.intervals import busy_share, clip, covered_s, longest_wait, union
from pmdflow.metrics.ledger import OUTSIDE_SUM, latest_ledger, ledger_gap, ledger_places
from pmdflow.metrics.signal import RECENT, no_signal
from pmdflow.metrics.text import duration, number, percent

DIAGNOSIS_WINDOW_S = 600.0
SILENT_AFTER_S = 30.0
_MAX_SPANS = 40_000
_RECENT_DEATH_S = 60.0
_NOTABLE_SHARE = 0.15

State = Literal["waiting", "running", "silent", "stopped", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The one sentence on top of the page."""

    state: State
    text: str
    warning: str | None = None
    """What is wrong with the rewards."""


class RunView:
    """A run directory that may still grow. Safe to use from several threads.

    Example:
        view = RunView(Path("runs/quickstart"))
        view.refresh()
        print(view.diagnosis().text)
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Read nothing yet."""
        self.run_dir = run_dir
        self.config = recorded_settings(run_dir)
        self.history = History(run_dir, max_spans=_MAX_SPANS)
        self.lock = threading.RLock()
        """Hold it while reading `history`."""
        self.revision = 0
        """Grows whenever the files did."""
        self._clock = clock

    def refresh(self) -> int:
        """Read what the files have gained and return the revision."""
        with self.lock:
            if self.history.update():
                self.config = self.config or recorded_settings(self.run_dir)
                self.revision += 1
            return self.revision

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.setting("run", "name") or self.run_dir.name)

    def setting(self, section: str, key: str) -> Any:
        """A value of the run's configuration; None if it is not there."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    def iterations(self) -> list[Record]:
        """Iteration records of the surviving history, ascending."""
        return [self.history.iterations[number] for number in sorted(self.history.iterations)]

    def evals(self) -> list[Record]:
        """Held-out evaluations, ascending by round."""
        return [self.history.evals[number] for number in sorted(self.history.evals)]

    def eval_sets(self) -> dict[str, list[Record]]:
        """Evaluations on each of `eval.sets`, ascending by round."""
        return {name: [rounds[number] for number in sorted(rounds)] for name, rounds in self.history.eval_sets.items()}

    def origin(self) -> float:
        """Unix time that charts count seconds from."""
        return self.history.first_time or 0.0

    def diagnosis(self) -> Diagnosis:
        """What limits the run now, or why it does not move."""
        with self.lock:
            iterations = self.iterations()
            is_told = len(iterations) >= RECENT or self._ending() is not None
            return replace(self._state(), warning=no_signal(iterations) if is_told else None)

    def _state(self) -> Diagnosis:
        history = self.history
        ending = self._ending()
        if ending == "finish":
            return Diagnosis(state="finished", text=f"finished: {self._learned()}")
        if ending is not None:
            resume = "starting the same `pmdflow up` again resumes it"
            return Diagnosis(state="stopped", text=f"stopped after {self._learned()}; {resume}")
        if history.last_time is None:
            return Diagnosis(state="waiting", text="waiting for the first metric: actors are starting")
        began = self._lifecycle().get("time", 0.0)
        silent_s = self._clock() - max(history.last_time, began)
        if silent_s > SILENT_AFTER_S:
            ago = duration(silent_s // 10 * 10)
            text = f"no new metric for {ago}: the run hangs or has died; `pmdflow status` tells, `pmdflow up` resumes"
            return Diagnosis(state="silent", text=text)
        return Diagnosis(state="running", text=self._bottleneck(history.last_time))

    def facts(self) -> list[tuple[str, str]]:
        """Labelled numbers as text, most important first: of now, or of the whole run once it has ended."""
        with self.lock:
            if self._ending() is not None:
                return self.totals()
            sample = self.history.samples[-1] if self.history.samples else {}
            return of_now(self.iterations(), self.evals(), sample, planned=self.setting("run", "iterations"))

    def totals(self) -> list[tuple[str, str]]:
        """Labelled numbers of all that the run has done so far."""
        with self.lock:
            planned = self.setting("run", "iterations")
            return of_run(self.iterations(), self.evals(), latest_ledger(self.history), planned=planned)

    def ledger(self) -> dict[str, Any]:
        """The newest token ledger: `rows` of (place, tokens, share), `generated`, `gap` and `outside` the sum."""
        with self.lock:
            ledger = latest_ledger(self.history)
        generated = ledger.get("generated", 0)
        rows = [(key, n, percent(n / generated if generated else None)) for key, n in ledger_places(ledger).items()]
        outside = {key: ledger[key] for key in OUTSIDE_SUM if key in ledger}
        return {"rows": rows, "generated": generated, "gap": ledger_gap(ledger), "outside": outside}

    def events(self, most: int = 12) -> list[tuple[str, str, str]]:
        """The newest events as (time since the start, kind, message), newest first."""
        with self.lock:
            newest = list(self.history.events)[-most:][::-1]
            return [
                (duration(e.get("time", 0.0) - self.origin()), str(e.get("kind")), str(e.get("message", "")))
                for e in newest
            ]

    def _lifecycle(self) -> Record:
        """The newest event of a start or an end; empty before the first."""
        return next((e for e in reversed(self.history.events) if e.get("kind") in _LIFECYCLE), {})

    def _ending(self) -> str | None:
        """The kind of the event that ended the run; None while it runs, or died without a word."""
        kind = self._lifecycle().get("kind")
        return kind if kind in _ENDINGS else None

    def _learned(self) -> str:
        iterations, evals = self.iterations(), self.evals()
        text = f"{len(iterations)} iterations"
        if iterations:
            text += f" in {duration(sum(record.get('time/iteration_s') or 0.0 for record in iterations))}"
        if evals:
            first, last = (number(record.get("eval/reward_mean"), 3) for record in (evals[0], evals[-1]))
            text += f", held-out reward {first} -> {last}"
        return text

    def _bottleneck(self, now: float) -> str:
        window_s = min(DIAGNOSIS_WINDOW_S, max(now - self.origin(), 1.0))
        start = now - window_s
        spans = [span for span in self.history.spans if span["end"] > start]
        deaths = [e for e in self.history.events if e.get("kind") == "actor_died" and e["time"] > now - _RECENT_DEATH_S]
        lead = f"{deaths[-1].get('message', 'an actor died')}; " if deaths else ""
        learner = _learner_wait_s(spans, start, now) / window_s
        rollout = busy_share(spans, "rollout", start, now)
        last = f"of the last {duration(window_s)}"
        if rollout is None:
            return f"{lead}starting: no rollout actor has reported yet"
        if learner > _NOTABLE_SHARE and learner >= 1 - rollout:
            return f"{lead}rollout-bound: the learner waited {percent(learner)} {last} for complete groups"
        if 1 - rollout > _NOTABLE_SHARE:
            cause = longest_wait(spans, "rollout", start, now)
            why = f", mostly {cause.removeprefix('wait_')}" if cause else ""
            return f"{lead}learner-bound: rollout actors were idle {percent(1 - rollout)} {last}{why}"
        return f"{lead}balanced: rollout busy {percent(rollout)}, the learner waited {percent(learner)} {last}"


def _learner_wait_s(spans: Iterable[Record], start: float, end: float) -> float:
    """Seconds in which a learner rank waited for its claim; older runs give a wait of the controller that name too."""
    waits = [s for s in spans if s["name"] == "wait_claim" and str(s["actor"]).startswith("learner")]
    return covered_s(union(clip(waits, start, end)))


_ENDINGS = frozenset({"drain", "stop", "finish"})
_LIFECYCLE = frozenset({"start", "resume"}) | _ENDINGS


def column(records: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """One value of each record, None where it is missing."""
    return [record.get(key) for record in records]
