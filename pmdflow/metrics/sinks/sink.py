"""What a sink is, and how it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pmdflow.config.sinks import SinkConfig
from pmdflow.metrics.sinks.rows import Row


class Sink(Protocol):
    """A place outside the run directory that rows are sent to.

    It is given every row from the first one on, and sends those that its place does not hold yet: what the place holds,
    it asks the place, so that neither a kill nor a restart loses or doubles one.
    """

    def send(self, row: Row) -> None:
        """Take the next row."""

    def close(self) -> None:
        """Make everything durable where it was sent."""


def open_sink(run: Path, config: SinkConfig) -> Sink:
    """Open the sink that `config` names for the run in directory `run`; imports its library.

    Raises:
        PmdflowError: it cannot be had.
    """
    match config.name:
        case "tensorboard":
            from pmdflow.metrics.sinks.tensorboard import TensorboardSink

            return TensorboardSink(run)
        case "wandb":
            from pmdflow.metrics.sinks.wandb import WandbSink

            return WandbSink(run, config)
        case "trackio":
            from pmdflow.metrics.sinks.trackio import TrackioSink

            return TrackioSink(run, config)
        case "prometheus":
            from pmdflow.metrics.sinks.prometheus import PrometheusSink

            return PrometheusSink(run, config)
