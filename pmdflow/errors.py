"""The errors that pmdflow raises on purpose; anything else that escapes is a bug."""

from __future__ import annotations

from typing import ClassVar


class PmdflowError(Exception):
    """Root of every error that pmdflow raises on purpose.

    Example:
        >>> print(LaunchError("runs is not writable", hint="choose another run.dir").report())
        error: runs is not writable
        <BLANKLINE>
        hint: choose another run.dir
    """

    exit_code: ClassVar[int] = 1
    """Exit code of the command line when this error ends it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Say what happened, with the value and the limit; `hint` is the remedy."""
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """The message, and after a blank line the hint: whoever quotes the error quotes both."""
        message = super().__str__()
        return message if self.hint is None else f"{message}\n\nhint: {self.hint}"

    def report(self) -> str:
        """Say the error as the command line prints it."""
        return f"error: {self}"


class LaunchError(PmdflowError):
    """The run could not start; the message names the place, the hint the remedy."""


class PromptTooLong(PmdflowError, ValueError):
    """A prompt has more tokens than `data.max_prompt_tokens`."""


class ActorDied(PmdflowError):
    """An actor that cannot be replaced has died."""


class WaitTimeout(PmdflowError):
    """A wait passed its deadline; the message names what it waited for."""


class WeightsLost(PmdflowError):
    """The weights of a version can be fetched from nowhere any more: whoever published them is gone."""


class WeightsDamaged(WeightsLost):
    """The weights of a version arrived as other bytes than were published."""


class LearnerDied(ActorDied):
    """A learner rank died: the whole learner restarts from the newest checkpoint."""


class EngineDied(PmdflowError):
    """The process of a generation engine is gone or silent: its rollout actor gives its leases back and is replaced."""
