"""Held-out evaluation during a run: rounds of one policy version each, outside ledger and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray import ObjectRef

from pmdflow.config.schema import DEFAULT_SLOTS, Config
from pmdflow.data.mixture import MixedPrompts
from pmdflow.evaluate.rounds import EvaluationSet, failures, summarize_round, unfinished
from pmdflow.metrics.history import History
from pmdflow.run.evaluators import Evaluators
from pmdflow.run.loops import is_ready
from pmdflow.run.progress import Progress
from pmdflow.run.supervision import Supervisor
from pmdflow.store.actor import StoreActor
from pmdflow.store.answers import EvalResult
from pmdflow.store.client import answers, call

ANSWER_TIMEOUT_S = 120.0
LAST_HOLD_S = 30 * 24 * 3600.0
"""Nobody waits for rollout actors once all iterations are done."""
LOOK_S = 0.1
"""Where nothing but a round is waited for."""
ACTORS_SHARE = 4
"""One rollout actor in so many evaluates at most, where the others train."""


@dataclass(slots=True, kw_only=True)
class _Round:
    """One that is under way."""

    iteration: int
    version: int
    evaluators: Evaluators
    open: list[EvaluationSet]
    """Sets that are not recorded."""
    admitted: list[ObjectRef[list[int]]] | None
    """None once that is known to be done."""
    results: dict[str, ObjectRef[list[EvalResult] | None]] = field(default_factory=dict)
    """Asked for, by set."""
    left: list[ObjectRef[list[str]]] = field(default_factory=list)
    """Prompts without an answer, by set; asked for when nobody evaluates."""


class HeldOut:
    """Has a few rollout actors evaluate a version, which they keep meanwhile, and records what they found.

    Consumes: publications, or claims where rollout and training alternate: then everybody evaluates while the learner
    trains. Produces: a record of each set of a round, all of one version. It never waits but for admission, and at the
    end; `tick` looks after it.
    """

    def __init__(self, *, config: Config, supervisor: Supervisor, prompts: MixedPrompts, run_dir: Path) -> None:
        """Use the first `eval.prompts` held-out prompts, and every set, in every round."""
        self._config = config
        self._supervisor = supervisor
        self._store = supervisor.store
        self._run_dir = run_dir
        held_out = EvaluationSet(name="", prompts=prompts.held_out(config.eval.prompts), settings=None)
        named = [
            EvaluationSet(name=name, prompts=prompts.evaluation_set(name), settings=settings)
            for name, settings in config.eval.sets.items()
        ]
        self._sets = [given for given in (held_out, *named) if given.prompts]
        self._alternates = config.scheduler.lookahead == 0 and not config.cluster.colocate
        """Whether engines have nothing to do, and their devices, while an iteration is trained."""
        self._round: _Round | None = None
        self._ending: Evaluators | None = None
        """Who evaluated for the round before and has not turned to training: it would lease of the next one, too."""
        self._newest = (0, 0)
        """Iterations that the newest weights have trained, and their version."""
        self._is_due = False
        """Whether a round is to begin: at once, or when the one before is over."""
        self._begins_again = False
        """Whether that is one whose version is gone, which waits for no claim."""
        supervisor.watchers.append(self.tick)

    def start(self, iteration: int, version: int) -> None:
        """Continue after `iteration`: a round that is due, and of which not all is recorded, is made now."""
        self.pause()
        self._newest = iteration, version
        self._supervisor.get(call(self._store, StoreActor.drop_eval, "eval-"), what="dropping an evaluation")
        round_due = iteration - iteration % self._config.eval.every
        self._is_due = not self._recorded(round_due)
        self._begin_due()

    def pause(self) -> None:
        """The learner goes back: what is under way is given up, and nothing begins before `start`."""
        self._is_due = self._begins_again = False
        if self._round is not None:
            self._drop(self._round)

    def published(self, iteration: int, version: int) -> None:
        """The weights of an iteration are offered to rollout actors: begin a round if one is due."""
        self._newest = iteration, version
        self._is_due |= iteration % self._config.eval.every == 0 and iteration < self._config.run.iterations
        self._begin_due()

    def claimed(self) -> None:
        """An iteration is claimed: where rollout alternates with training it is idle now."""
        self._begin_due(is_claimed=True)

    def finish(self) -> None:
        """Wait for a round that is under way, then for one of the final policy."""
        self._is_due = self._begins_again
        self._await_round()
        if not self._recorded(self._newest[0]) and not self._supervisor.draining:
            self._begin(is_last=True)
        self._await_round()

    def _await_round(self) -> None:
        progress = Progress("the evaluation")
        while (self._round or self._ending or self._is_due) and not self._supervisor.draining:
            counts = call(self._store, StoreActor.counts)
            progress.require(self._supervisor.get(counts, what="the store's counts"))
            self._supervisor.idle(LOOK_S)
            self.tick()

    def tick(self) -> None:
        """See how far the round is. Never waits."""
        round = self._round
        if round is None:
            self._begin_due()
            return
        if round.admitted is not None:
            if not all(map(is_ready, round.admitted)):
                return
            answers(round.admitted, what="admitting evaluation", timeout_s=ANSWER_TIMEOUT_S)
            round.admitted = None
        round.evaluators.tick()
        self._collect(round)
        if not round.open:
            self._drop(round)
        elif not round.evaluators.busy:
            self._find_left(round)

    def _begin_due(self, *, is_claimed: bool = False) -> None:
        if self._ending is not None and self._ending.settle():
            self._ending = None
        may_begin = is_claimed or self._begins_again or not self._alternates
        if self._is_due and may_begin and self._round is None and self._ending is None:
            self._begin()

    def _begin(self, *, is_last: bool = False) -> None:
        self._is_due = self._begins_again = False
        if not self._sets:
            return
        iteration, version = self._newest
        sequences = sum(given.samples * len(given.prompts) for given in self._sets)
        actors = len(self._supervisor.rollouts)
        needed = -(-sequences // (self._config.rollout.slots or DEFAULT_SLOTS))
        most = actors if self._alternates or is_last else max(actors // ACTORS_SHARE, 1)
        self._round = _Round(
            iteration=iteration,
            version=version,
            evaluators=Evaluators(
                supervisor=self._supervisor,
                version=version,
                hold_s=LAST_HOLD_S if is_last else self._config.eval.hold_s,
                number=min(needed, most),
            ),
            open=list(self._sets),
            admitted=[self._admit(given, iteration) for given in self._sets],
        )

    def _admit(self, given: EvaluationSet, iteration: int) -> ObjectRef[list[int]]:
        prefix = given.request_prefix(iteration)
        batch = [(f"{prefix}{number}", None, prompt) for number, prompt in enumerate(given.prompts)]
        return call(self._store, StoreActor.renew_eval, prefix, batch, given.samples, self._config.data.max_tokens)

    def _collect(self, round: _Round) -> None:
        """Record the sets of which every answer is scored."""
        for given in list(round.open):
            asked = round.results.pop(given.name, None)
            if asked is None:
                round.results[given.name] = call(self._store, StoreActor.eval_results, self._prefix(round, given), 0.0)
            elif not is_ready(asked):
                round.results[given.name] = asked
            else:
                (results,) = answers([asked], what="the evaluation's results", timeout_s=ANSWER_TIMEOUT_S)
                if results is not None:
                    self._record(round, given, results)

    def _record(self, round: _Round, given: EvaluationSet, results: Sequence[EvalResult]) -> None:
        round.open.remove(given)
        call(self._store, StoreActor.drop_eval, self._prefix(round, given))
        telemetry = self._supervisor.telemetry
        summary = summarize_round(results, given, version=round.version)
        telemetry.evaluation({"eval/round": round.iteration, **summary})
        if problem := failures(results, given, round.iteration):
            telemetry.event("evaluation_failures", problem)

    def _find_left(self, round: _Round) -> None:
        """Nobody evaluates, but not all is recorded: it awaits scores, or evaluators are to be found for the rest."""
        if not round.left:
            round.left = [
                call(self._store, StoreActor.unfinished_eval, self._prefix(round, given)) for given in round.open
            ]
        elif all(map(is_ready, round.left)):
            names = answers(round.left, what="what is evaluated", timeout_s=ANSWER_TIMEOUT_S)
            round.left = []
            if not any(names):
                return
            if round.evaluators.is_late:
                self._give_up(round, names)
            elif not round.evaluators.assign() and round.evaluators.are_past:
                self._again(round)

    def _give_up(self, round: _Round, left: Sequence[Sequence[str]]) -> None:
        """Its time is over: it has no point on the curve, since what is unfinished is what is long."""
        self._drop(round)
        names = [name for of_set in left for name in of_set]
        said = unfinished(names, round.iteration, hold_s=self._config.eval.hold_s)
        self._supervisor.telemetry.event("evaluation_late", said)

    def _again(self, round: _Round) -> None:
        """Whoever had its version is gone: it begins again by the newest."""
        self._drop(round)
        self._supervisor.telemetry.event(
            "evaluation_again",
            f"evaluation of iteration {round.iteration}: no actor has version {round.version} any more; it begins "
            f"again, as that of iteration {self._newest[0]} by version {self._newest[1]}",
        )
        self._is_due = self._begins_again = True

    def _drop(self, round: _Round) -> None:
        self._round, self._ending = None, round.evaluators
        for given in round.open:
            call(self._store, StoreActor.drop_eval, self._prefix(round, given))

    def _recorded(self, iteration: int) -> bool:
        """Whether the run's files have every set of a round, in the history that goes on."""
        history = History(self._run_dir, max_spans=0)
        self._supervisor.aside(history.update, what="reading the metrics")
        found = [history.eval_sets.get(given.name, {}) if given.name else history.evals for given in self._sets]
        return all(iteration in rounds for rounds in found)

    def _prefix(self, round: _Round, given: EvaluationSet) -> str:
        return given.request_prefix(round.iteration)
