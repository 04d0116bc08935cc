"""Where metrics go besides the run directory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pmdflow.config.section import Section

SinkName = Literal["wandb", "tensorboard", "prometheus", "trackio"]
SETTINGS: dict[SinkName, tuple[str, ...]] = {
    "wandb": ("project", "entity", "mode"),
    "tensorboard": (),
    "prometheus": ("host", "port"),
    "trackio": ("project",),
}
"""What can be set for each sink."""


class SinkConfig(Section):
    """One sink; a setting of another one is refused."""

    name: SinkName
    """`wandb` (Weights & Biases), `tensorboard` (event files in `RUN/sinks/tensorboard`), `prometheus` (the newest
    numbers, to be scraped while the run lives) or `trackio` (its local database)."""
    project: str = Field(default="pmdflow", min_length=1)
    """Of `wandb` and `trackio`: where the run appears."""
    entity: str | None = None
    """Of `wandb`: team or user that owns the project; null is the account's own."""
    mode: Literal["online", "offline"] | None = None
    """Of `wandb`: `offline` writes below `RUN/sinks`, for `wandb sync`; null is what `WANDB_MODE` says, or online."""
    host: str = "127.0.0.1"
    """Of `prometheus`: address that is listened at; `0.0.0.0` for a Prometheus on another machine."""
    port: int = Field(default=9464, ge=1, le=65535)
    """Of `prometheus`: runs at the same time on one machine need one each."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class MetricsConfig(Section):
    """What is done with the numbers that a run records."""

    sinks: list[Annotated[SinkConfig, BeforeValidator(_named, json_schema_input_type=SinkName | SinkConfig)]] = []
    """Where they go besides the run directory (needs the extra `sinks`): names, or mappings with `name` and settings.
    For each of them a process of its own follows the run's files, so that it can neither slow nor stop the run."""
