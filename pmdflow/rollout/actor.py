"""The rollout actor: leases in, segments out, weights swapped between decode steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pmdflow.agents.desk import Incoming, Outgoing
from pmdflow.config.schema import Config
from pmdflow.errors import EngineDied, WaitTimeout
from pmdflow.metrics.report import ActorReport
from pmdflow.metrics.spans import SpanBuffer, Wait
from pmdflow.rollout.engines.make import make_engine
from pmdflow.rollout.evaluation import Ended, EvaluationTurns
from pmdflow.rollout.failures import InARow
from pmdflow.rollout.fetching import Fetcher
from pmdflow.rollout.held import HeldTrajectory
from pmdflow.rollout.holder import Holder
from pmdflow.rollout.incoming import IncomingWeights
from pmdflow.rollout.launching import AgentsPlace
from pmdflow.rollout.leasing import LeaseTaker
from pmdflow.rollout.loading import Loader
from pmdflow.rollout.programs import Programs, noted
from pmdflow.rollout.requests import Kind, StoreRequests
from pmdflow.rollout.shift import Shift
from pmdflow.rollout.telling import SPAN_S, Telling
from pmdflow.store.client import StoreHandle
from pmdflow.types import UInt8
from pmdflow.weights.device_turn import DeviceTurn
from pmdflow.weights.transport import WeightsHandle, in_group

SLOTS_PER_SPARE = 8
"""For so many slots one lease more is held: a slot that falls free is not empty while the store is asked."""
PARKED_LOOK_S = 5.0
"""How often the store is asked who goes on with the trajectories of programs and environments that wait here."""


class RolloutActor:
    """Holds one engine and no trajectory state: it can vanish at any instant, and only unsent tokens are lost."""

    def __init__(
        self,
        *,
        config: Config,
        index: int,
        store: StoreHandle,
        run_dir: str,
        worker: str,
        agents: AgentsPlace | None = None,
    ) -> None:
        """Load the engine.

        Args:
            config: The run's.
            index: Numbers the rollout actors.
            store: The handle of the store actor.
            run_dir: The run directory.
            worker: The name under which leases are taken, which no actor before it had: the leases of those may be
                fenced at any time. Ray knows the actor by it too.
            agents: Where agent programs find the gateway.
        """
        self._config = config.rollout
        self._worker = worker
        self._requests = StoreRequests(store)
        self._shift = Shift(DeviceTurn.own(run_dir, index)) if config.cluster.colocate else None
        self._engine = make_engine(config, seed=(config.run.seed * 1000 + index) % 2**32)
        self._programs: Programs | None = None
        self._agents = config.agents
        if agents is not None:
            self._programs = Programs(config, agents, Path(run_dir), worker, self._requests.trajectory)
        self._most_held = self._engine.num_slots + self._engine.num_slots // SLOTS_PER_SPARE
        self._taker = LeaseTaker(config, self._programs, self._requests.trajectory, most_parked=self._most_held)
        self._holder = Holder(self._engine, self._taker)
        self._loader = Loader(self._engine, mode=config.rollout.on_new_weights)
        self._one_version = config.scheduler.versions is not None
        self._incoming = IncomingWeights(any_order=self._one_version)
        self._turns = EvaluationTurns()
        self._starved = False
        self._spans = SpanBuffer(self._worker)
        self._fetcher = Fetcher(config, Path(run_dir), self._engine, self._incoming, self._spans)
        room = "environment" if agents is None else "agent"
        self._telling = Telling(self._spans, self._engine, room=room, context=lambda: self._holder.context_tokens)
        self._last_flush = self._last_look = 0.0
        self._failures = InARow.of_environment(config.environment)
        self._stopping = threading.Event()

    def run(self, handle: WeightsHandle | None) -> None:
        """Generate until `stop`, from the weights of `handle`; None means those of the model folder.

        Consumes: leases and weights. Produces: segments. Waits for: a lease or a grant, at most `LEASE_WAIT_S` at a
        time. Unblocked by: admission, a publication, an expired lease of another worker.

        Raises:
            EngineDied: the engine's process is gone or silent; everything generated is sent and every lease given back.
            WaitTimeout: the store does not answer, or the first weights do not come.
            PmdflowError: the environment only fails.
        """
        if handle is not None:
            self._fetcher.begin(handle, meanwhile=self._rests)
        try:
            while not self._stopping.is_set():
                if self._rests():
                    continue
                self._attend_evaluation()
                self._swap_weights()
                self._collect()
                self._take_answers()
                self._request_leases()
                self._telling.keep(self._holder.fill_slots())
                if self._engine.active():
                    self._step()
                else:
                    self._idle()
                self._flush_when_due()
        except EngineDied:
            self._release_all()
            raise
        else:
            self._release_all()
        finally:
            left = self._holder.close_environments()
            for name in left:
                self._telling.failed(f"{name}: it did not end when it was closed")

    def update_weights(self, handle: WeightsHandle, timeout_s: float) -> bool:
        """Fetch a version beside generation, and wait until it is in use.

        Returns:
            False if the actor stopped, or a newer version came, before this one was used; or if it still finishes what
            it holds, or evaluates, after `timeout_s`.

        Raises:
            WaitTimeout: it was not in use within `timeout_s`, or did not arrive.
            WeightsLost: nobody has it any more.
        """
        deadline = time.monotonic() + timeout_s
        self._fetcher.offer(handle, timeout_s=timeout_s)
        try:
            return self._incoming.await_applied(handle.version, timeout_s=deadline - time.monotonic())
        except WaitTimeout:
            if self._config.on_new_weights == "finish" or self._turns.active:
                return False
            raise

    def evaluate(self, version: int, hold_s: float) -> Ended:
        """Take part in the evaluation of a version once it is in use, until nothing of that is left to lease.

        Nothing else is generated, and no other weights are taken, for at most `hold_s`.

        Returns:
            How that ended; `passed` at once where the engine has a newer version, or if the actor stops.
        """
        return self._turns.serve(version, hold_s=hold_s)

    @in_group("weights")
    def read_weights(self, version: int, offset: int, num_bytes: int, delta: bool) -> UInt8:
        """UInt8 of a version's file, or of its delta, for a node that does not have it; safe beside everything else."""
        return self._fetcher.read(version, offset, num_bytes, delta=delta)

    def sleep(self, timeout_s: float) -> None:
        """Let the engine give its device to the learner; returns when it has.

        Raises:
            WaitTimeout: it did not within `timeout_s`.
        """
        assert self._shift is not None, "only in a colocated run"
        self._shift.ask(True, timeout_s=timeout_s)

    def wake(self, timeout_s: float) -> None:
        """Let the engine have its device again, and go on.

        Raises:
            WaitTimeout: it did not within `timeout_s`.
        """
        assert self._shift is not None, "only in a colocated run"
        self._shift.ask(False, timeout_s=timeout_s)

    def stop(self) -> None:
        """Let `run` send what it has, give its leases back and return."""
        self._stopping.set()
        self._incoming.close()
        self._turns.close()

    def share_programs(self, num_actors: int) -> None:
        """Agent programs are shared out among so many rollout actors from now on."""
        if self._programs is not None:
            self._programs.num_actors = num_actors

    def submit_requests(self, requests: list[Incoming]) -> None:
        """Leave HTTP requests of agent programs for the generating thread; returns at once."""
        assert self._programs is not None
        self._programs.desk.submit(requests)

    def take_answers(self, wait_s: float, gateway: str) -> list[Outgoing]:
        """Answers to HTTP requests, for the newest gateway; waits up to `wait_s` for the first one."""
        assert self._programs is not None
        return self._programs.desk.take_answers(wait_s, gateway)

    def drain(self) -> ActorReport:
        """Spans and problems of environments since the last call, and counts of tokens since the start."""
        return self._telling.drain({**self._fetcher.counts(), "load_ms": round(1000 * self._loader.seconds)})

    def _attend_evaluation(self) -> None:
        """Turn to evaluation or back to training; what is held is given back, for others to go on with."""
        self._turns.ends(is_idle=self._starved and not len(self._holder))
        self._turns.begins(self._engine.version)
        if self._turns.active == self._telling.evaluates:
            return
        self._telling.end_span()
        if self._requests.asking:
            self._join_leases()
        self._give_back()
        self._telling.evaluates, self._starved = not self._telling.evaluates, False

    def _rests(self) -> bool:
        """Change over if that is due; whether the engine sleeps: what is held stays leased, nothing is generated."""
        shift = self._shift
        if shift is None:
            return False
        if shift.is_due and not shift.asleep:
            self._await_append()
            self._telling.end_span()
            self._telling.keep(self._holder.take(self._engine.pause()))
            self._send(next_version=self._engine.version)
            shift.sleep(self._engine, self._spans)
        elif shift.is_due:
            shift.wake(self._engine, self._spans)
        if shift.asleep:
            with self._spans.span("wait_device"):
                shift.await_due(timeout_s=SPAN_S)
            self._collect()
            self._take_answers()
            self._flush_when_due()
        return shift.asleep

    def _swap_weights(self) -> None:
        """Take other weights; every token sent before carries the old version, every one after the new.

        With one version a trajectory, what the old version began is given back: whoever serves it goes on.
        The weights are loaded while the store answers with the grants for them.
        """
        if self._telling.evaluates or (self._config.on_new_weights == "finish" and len(self._holder)):
            return
        taken = self._incoming.take()
        if taken is None:
            return
        version, (staged, probe) = taken
        self._loader.expect(probe)
        self._await_append()
        self._telling.end_span()
        with self._spans.span("apply_weights", version=version) as attrs:
            attrs["running"] = len(self._holder)
            start = time.monotonic()
            self._telling.keep(self._holder.take(self._engine.pause()))
            self._holder.forget_ahead()
            if self._one_version:
                self._holder.abort()
            self._send(next_version=version)
            attrs["pause_s"] = time.monotonic() - start
            self._loader.load(version, staged, probe)
            attrs["load_s"] = time.monotonic() - start - attrs["pause_s"]
            self._await_append()
        self._incoming.mark_applied(version)

    def _collect(self) -> None:
        """Take what the store has answered: grants, then leases."""
        leased, appended = self._requests.answered()
        if appended:
            self._await_append()
        if leased:
            self._join_leases()

    def _join_leases(self) -> None:
        version, leases = self._requests.take_leases()
        self._starved = not leases
        if any(lease.trajectory in self._holder for lease in leases):
            self._await_append()  # it gave the leases back, and is answered later: once that is durable
        for lease in leases:
            # A grant is for the version it was asked for; after a swap the next append asks for a new one.
            self._holder.join(lease, grant=lease.grant if version == self._engine.version else 0)

    def _take_answers(self) -> None:
        answers = self._holder.take_answers()
        if self._programs is not None:
            self._programs.note_rewards(self._holder, self._requests.turns)
        if self._holder.forks():
            self._fork()
        for id, reply in answers.items():
            if self._programs is not None and reply.done and id in self._holder:  # a fork awaits grants: it may be gone
                self._programs.note(self._holder[id], reply.problem)
            if reply.notice:
                self._telling.ended(reply.notice, trajectory=id)
            if reply.problem:
                self._telling.failed(reply.problem, trajectory=id)
            self._failures.note(reply.problem)

    def _fork(self) -> None:
        """Begin branches in the store: what is in flight renews leases under the epochs that these end."""
        self._await_append()
        for held in self._holder.forks():
            assert held.fork is not None
            forked = self._requests.fork(held.id, held.epoch, held.fork)
            if forked.stale:
                self._let_go([self._holder.drop(held.id)])
            else:
                held.forked(forked.epoch)

    def _let_go(self, gone: Iterable[HeldTrajectory]) -> None:
        """Leases have ended; what is given back is still partial."""
        for held in gone:
            if self._programs is not None and self._agents is not None:
                notes = self._programs.let_go(held, stays=not self._stopping.is_set())
                self._telling.notes += noted(self._worker, notes, held, self._agents)
            else:
                self._taker.let_go(held, stays=not self._stopping.is_set())

    def _drop_parked(self) -> None:
        """End programs, and close environments, whose trajectories others go on with."""
        if time.monotonic() - self._last_look < PARKED_LOOK_S:
            return
        keeper = self._taker if self._programs is None else self._programs
        self._last_look, parked = time.monotonic(), keeper.parked()
        epochs = self._requests.epochs(list(parked)) if parked else {}
        for trajectory, epoch in parked.items():
            if epochs.get(trajectory) != epoch:
                keeper.drop(trajectory)

    def _request_leases(self) -> None:
        finish = self._config.on_new_weights == "finish"
        most = self._engine.num_slots if finish else self._most_held
        wanted = (self._programs.most if self._programs is not None else most) - self._holder.num_open
        awaits_weights = finish and self._incoming.waiting and not self._telling.evaluates
        if wanted > 0 and not self._requests.asking and not awaits_weights:
            kind: Kind = "eval" if self._telling.evaluates else "train"
            self._requests.ask_leases(self._worker, version=self._engine.version, most=wanted, kind=kind)

    def _step(self) -> None:
        self._telling.begin_step()
        self._telling.end_step(self._holder.step())

    def _idle(self) -> None:
        """Nothing to decode: wait for an environment, for a lease or for the grants of the append in flight."""
        self._telling.end_span()
        calling = self._holder.num_calling
        if not self._requests.sending and len(self._holder) > calling:
            self._send(next_version=self._engine.version)
        name: Wait = "wait_environment" if calling else "wait_grant" if len(self._holder) else "wait_lease"
        with self._spans.span("wait_evaluation" if self._telling.evaluates else name):
            if calling:
                self._holder.wait_answer()
            elif not self._requests.wait_answer():  # new weights are awaited by `finish` with an empty engine
                self._stopping.wait(timeout=0.01)

    def _flush_when_due(self) -> None:
        # Half an interval until tokens are sent leaves the other half to make them durable. A store that is slower is
        # waited for: what is generated meanwhile would be lost too.
        if time.monotonic() - self._last_flush >= self._config.flush_interval_s / 2:
            self._await_append()
            self._drop_parked()
            self._send(next_version=self._engine.version)
        elif self._holder.urgent and not self._requests.sending:
            segments = self._holder.segments(next_version=self._engine.version, urgent=True)
            self._requests.send(segments, self._holder.notes())

    def _send(self, *, next_version: int) -> None:
        """Append everything unsent, and renew every lease, in one call."""
        self._last_flush = time.monotonic()
        if len(self._holder):
            self._requests.send(self._holder.segments(next_version=next_version), self._holder.notes())

    def _await_append(self) -> None:
        """Wait for the append in flight, if there is one, and go on with its grants."""
        self._let_go(self._holder.resume(self._requests.take_grants()))

    def _give_back(self) -> None:
        self._await_append()
        self._holder.abort()
        self._send(next_version=self._engine.version)
        self._await_append()

    def _release_all(self) -> None:
        """Send what is unsent and make every held trajectory leasable again."""
        self._await_append()
        self._collect()
        self._give_back()
        if self._programs is not None:
            self._programs.close()
