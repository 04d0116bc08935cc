"""From a lease to a trajectory that is ready to go on: its sampling, what watches it, and its environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pmdflow.config.schema import Config
from pmdflow.data.sampling import SamplingControl, control_for, sampling_temperature
from pmdflow.data.stop_text import StopText
from pmdflow.data.tokenizer import end_ids, load_tokenizer
from pmdflow.environments.host import Hosts
from pmdflow.environments.observed import Speech
from pmdflow.environments.protocol import Environment, load_environment
from pmdflow.rollout.held import HeldTrajectory, LeaseLost
from pmdflow.rollout.programs import Programs
from pmdflow.rollout.repetition import RepetitionDetector
from pmdflow.rollout.session import Session
from pmdflow.rollout.turns import split_turns
from pmdflow.store.episodes import Turn
from pmdflow.types import Lease

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CLOSE_S = 20.0
"""What the environments of an actor that ends are given to end, at most: a run that drains has `run.drain_s`."""
Read = Callable[[int], Mapping[str, Any] | None]


class LeaseTaker:
    """Takes leases by the settings of a run; loads tokenizer and environment when the first one needs them."""

    def __init__(
        self, config: Config, programs: Programs | None = None, read: Read | None = None, *, most_parked: int = 64
    ) -> None:
        """Load nothing yet.

        Args:
            config: The run's.
            programs: Those of `agents`.
            read: Gives a trajectory as the store has it (`TrajectoryStore.trajectory`); None: there is no store.
            most_parked: Environments that wait for a lease; of more, those that have waited longest are closed.
        """
        self._config = config
        self._programs, self._read, self._most_parked = programs, read, most_parked
        self._hosts = Hosts()
        self._parked: dict[int, tuple[Session, int]] = {}
        """Environments whose trajectories were given back, with the epochs of those leases."""

    def take(self, lease: Lease, *, limit: int, version: int) -> HeldTrajectory:
        """Hold a leased trajectory; with an environment, the call that replays its turns is under way.

        Args:
            lease: The lease.
            limit: Tokens that may be generated now.
            version: Of the engine's weights.

        Raises:
            ValueError: impossible overrides of its prompt, or no such environment.
            LeaseLost: it has ended already.
        """
        held = HeldTrajectory(
            lease=lease,
            control=control_for(lease.metadata, self._defaults(lease, version)),
            limit=limit,
            context=lease.prefix.tolist(),
            repetition=self._repetition(lease),
        )
        if self._config.environment is not None:
            self._open(held)
        if self._programs is not None:
            self._programs.open(held)
        elif held.control.stop:
            held.stop_text = StopText(
                self._tokenizer,
                held.control.stop,
                history=held.context[held.turn_start :],
                ignored=held.min_tokens,
            )
        return held

    def _defaults(self, lease: Lease, version: int) -> SamplingControl:
        """How a prompt without overrides is sampled; a lease keeps the temperature that it began with."""
        train, rollout = lease.kind == "train", self._config.rollout
        temperature = sampling_temperature(
            version,
            initial=rollout.temperature,
            final=rollout.final_temperature,
            iterations=rollout.temperature_iterations,
        )
        return SamplingControl(
            temperature=temperature if train else self._config.eval.temperature,
            max_tokens=lease.max_tokens,
            min_tokens=0 if train else self._config.eval.min_tokens,
            top_p=1.0 if train else self._config.eval.top_p,
            stop=tuple(rollout.stop),
            stop_token_ids=tuple(rollout.stop_token_ids),
        )

    def _repetition(self, lease: Lease) -> RepetitionDetector | None:
        config = self._config.rollout.repetition
        if config is None or (lease.kind == "eval" and not self._config.eval.stop_repetition):
            return None
        return RepetitionDetector(config, history=lease.prefix[lease.prefix_observed == 0].tolist())

    def _open(self, held: HeldTrajectory) -> None:
        """Begin the environment from what is durable."""
        assert self._config.environment is not None
        lease = held.lease
        said, turns = split_turns(lease.prefix, lease.prefix_observed)
        action = turns.pop().action if turns and not turns[-1].observed else ()
        notes = self._notes(lease)
        parked, epoch = self._parked.pop(lease.trajectory, (None, 0))
        if parked is not None:
            if lease.epoch == epoch + 1 and parked.is_at(said, turns, num_notes=len(notes)):
                held.attach(parked, turn=action, whole=self._has_ended(action, held.control))
                return
            parked.close("its trajectory went on without it")
        session = Session(
            make=self._environment,
            hosts=self._hosts,
            speech=self._speech,
            config=self._config.environment,
            key=f"{self._config.run.name}/{lease.trajectory}",
            prompt=self._text(lease),
            metadata=lease.metadata,
            said=said if len(lease.prefix) else None,
            turns=turns,
            num_notes=len(notes),
            is_noted=bool(notes) and notes[-1][0] >= len(lease.prefix),
        )
        held.open(session, unanswered=len(action), whole=self._has_ended(action, held.control))

    def let_go(self, held: HeldTrajectory, *, stays: bool) -> None:
        """A lease has ended; where the trajectory `stays` partial its environment waits for the next one."""
        session = held.session
        if not isinstance(session, Session):
            return
        if stays and held.stop in ("budget", "abort") and session.call is None:
            self._parked[held.id] = (session, held.epoch)
            for longest in list(self._parked)[: -self._most_parked]:
                self._drop(longest, "too many environments wait; another one goes on with its trajectory")
        else:
            session.close("its trajectory is complete" if held.stop is not None else "another actor has its lease")

    def parked(self) -> dict[int, int]:
        """Trajectories whose environments wait for a lease, each with the epoch of the last one."""
        return {id: epoch for id, (_, epoch) in self._parked.items()}

    def drop(self, trajectory: int) -> None:
        """Another actor goes on with a trajectory, or it is gone: close the environment that waits here."""
        self._drop(trajectory, "another actor goes on with its trajectory")

    def _drop(self, trajectory: int, why: str) -> None:
        session, _ = self._parked.pop(trajectory)
        session.close(why)

    def close_environments(self) -> list[str]:
        """Close all that were begun and wait, at most `environment.timeout_s` or `CLOSE_S`; which go on."""
        environment = self._config.environment
        return [] if environment is None else self._hosts.close(timeout_s=min(environment.timeout_s, CLOSE_S))

    def _notes(self, lease: Lease) -> Sequence[Turn]:
        """What earlier holders of a lease have noted."""
        if self._read is None or lease.epoch <= 1:
            return ()
        row = self._read(lease.trajectory)
        if row is None or row["epoch"] != lease.epoch:
            raise LeaseLost(f"trajectory {lease.trajectory}, epoch {lease.epoch}")
        notes: Sequence[Turn] = row["turns"]
        return notes

    def _text(self, lease: Lease) -> str:
        if lease.text is not None:
            return lease.text
        return str(self._tokenizer.decode(lease.prompt.tolist(), skip_special_tokens=True))

    def _has_ended(self, action: tuple[int, ...], control: SamplingControl) -> bool:
        """Whether a turn is whole: its worker vanished before the environment's answer was durable."""
        if not action:
            return False
        if action[-1] in self._ends.union(control.stop_token_ids):
            return True
        return bool(control.stop) and StopText(self._tokenizer, control.stop).find(action) is not None

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._config.model.path)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return end_ids(self._config.model.path)

    @cached_property
    def _speech(self) -> Speech:
        return Speech(tokenizer=self._tokenizer, template_args=self._config.data.sources[0].template_args or {})

    @cached_property
    def _environment(self) -> Callable[[], Environment]:
        assert self._config.environment is not None
        return load_environment(self._config.environment)
