"""The one owner of what a run tells of itself: spans, events, token counts, busy and waiting seconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pmdflow.metrics.live import LiveView
from pmdflow.metrics.recorder import Recorder
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import Wait, is_bubble
from pmdflow.types import Counts


@dataclass(slots=True, kw_only=True)
class Interval:
    """What rollout did in a stretch of time."""

    busy_s: float = 0.0
    """Seconds that rollout actors spent outside wait spans."""
    waited_s: float = 0.0
    """Seconds in their wait spans."""
    tokens: Counter[str] = field(default_factory=Counter)
    """What engines count, of all rollout actors, lost ones included: see `RolloutActor.drain`."""

    def capacity(self, *, actors: int) -> float | None:
        """Tokens a second that so many rollout actors would generate without a wait; None without a token."""
        generated = self.tokens["generated_tokens"] - self.tokens["evaluation_tokens"]
        return generated / self.busy_s * actors if generated and self.busy_s else None

    def engine_metrics(self, *, speculates: bool) -> dict[str, object]:
        """What the engines did besides generating, by metric key."""
        count, generated = self.tokens, self.tokens["generated_tokens"]
        metrics: dict[str, object] = {
            "rollout/preemptions": count["preemptions"],
            "rollout/lost_overrun_tokens": count["overrun_tokens"],
            "rollout/lost_overrun_share": count["overrun_tokens"] / generated if generated else None,
            "rollout/prefilled_per_generated": count["prefill_tokens"] / generated if generated else None,
            "weights/fetched_bytes": count["fetched_bytes"],
            "weights/fetched_deltas": count["fetched_deltas"],
            "weights/fetch_s": count["fetch_ms"] / 1000,
            "weights/load_s": count["load_ms"] / 1000,
        }
        if speculates:
            drafted = count["drafted_tokens"]
            metrics["rollout/speculation_accepted_share"] = count["accepted_tokens"] / drafted if drafted else None
        return metrics

    @property
    def busy_share(self) -> float:
        """Share of the recorded time; 0 without any."""
        return self.busy_s / max(self.busy_s + self.waited_s, 1e-9)


class Telemetry:
    """Takes the reports of all actors, writes them down and shows them.

    Example:
        >>> telemetry = Telemetry(recorder=recorder, live=live)  # doctest: +SKIP
        >>> telemetry.take(report, source="rollout-0/1")         # doctest: +SKIP
        >>> telemetry.take_interval().tokens["generated_tokens"]  # doctest: +SKIP
        512
    """

    def __init__(self, *, recorder: Recorder, live: LiveView) -> None:
        """Know nothing yet."""
        self._recorder = recorder
        self._live = live
        self._interval = Interval()
        self._counted: dict[str, Mapping[str, int]] = {}
        """Token counts of each source as last reported."""
        self._generated = 0
        self._rate_since = (time.time(), 0)

    def take(self, report: ActorReport, *, source: str) -> None:
        """Take what an actor reports; `source` names this process of it, since its token counts begin at 0."""
        self._recorder.spans(report.spans)
        for event in report.events:
            self.event(event.kind, event.message, **event.attrs)
        if not report.tokens:
            return
        for span in report.spans:
            seconds = span["end"] - span["start"]
            if is_bubble(span["name"]):
                self._interval.waited_s += seconds
            else:
                self._interval.busy_s += seconds
        before = self._counted.get(source, {})
        new = Counter({name: count - before.get(name, 0) for name, count in report.tokens.items()})
        self._interval.tokens.update(new)
        self._generated += new["generated_tokens"]
        self._counted[source] = report.tokens

    def take_interval(self) -> Interval:
        """What rollout did since the last call."""
        interval, self._interval = self._interval, Interval()
        return interval

    def waited(self, name: Wait, start: float) -> None:
        """Record that the controller waited from unix second `start` until now."""
        span: dict[str, object] = {"actor": "controller", "name": name, "start": start, "end": time.time(), "attrs": {}}
        self._recorder.spans([span])

    def event(self, kind: str, message: str, **attrs: object) -> None:
        """Record an event and show it."""
        self._recorder.event(kind, message, **attrs)
        self._live.event(kind, message)

    def sample(self, counts: Counts, ledger: Mapping[str, int]) -> None:
        """Record the store's numbers of this second."""
        (before, generated), now = self._rate_since, time.time()
        self._rate_since = (now, self._generated)
        rate = (self._generated - generated) / max(now - before, 1e-9)
        values = {**store_values(counts, ledger), "rollout/tokens_per_s": rate}
        self._recorder.metric("sample", values)
        self._live.update(values)

    def iteration(self, values: Mapping[str, object]) -> None:
        """Record an iteration and show it."""
        self._recorder.metric("iteration", values)
        self._live.iteration(values)

    def evaluation(self, values: Mapping[str, object]) -> None:
        """Record a round of evaluation and show it."""
        self._recorder.metric("eval", values)
        self._live.evaluation(values)

    def drain_asked(self) -> None:
        """Show that the run ends after this iteration."""
        self._live.event("drain", "draining: finishing the iteration, then stopping; press Ctrl-C again to stop now")


def store_values(counts: Counts, ledger: Mapping[str, int]) -> dict[str, object]:
    """Counts and ledger by metric key."""
    names = (
        "groups_ready", "groups_untrained", "groups_claimed", "trajectories_leased", "trajectories_idle",
        "trajectories_partial", "trajectories_unscored", "trajectories_late", "groups_no_signal",
        "scores_ignored", "bytes",
    )  # fmt: skip
    return {
        **{f"store/{name}": getattr(counts, name) for name in names},
        "scheduler/version": counts.version,
        "scheduler/tokens_budget": counts.tokens_budget,
        "scheduler/tokens_spent": counts.tokens_spent,
        **{f"ledger/{name}": value for name, value in ledger.items()},
    }
